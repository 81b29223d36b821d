"""Equal to the original in a bare clone: the recorded tensors in tests/golden, whose README says where they come from.

Operator, masked-attention decoder, matching, losses, gradients and final results. Whole networks are compared in the
tests marked `needs_golden`, with records too large for the repository.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BACKBONES, GoldenCase, relative_difference
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.conversion.original import convert_state_dict, restore_state_dict
from mask2former_hf.model.criterion import LossSettings, Mask2FormerLoss
from mask2former_hf.model.deformable_attention import MultiScaleDeformableAttention, multi_scale_deformable_attention
from mask2former_hf.model.matcher import assign
from mask2former_hf.model.postprocessing import (
    instance_segmentation,
    panoptic_segmentation,
    semantic_map,
    semantic_scores,
)

FOLDER = Path(__file__).resolve().parents[1] / "golden"
TERMS = {"loss_cross_entropy": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


def unpacked(bits, width):
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)[..., :width])


def numbered(tensors, case):
    return {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{case}.")}


def test_the_recorded_tensors_stay_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.*")) < 1_000_000


# --- operator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [0, 3, 4], ids=["inside", "outside", "on_the_border"])
def test_operator_and_its_gradients(case):
    golden = numbered(load_file(FOLDER / "operator" / "operator.safetensors"), case)
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [golden[name].requires_grad_() for name in names]
    value, locations, weights = inputs
    shapes = [tuple(shape) for shape in golden["spatial_shapes"].tolist()]
    output = multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(output, golden["output"], rtol=1e-10, atol=1e-12)
    for name, gradient in zip(names, torch.autograd.grad(output, inputs, golden["grad_output"]), strict=True):
        torch.testing.assert_close(gradient, golden[f"grad_{name}"], rtol=1e-8, atol=1e-10, msg=name)


def test_deformable_attention_with_its_projections():
    golden = load_file(FOLDER / "operator" / "module.safetensors")
    module = MultiScaleDeformableAttention(32, 4, 3, 4)
    module.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})
    shapes = [tuple(shape) for shape in golden["spatial_shapes"].tolist()]
    output = module(golden["query"], golden["input_flatten"], golden["reference_points"][0, :, 0], shapes)
    torch.testing.assert_close(output, golden["output"], rtol=1e-5, atol=1e-5)


# --- decoder, matching, losses and gradients -------------------------------------------------------------------------


class DecoderCase(GoldenCase):
    """The original's decoder and criterion behind the recorded output of a pixel decoder, for two images."""

    def __init__(self):
        self.folder = FOLDER / "decoder"
        self.record, inputs = self.json("losses.json"), load_file(self.folder / "inputs.safetensors")
        self.num_layers = len(self.record["unweighted"]) // 3
        self.mask_features = inputs["pixel_decoder.mask_features"]
        self.maps = [inputs[f"pixel_decoder.multi_scale.{level}"] for level in range(3)]
        self.class_labels = [inputs[f"target.{b}.labels"] for b in range(2)]
        self.mask_labels, self.pixel_mask = [], torch.zeros(2, 64, 96, dtype=torch.long)
        for b, (height, width) in enumerate(self.record["image_sizes"]):
            self.mask_labels.append(unpacked(inputs[f"target.{b}.masks_packed"], width))
            self.pixel_mask[b, :height, :width] = 1
        self.outputs = load_file(self.folder / "outputs.safetensors")

    def model(self, dtype=torch.float32):
        """Our model with the original's decoder weights; in place of backbone and pixel decoder the recorded maps."""
        config = Mask2FormerConfig(
            backbone_config=BACKBONES["resnet"](),
            feature_size=64,
            hidden_dim=32,
            mask_feature_size=32,
            num_attention_heads=8,
            dim_feedforward=64,
            encoder_layers=1,
            decoder_layers=self.num_layers,
            pre_norm=True,
            num_queries=12,
            num_labels=11,
            train_num_points=self.record["num_points"],
        )
        model = Mask2FormerForUniversalSegmentation(config).eval()
        missing, unexpected = model.load_state_dict(
            convert_state_dict(load_file(self.folder / "model.safetensors")), strict=False
        )
        assert not unexpected and all(name.startswith("model.pixel_level_module.") for name in missing)
        maps, features = [level.to(dtype) for level in self.maps], self.mask_features.to(dtype)
        model.model.pixel_level_module.forward = lambda pixel_values: ((features,) * 4, features, maps)
        self.replay(model.criterion)
        return model.to(dtype)

    def training_outputs(self, model):
        return model(
            torch.zeros(2, 3, 64, 96),
            pixel_mask=self.pixel_mask,
            mask_labels=self.mask_labels,
            class_labels=self.class_labels,
        )


def test_class_and_mask_logits_of_every_decoder_layer():
    case = DecoderCase()
    with torch.no_grad():
        output = case.model()(torch.zeros(2, 3, 64, 96), output_auxiliary_logits=True)
    pairs = {"pred_logits": output.class_queries_logits, "pred_masks": output.masks_queries_logits}
    for layer, earlier in enumerate(output.auxiliary_logits):
        pairs[f"aux.{layer}.pred_logits"] = earlier["class_queries_logits"]
        pairs[f"aux.{layer}.pred_masks"] = earlier["masks_queries_logits"]
    assert set(pairs) == set(case.outputs)
    for name, ours in pairs.items():
        assert relative_difference(ours, case.outputs[name]) <= 2e-5, name


def test_matching_costs_assignments_and_losses_of_every_layer(monkeypatch):
    case, seen = DecoderCase(), []
    monkeypatch.setattr(
        "mask2former_hf.model.criterion.assign",
        lambda costs, *rest: seen.append((costs, assign(costs, *rest))) or seen[-1][1],
    )
    output, last = case.training_outputs(case.model()), case.num_layers - 1
    costs = load_file(case.folder / "loss_record.safetensors")
    ((ours, assigned),) = seen
    for image, (queries, targets) in enumerate(assigned):
        for layer in range(case.num_layers):
            name = f"{'final' if layer == last else f'aux{layer}'}.image{image}"
            assert relative_difference(ours[image][layer], costs[f"cost.{name}"]) <= 1e-5, name
            recorded = case.record["assignments"][name]
            assert queries[layer].tolist() == recorded["query"] and targets[layer].tolist() == recorded["target"]
    for term, name in TERMS.items():
        for layer, value in enumerate(output.loss_dict[term].tolist()):
            assert value == pytest.approx(case.record["weighted"][name + f"_{layer}" * (layer < last)], rel=1e-5)
    assert output.loss.item() == pytest.approx(case.record["total"], rel=1e-5)


def test_gradients_of_every_parameter_of_the_decoder():
    """In float64: at the kinks of bilinear sampling float32 rounding moves gradients."""
    case = DecoderCase()
    model, golden = case.model(torch.float64), case.json("grad_norms.json")
    case.training_outputs(model).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: gradient.norm().item() for name, gradient in restore_state_dict(gradients, False).items()}
    assert norms == pytest.approx(golden, rel=1e-4)


@pytest.mark.parametrize(
    "case", range(3), ids=["an_image_without_targets", "a_batch_without_targets", "more_targets_than_queries"]
)
def test_losses_at_the_edges(case):
    info = json.loads((FOLDER / "criterion" / "info.json").read_text())
    golden = numbered(load_file(FOLDER / "criterion" / "tensors.safetensors"), case)
    labels = [golden[f"labels.{b}"] for b in range(2)]
    masks = [unpacked(golden[f"masks_packed.{b}"], 64) for b in range(2)]
    matched = [min(7, len(own)) for own in labels]
    draws = {
        "matching": [golden["rand.0"], golden["rand.1"]],
        "candidates": [points.unsqueeze(0) for points in golden["rand.2"].split(matched)],
        "uniform": [points.unsqueeze(0) for points in golden["rand.3"].split(matched)],
    }
    config = Mask2FormerConfig(num_labels=info["num_classes"], train_num_points=info["num_points"])
    criterion = Mask2FormerLoss(LossSettings.from_config(config))
    criterion.draw_points = lambda purpose, image, *rest: draws[purpose][image]
    losses = criterion(golden["pred_logits"].unsqueeze(0), golden["pred_masks"].unsqueeze(0), masks, labels)
    for term, name in TERMS.items():
        assert losses[term].item() == pytest.approx(info["cases"][case]["losses"][name], rel=1e-5, abs=1e-7)


# --- final results ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    """Recorded results, and what every post-processing function starts from: logits and the three sizes."""
    info = json.loads((FOLDER / "postprocessing" / "info.json").read_text())
    tensors = load_file(FOLDER / "postprocessing" / "tensors.safetensors")
    logits = (tensors["pred_logits"], tensors["pred_masks"], info["padded"], info["image"], info["output"])
    return info, tensors, logits


@pytest.mark.parametrize("first", [True, False], ids=["masks_resized_first", "classes_mixed_first"])
def test_semantic_results(results, first):
    _, golden, logits = results
    scores = semantic_scores(*logits, resize_masks_first=first)
    if first:
        torch.testing.assert_close(scores[:, ::4, ::4], golden["sem_stride4"], rtol=1e-5, atol=1e-6)
    best_two = scores.topk(2, dim=0).values
    clear = best_two[0] - best_two[1] > 1e-5
    assert clear.float().mean() > 0.99
    recorded = golden["sem_argmax" if first else "sem_after_argmax"]
    assert (semantic_map(*logits, resize_masks_first=first) == recorded)[clear].all()


def test_panoptic_results_at_five_pairs_of_thresholds(results):
    info, golden, logits = results
    stuff = set(range(info["classes"])) - set(info["thing_ids"])
    for recorded in info["panoptic"]:
        thresholds = {key: recorded[key] for key in ("object_mask_threshold", "overlap_threshold")}
        segmentation, segments = panoptic_segmentation(*logits, **thresholds, stuff_label_ids=stuff)
        name = "panoptic.{object_mask_threshold}_{overlap_threshold}".format(**thresholds)
        assert torch.equal(segmentation.long(), golden[name].long())
        ours = [{"id": s["id"], "isthing": not s["was_fused"], "category_id": s["label_id"]} for s in segments]
        assert ours == recorded["segments_info"]


def test_instance_results(results):
    """As sets, because the original's order is that of an unsorted top-k; the masks of every third instance."""
    info, golden, logits = results
    result = instance_segmentation(*logits, top_k=info["topk"], thing_label_ids=info["thing_ids"])
    scores, labels = (golden[f"instance.things_only.{name}"] for name in ("scores", "classes"))
    height, width = info["output"]
    masks = unpacked(golden["instance.things_only.masks_packed_every_third"], height * width).bool()
    torch.testing.assert_close(result["scores"].sort().values, scores.sort().values, rtol=1e-5, atol=0)
    assert sorted(result["labels"].tolist()) == sorted(labels.tolist())
    for mask, label, score in zip(masks, labels[::3], scores[::3], strict=True):
        same = (result["labels"] == label) & torch.isclose(result["scores"], score, rtol=1e-5, atol=0)
        assert (result["masks"][same].flatten(1) == mask).all(1).any(), f"label {label}, score {score}"
