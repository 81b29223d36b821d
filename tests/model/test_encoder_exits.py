"""Exits of the pixel decoder's encoder: what a training step runs, and what it leaves alone."""

import json

import pytest
import torch
from helpers import random_targets, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError

from mask2former_hf import TrainingRun, TrainingSettings
from mask2former_hf.model import pixel_decoder
from mask2former_hf.model.pixel_decoder import drawn_exit

PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_model("resnet", encoder_layers=3, encoder_exits=True)


def test_half_of_the_steps_run_all_layers_and_the_others_any_fewer():
    torch.manual_seed(0)
    drawn = [drawn_exit(4, torch.device("cpu")) for _ in range(3000)]
    shares = [drawn.count(count) / len(drawn) for count in range(6)]
    assert shares == pytest.approx([0, 1 / 6, 1 / 6, 1 / 6, 1 / 2, 0], abs=0.03)


def test_a_step_is_that_of_a_network_of_so_many_layers_and_the_others_have_gradients_of_zero(model, monkeypatch):
    """Zero and not None, because DistributedDataParallel waits for the gradient of every parameter."""
    masks, labels = random_targets([3, 2], (64, 96))
    small = tiny_model("resnet", encoder_layers=2)
    small.load_state_dict(model.state_dict(), strict=False)
    monkeypatch.setattr(pixel_decoder, "drawn_exit", lambda layers, device: layers - 1)
    losses = [
        one.train()(PIXELS, masks, labels, generator=torch.Generator().manual_seed(1)).loss for one in (model, small)
    ]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    expected = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        if "decoder.encoder.layers.2." in name:
            assert (parameter.grad == 0).all(), name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_exits_act_in_training_alone_and_whenever_the_config_says_so(model, monkeypatch):
    counts = []
    monkeypatch.setattr(pixel_decoder, "drawn_exit", lambda layers, device: counts.append(layers) or layers)
    with torch.no_grad():
        model(PIXELS)
        assert counts == []
        model.train()(PIXELS)
        assert counts == [3]
        model.config.encoder_exits = False
        model(PIXELS)
    assert counts == [3]


@pytest.mark.parametrize(
    "fields",
    [
        {"pixel_decoder_type": "fpn"},
        {"decoder_type": "standard"},
        {"head_type": "per_pixel", "num_queries": 5},
        {"use_auxiliary_loss": False},
    ],
)
def test_models_that_cannot_answer_with_fewer_layers_have_no_exits(fields):
    with pytest.raises(StrictDataclassError, match=f"encoder_exits=True: must be left out with {next(iter(fields))}="):
        tiny_config("resnet", encoder_exits=True, encoder_layers=3, **fields)
    with pytest.raises(StrictDataclassError, match="encoder_layers=1: must be at least 2 with encoder_exits=True"):
        tiny_config("resnet", encoder_exits=True, encoder_layers=1)


def test_a_run_trains_exits_from_a_checkpoint_that_had_none_and_says_so_in_its_files(tmp_path):
    given = {"data": "scenes", "train_limit": 4, "val_limit": 2, "crop": 64, "batch_size": 2, "cpu": True}
    TrainingRun(TrainingSettings(output=tmp_path / "usual", backbone="tiny", steps=1, **given)).train()
    assert "encoder_exits" not in json.loads((tmp_path / "usual" / "config.json").read_text())
    start = {"model": str(tmp_path / "usual"), "encoder_exits": True, "steps": 1}
    run = TrainingRun(TrainingSettings(output=tmp_path / "exits", **start, **given))
    run.train()
    assert run.model.config.encoder_exits
    assert json.loads((tmp_path / "exits" / "config.json").read_text())["encoder_exits"] is True
    assert "fewer layers of its encoder" in (tmp_path / "exits" / "README.md").read_text()
