"""The compared designs and ablations: each is another network that trains, is kept and is served like the paper's.

Equality with the original is in `tests/conversion/test_designs.py`.
"""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, needs_golden, random_targets, relative_difference, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from transformers import pipeline

from mask2former_hf import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Segmenter,
    export_model,
    new_model,
    register,
)
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate
from mask2former_hf.hub.model_card import write_model_card
from mask2former_hf.hub.registration import unregister
from mask2former_hf.model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from mask2former_hf.training.collation import SegmentationCollator
from mask2former_hf.training.label_surgery import resize_queries, set_labels

STANDARD = {"pixel_decoder_type": "fpn", "decoder_type": "standard"}
DESIGNS = {
    "fpn": {"pixel_decoder_type": "fpn"},
    "transformer_fpn": {"pixel_decoder_type": "transformer_fpn"},
    "standard": STANDARD | {"memory_encoder_layers": 1},
    "per_pixel": {"pixel_decoder_type": "fpn", "head_type": "per_pixel", "num_queries": 5},
    "per_pixel_plus": STANDARD | {"head_type": "per_pixel_plus", "num_queries": 5},
    "unmasked": {"masked_attention": False},
    "one_level": {"attended_stride": 16},
    "self_attention_first": {"self_attention_first": True},
    "no_query_features": {"learned_query_features": False},
}
PER_PIXEL = ("per_pixel", "per_pixel_plus")
PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=DESIGNS)
def design(request):
    return request.param


@pytest.fixture(scope="module")
def model(design):
    return tiny_model("resnet", **DESIGNS[design])


@pytest.fixture(scope="module", params=PER_PIXEL)
def classifier(request, tmp_path_factory):
    """A model that classifies pixels, and its folder."""
    folder = tmp_path_factory.mktemp("classifier")
    model, processor = tiny_model("resnet", **DESIGNS[request.param]), small_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, folder


def small_processor():
    return Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def photo(size=(60, 90)):
    return np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)


def loss_of(model, pixels=PIXELS, **more):
    masks, labels = random_targets([3, 2], pixels.shape[-2:])
    return model(
        pixels, mask_labels=masks, class_labels=labels, generator=torch.Generator().manual_seed(0), **more
    ).loss


# --- all of them -----------------------------------------------------------------------------------------------------


def test_every_parameter_learns(model):
    model.train()
    loss_of(model).backward()
    model.eval()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    model.zero_grad()
    first_values = "decoder.layers.0.self_attn.v_proj"  # of queries that are all zero
    assert [name for name in lost if first_values not in name and "out_proj.weight" not in name] == []


def test_a_saved_model_is_the_same_and_names_only_what_it_uses(model, design, tmp_path):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    usual = set(json.loads(tiny_config("resnet").to_json_string(use_diff=False)))
    assert set(written) - usual <= set(DESIGNS[design]) | {"architectures", "dtype", "transformers_version"}
    again, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        ours, theirs = model(PIXELS), again.eval()(PIXELS)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)


@pytest.mark.parametrize("name", ["transformer_fpn", "per_pixel_plus"])
def test_its_graph_is_the_checkpoint(name, tmp_path):
    """Which `export_model` measures, results included. Between them these trace every part that is new."""
    pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
    task = "semantic" if name in PER_PIXEL else "panoptic"
    small = {"encoder_layers": 1, "decoder_layers": 2}
    export_model(tiny_model("resnet", **small, **DESIGNS[name]), small_processor(), tmp_path / "graph", task=task)
    assert (tmp_path / "graph" / "model.onnx").is_file()


def test_graphs_of_a_head_per_pixel_are_semantic_if_no_task_is_asked_for(tmp_path):
    pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
    model = tiny_model("resnet", encoder_layers=1, decoder_layers=2, **DESIGNS["per_pixel"])
    export_model(model, small_processor(), tmp_path / "graph")
    assert sorted(path.name for path in (tmp_path / "graph").glob("*.onnx")) == ["model.onnx", "semantic.onnx"]


def test_stock_transformers_is_not_said_to_have_it(model, design, tmp_path):
    card = write_model_card(model, tmp_path).read_text()
    field, value = next(iter(DESIGNS[design].items()))
    assert "With transformers alone" not in card and f"{field}={value!r}" in card
    assert "With transformers alone" in write_model_card(tiny_model("resnet"), tmp_path).read_text()


def test_results_do_not_depend_on_batch_mates(model):
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, 32:], mask[1, :, 50:] = 0, 0
    pixels = PIXELS * mask.unsqueeze(1)
    with torch.no_grad():
        both = model(pixels, pixel_mask=mask)
        alone = model(pixels[1:, :, :32, :64], pixel_mask=mask[1:, :32, :64])
    assert relative_difference(both.masks_queries_logits[1:, :, :8, :16], alone.masks_queries_logits) < 1e-5


# --- which go together -----------------------------------------------------------------------------------------------

PIXEL_DECODERS = {
    "MSDeformAttnPixelDecoder": "deformable",
    "BasePixelDecoder": "fpn",
    "TransformerEncoderPixelDecoder": "transformer_fpn",
}
DECODERS = {"MultiScaleMaskedTransformerDecoder": "masked", "StandardTransformerDecoder": "standard", None: "masked"}
HEADS = {
    "MaskFormerHead": "masks",
    "PerPixelBaselineHead": "per_pixel",
    "PerPixelBaselinePlusHead": "per_pixel_plus",
}


@needs_golden
def test_combinations_are_refused_that_the_original_cannot_run():
    """The masked decoder's only input has no name here, so a default is what it takes."""
    tried = json.loads((GOLDEN / "compared_designs" / "combinations.json").read_text())["combinations"]
    assert sum(row["runs"] for row in tried) == 22
    for row in tried:
        decoder, source = DECODERS[row["transformer_decoder"]], row["in_feature"]
        if decoder == "masked" and source == "res5":
            continue
        fields = {
            "pixel_decoder_type": PIXEL_DECODERS[row["pixel_decoder"]],
            "decoder_type": decoder,
            "head_type": HEADS[row["head"]],
        }
        fields |= {"num_queries": 5} if fields["head_type"] != "masks" else {}
        default = decoder == "masked" and source in (None, "multi_scale_pixel_decoder")
        fields |= {} if default else {"transformer_in_feature": source}
        try:
            tiny_config("resnet", **fields)
            built = True
        except (ValueError, StrictDataclassError):
            built = False
        assert built == row["runs"], row


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decoder_type": "standard", "masked_attention": False}, "masked_attention=False: must be left out"),
        ({"memory_encoder_layers": 2}, "memory_encoder_layers=2: must be left out with decoder_type='masked'"),
        (STANDARD | {"transformer_in_feature": "transformer_encoder"}, "'fpn' has no encoder"),
        ({"head_type": "per_pixel"}, "num_queries=10: must be num_labels=5"),
        ({"head_type": "per_pixel", "num_queries": 5, "task": "panoptic"}, "task='panoptic': must be 'semantic'"),
        ({"head_type": "per_pixel_plus", "num_queries": 5}, "decoder_type='masked': must be 'standard'"),
        ({"head_type": "per_pixel", "num_queries": 5, "loss_on": "masks"}, "loss_on='masks': must be left out"),
        ({"pixel_decoder_type": "fpn", "common_stride": 8}, "common_stride=8: must be 4"),
        ({"pixel_decoder_type": "fapn"}, "pixel_decoder_type='fapn': must be one of deformable, fpn"),
        ({"attended_stride": 4}, "attended_stride=4: must be one of 32, 16, 8"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_rule(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config("resnet", **fields)


def test_clips_have_the_masked_decoder_alone():
    with pytest.raises(ValueError, match="decoder_type='standard': .*leave it out"):
        Mask2FormerForVideoSegmentation(tiny_config("resnet", decoder_type="standard"))


# --- ablations of the masked decoder ---------------------------------------------------------------------------------


def cross_attentions(**fields):
    with torch.no_grad():
        return tiny_model("resnet", **fields)(PIXELS, output_attentions=True).cross_attentions


def test_without_masks_every_query_sees_every_cell():
    assert any((weights == 0).any() for weights in cross_attentions())
    assert all((weights > 0).all() for weights in cross_attentions(masked_attention=False))


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_one_level_is_attended_to_by_all_layers(stride):
    cells = 64 * 96 // stride**2
    assert [weights.shape[-1] for weights in cross_attentions(attended_stride=stride)] == [cells] * 3


def test_the_order_of_attentions_is_the_only_difference():
    """With a self-attention that adds nothing, order does not matter; with one that does, it does."""
    usual = {"masked_attention": False, "pre_norm": True}
    models = [tiny_model("resnet", self_attention_first=first, **usual) for first in (False, True)]
    with torch.no_grad():
        outputs = [model(PIXELS).masks_queries_logits for model in models]
        assert relative_difference(*outputs) > 1e-3
        for model in models:
            for layer in model.model.transformer_module.decoder.layers:
                layer.self_attn.out_proj.weight.zero_()
                layer.self_attn.out_proj.bias.zero_()
        assert torch.equal(*(model(PIXELS).masks_queries_logits for model in models))


def test_query_features_that_are_not_learned_are_zeros():
    learned, zeros = tiny_model("resnet"), tiny_model("resnet", learned_query_features=False)
    learned.model.transformer_module.queries_features.weight.data.zero_()
    zeros.load_state_dict(learned.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(learned(PIXELS).masks_queries_logits, zeros(PIXELS).masks_queries_logits)
        assert resize_queries(zeros, 12)(PIXELS).masks_queries_logits.shape[1] == 12


def test_matching_and_loss_on_whole_masks_are_the_formulas_on_every_cell():
    """Cross-entropy and dice of every cell of the logits, with targets that are whole cells."""
    model = tiny_model("resnet", matching_on="masks", loss_on="masks", use_auxiliary_loss=False)
    coarse, labels = torch.zeros(3, 16, 24), torch.tensor([1, 4, 0])
    coarse[0, 2:9, 3:12], coarse[1, 8:16, 10:20], coarse[2, :, 20:] = 1, 1, 1
    masks = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    with torch.no_grad():
        output = model(PIXELS[:1], mask_labels=[masks.bool()], class_labels=[labels], output_auxiliary_logits=True)
    logits, targets = output.masks_queries_logits[0].flatten(1), coarse.flatten(1)
    shape = len(logits), len(targets), -1
    pairs = logits.unsqueeze(1).expand(*shape), targets.unsqueeze(0).expand(*shape)
    entropy = F.binary_cross_entropy_with_logits(*pairs, reduction="none").mean(-1)
    p = pairs[0].sigmoid()
    dice = 1 - (2 * (p * pairs[1]).sum(-1) + 1) / (p.sum(-1) + pairs[1].sum(-1) + 1)
    cost = 5 * entropy + 5 * dice - 2 * output.class_queries_logits[0].softmax(-1)[:, labels]
    matched = linear_sum_assignment(cost.numpy())
    terms = output.loss_dict
    assert terms["loss_mask"].item() == pytest.approx(5 * entropy[matched].mean().item(), rel=1e-5)
    assert terms["loss_dice"].item() == pytest.approx(5 * dice[matched].mean().item(), rel=1e-5)


# --- heads that classify pixels --------------------------------------------------------------------------------------


def test_the_loss_of_pixels_is_cross_entropy_and_0_where_nothing_is_known(classifier):
    model, _ = classifier
    labels = torch.full((64, 96), -100)
    labels[:40, :50], labels[30:, 20:] = 3, 1  # the second hides a part of the first
    labels[:5] = -100
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, :40, :50], masks[1, 30:, 20:] = 1, 1
    ignored = torch.zeros(64, 96, dtype=torch.uint8)
    ignored[:5] = 1
    targets = {"mask_labels": [masks], "class_labels": [torch.tensor([3, 1])], "ignore_masks": [ignored]}
    with torch.no_grad():
        output = model(PIXELS[:1], output_auxiliary_logits=True, **targets)
        maps = F.interpolate(output.masks_queries_logits, (64, 96), mode="bilinear")
        expected = model.config.class_weight * F.cross_entropy(maps, labels[None])
        assert output.loss_dict["loss_cross_entropy"][-1].item() == pytest.approx(expected.item(), rel=1e-5)
        whole = model.criterion.normalizers([targets | {"pixel_values": PIXELS[:1]}], 5)
        assert model(PIXELS[:1], normalizers=whole, **targets).loss.item() == pytest.approx(output.loss.item())
        empty = {"mask_labels": [masks[:0]], "class_labels": [torch.zeros(0, dtype=torch.long)]}
        assert model(PIXELS[:1], **empty).loss.item() == 0


def test_every_door_gives_the_best_class_of_every_pixel(classifier):
    model, folder = classifier
    processor, image = small_processor(), photo()
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
        canvas = F.interpolate(output.masks_queries_logits, tuple(inputs["pixel_values"].shape[-2:]), mode="bilinear")
    height, width = output.image_sizes[0].tolist()
    logits = F.interpolate(canvas[..., :height, :width], image.shape[:2], mode="bilinear")
    expected = logits[0].argmax(0)
    assert len(expected.unique()) > 1
    direct = processor.post_process_semantic_segmentation(output, target_sizes=[image.shape[:2]])[0]
    segmentation = Segmenter(folder, device="cpu")(image)
    assert torch.equal(direct, expected) and segmentation.task == "semantic"
    for segment, mask in zip(segmentation.segments, segmentation.masks, strict=True):
        assert (torch.from_numpy(np.asarray(mask)) == (expected == segment.label_id)).all()
    register()
    try:
        found = pipeline("image-segmentation", model=str(folder))(Image.fromarray(image))
    finally:
        unregister()
    assert {row["label"] for row in found} == {f"LABEL_{label}" for label in expected.unique().tolist()}


def test_other_results_are_refused_at_every_door(classifier):
    model, folder = classifier
    processor = small_processor()
    with torch.no_grad():
        output = model(PIXELS)
    for name in ("panoptic", "instance"):
        with pytest.raises(ValueError, match="classifies pixels"):
            getattr(processor, f"post_process_{name}_segmentation")(output)
        with pytest.raises(ValueError, match=f"task='{name}'.*classifies pixels"):
            Segmenter(folder, task=name, device="cpu")
    with pytest.raises(ValueError, match="make a new model"):
        resize_queries(model, 7)
    with pytest.raises(ValueError, match="make a new model"):
        set_labels(model, ["a", "b"])


def test_a_new_classifier_of_scenes_learns_and_is_measured():
    scenes = ScenesDataset(8, size=64)
    torch.manual_seed(0)
    model = new_model(
        "tiny", scenes.classes, "semantic", **{**DESIGNS["per_pixel"], "num_queries": len(scenes.classes)}
    )
    processor = Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    batch, losses = SegmentationCollator(processor)(list(scenes)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(8):
        loss = model.train()(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert evaluate(model.eval(), processor, scenes, progress=False)["miou"]["mIoU"] > 0.1


def test_the_paper_s_own_config_says_nothing_of_designs():
    assert not set(Mask2FormerConfig().to_dict()) & {"pixel_decoder_type", "decoder_type", "head_type", "loss_on"}
