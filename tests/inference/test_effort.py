"""Fewer decoder layers: what they give, what they leave alone, and what has none to leave out."""

import pickle

import numpy as np
import pytest
import torch
from helpers import tiny_model

from mask2former_hf import Mask2FormerImageProcessor, Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.inference.effort import at_effort
from mask2former_hf.inference.export_files import REPORT


@pytest.fixture(scope="module")
def model():
    return tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4])  # with 3 layers


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("effort", "layers"), [(0, 0), (0.01, 1), (1 / 3, 1), (0.34, 2), (2 / 3, 2), (0.7, 3)])
def test_an_effort_gives_the_prediction_of_its_last_layer(model, pixels, effort, layers):
    with torch.no_grad():
        whole = model(pixels, output_auxiliary_logits=True)
        reduced = at_effort(model, effort)(pixels)
    predictions = [*whole.auxiliary_logits, whole]
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.equal(reduced[name], predictions[layers][name])


def test_the_whole_model_stays_and_shares_its_weights(model, pixels):
    with torch.no_grad():
        before = model(pixels).class_queries_logits
        reduced = at_effort(model, 0.5)
        assert reduced is not model and at_effort(model, 1) is model
        assert torch.equal(model(pixels).class_queries_logits, before)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    own = [parameter.data_ptr() for parameter in reduced.parameters()]
    assert addresses > {*own} and len(model.model.transformer_module.decoder.layers) == 3


def test_a_segmenter_keeps_its_effort_when_it_travels(model, tmp_path):
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    segmenter = Segmenter(tmp_path, task="semantic", device="cpu", effort=0.5)
    photo = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    travelled = pickle.loads(pickle.dumps(segmenter))
    assert len(travelled.model.model.transformer_module.decoder.layers) == 2
    assert (travelled(photo).map == segmenter(photo).map).all()
    assert (segmenter(photo).map != Segmenter(tmp_path, task="semantic", device="cpu")(photo).map).any()


@pytest.mark.parametrize(
    "fields",
    [
        {"use_auxiliary_loss": False},
        {"decoder_type": "standard", "transformer_in_feature": "res5"},
        {"head_type": "per_pixel", "num_queries": 5},
    ],
)
def test_a_model_without_a_prediction_at_every_layer_is_refused(fields):
    other = tiny_model("resnet", **fields)
    with pytest.raises(ValueError, match=f"effort=0.5: the checkpoint has {next(iter(fields))}="):
        at_effort(other, 0.5)
    assert at_effort(other, 1) is other


@pytest.mark.parametrize("effort", [-0.1, 1.5, float("nan"), "0.5"])
def test_an_effort_is_a_share(model, effort):
    with pytest.raises(ValueError, match="effort="):
        at_effort(model, effort)


def test_the_command_line_names_its_flag(model, tmp_path, capsys):
    from PIL import Image

    model.save_pretrained(tmp_path / "model")
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path / "model")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    command = ["predict", str(tmp_path / "photo.png"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out"), "--effort", "2"]) == 2
    assert "--effort 2" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "out"), "--effort", "0"]) == 0
    assert '"effort": 0.0' in next((tmp_path / "out").rglob("run.json")).read_text()


def test_exports_and_videos_know_no_effort(tmp_path, capsys):
    (tmp_path / REPORT).write_text("{}")
    with pytest.raises(ValueError, match="effort=0.5: .* is an export; use its checkpoint"):
        Segmenter(tmp_path, effort=0.5)
    assert main(["evaluate", "--data", "davis", "--model", "x", "--effort", "0"]) == 2
    assert "--effort: is for images" in capsys.readouterr().err
