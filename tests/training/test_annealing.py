"""Mask annealing: the schedule, the queries that it frees, and the model that it leaves."""

import json
import shutil

import pytest
import torch
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file
from torch import nn

from mask2former_hf import Mask2FormerForUniversalSegmentation, TrainingRun, TrainingSettings
from mask2former_hf.model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from mask2former_hf.model.transformer_decoder import Mask2FormerMaskPredictor
from mask2former_hf.training.annealing import anneal_masks, masked_shares

PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_layers_are_annealed_one_after_another_by_a_polynomial():
    """EoMT's spans for four layers: from a sixth of the run, a sixth each."""
    sixths = [masked_shares(n / 6, 1 / 6, 5 / 6, 4) for n in range(7)]
    expected = [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert sixths == [pytest.approx(row, abs=1e-12) for row in expected]
    third = masked_shares(1 / 6 + 1 / 6 / 3, 1 / 6, 5 / 6, 4)
    assert third == pytest.approx([(2 / 3) ** 0.9, 1, 1, 1])
    for steps in (7, 300, 1001):
        assert not any(masked_shares(steps / steps, 0.17, 1.0, 9)), "a model with masks at the end of the run"


def attended_cells(model):
    """(layers, B * Q) cells that each query attends to."""
    with torch.no_grad():
        attentions = model(PIXELS, output_attentions=True).cross_attentions
    return torch.stack([(weights[:, 0] > 0).sum(-1).flatten() for weights in attentions])


def test_the_share_of_masked_queries_is_the_one_asked_for_and_drawn_for_every_image_and_layer(monkeypatch):
    def one_cell(self, states, features):
        return torch.arange(features.shape[-1]).expand(*states.shape[:2], -1) == 0

    monkeypatch.setattr(Mask2FormerMaskPredictor, "allowed_positions", one_cell)
    model = tiny_model("resnet", num_queries=1000).train()
    anneal_masks(model, [1, 0.25, 0.25], torch.Generator().manual_seed(1))
    masked = attended_cells(model) == 1
    assert masked[0].all() and masked[1:].float().mean(1).tolist() == pytest.approx([0.25, 0.25], abs=0.03)
    assert (masked[1] & masked[2]).float().mean() == pytest.approx(0.25**2, abs=0.02)
    first, second = masked[1].chunk(2)
    assert (first & second).float().mean() == pytest.approx(0.25**2, abs=0.02)
    anneal_masks(model, [1, 0.25, 0.25], torch.Generator().manual_seed(1))
    assert torch.equal(attended_cells(model) == 1, masked)
    assert (attended_cells(model.eval()) == 1).all(), "a model that is measured before the end has its masks"


@pytest.mark.parametrize("clips", [False, True])
def test_an_annealed_model_is_the_ablation_without_masks_and_says_so(clips, tmp_path, monkeypatch):
    pixels, kind = PIXELS, Mask2FormerForUniversalSegmentation
    if clips:
        pixels, kind = PIXELS.unsqueeze(1), Mask2FormerForVideoSegmentation
    model, without = kind(tiny_config("resnet")).eval(), kind(tiny_config("resnet", masked_attention=False)).eval()
    without.load_state_dict(model.state_dict())
    anneal_masks(model, [1.0, 1.0, 0.5])
    model.save_pretrained(tmp_path / "before")
    assert "masked_attention" not in json.loads((tmp_path / "before" / "config.json").read_text())
    anneal_masks(model, [0.0, 0.0, 0.0])
    monkeypatch.delattr(Mask2FormerMaskPredictor, "allowed_positions")
    model.save_pretrained(tmp_path / "after")
    with torch.no_grad():
        expected = without(pixels).masks_queries_logits
        for same in (model, kind.from_pretrained(tmp_path / "after")):
            assert torch.equal(same(pixels).masks_queries_logits, expected)
        model.model.transformer_module.train()
        assert torch.equal(model(pixels).masks_queries_logits, expected)


def test_a_compiled_decoder_is_not_made_anew_for_every_share():
    decoder = tiny_model("resnet", decoder_layers=2).train().model.transformer_module.decoder
    states, cells, features = torch.randn(2, 10, 32), torch.randn(2, 16, 32), torch.randn(2, 24, 16)
    graphs, made = [], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(decoder, backend=count)
    for share in (1, 0.75, 0.5, 0.25, 0):
        decoder.anneal([share])
        compiled(states, states, [cells], [cells[0]], [features], False)
        made.append(len(graphs))
    torch._dynamo.reset()
    assert made == [1, 2, 2, 2, 3], "one with masks, one with some, one without"


@pytest.mark.parametrize("part", ["a layer of torch", "the model without its head"])
def test_what_cannot_be_annealed_as_a_whole_is_refused(part):
    model = nn.Linear(2, 2) if part == "a layer of torch" else tiny_model("resnet").model
    with pytest.raises(ValueError, match="without a masked decoder of this package under a head: give the whole"):
        anneal_masks(model, [0.5])


def test_a_run_ends_without_masks_whatever_was_best_before_and_resumes_exactly(tmp_path):
    given = {"data": "scenes", "train_limit": 4, "val_limit": 2, "backbone": "tiny", "crop": 64, "steps": 4}
    given |= {"batch_size": 2, "eval_every": 1, "keep": 9, "cpu": True, "anneal_masks": [0.1, 0.75]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = TrainingRun(TrainingSettings(output=whole, **given))
    run.train()
    configs = [json.loads((whole / f"checkpoint-{step}" / "config.json").read_text()) for step in range(1, 5)]
    assert [config.get("masked_attention") for config in configs] == [None, None, False, False]
    assert json.loads((whole / "config.json").read_text())["masked_attention"] is False
    assert run.trainer.state.best_global_step in (3, 4)
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    shutil.copy(whole / "settings.json", parts)
    TrainingRun(TrainingSettings(output=parts, resume=True, **given)).train()
    ends = [load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
