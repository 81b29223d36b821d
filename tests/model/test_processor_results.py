"""The processor's results: crops, sizes, entries and thresholds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil as StockProcessor,
)

from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor


def painted(labels, areas, side=16, classes=4, sizes=None):
    """A model output for one image: queries with a certain class each, masks that are blocks of rows."""
    classes_logits = torch.zeros(1, len(labels), classes + 1)
    classes_logits[0, torch.arange(len(labels)), torch.tensor(labels)] = 9.0
    masks = torch.full((1, len(labels), side, side), -9.0)
    for query, (start, stop) in enumerate(areas):
        masks[0, query, start:stop] = 9.0
    return SimpleNamespace(class_queries_logits=classes_logits, masks_queries_logits=masks, **(sizes or {}))


def test_padding_is_cropped_and_results_come_at_the_target_size():
    outputs = painted([0], [(4, 12)], sizes={
        "image_sizes": torch.tensor([[32, 64]]), "canvas_sizes": torch.tensor([[64, 64]])
    })  # fmt: skip
    outputs.masks_queries_logits = torch.nn.functional.pad(outputs.masks_queries_logits, (0, 9, 0, 3), value=9.0)
    processor = Mask2FormerImageProcessor()
    for target in ((32, 64), [64, 128], torch.tensor([16, 32])):
        result = processor.post_process_panoptic_segmentation(outputs, target_sizes=[target])[0]["segmentation"]
        assert result.shape == tuple(target)
        top = int(target[0]) // 2
        assert (result[top:] == 1).all() and (result[: top - 1] == 0).all()  # rows 16 to 32 of a 32-row image
    assert processor.post_process_semantic_segmentation(outputs)[0].shape == (32, 64)
    assert processor.post_process_instance_segmentation(outputs)[0]["boxes"].tolist() == [[0, 16, 64, 32]]


def test_outputs_of_transformers_are_taken_as_one_whole_image():
    outputs = painted([0, 1], [(0, 8), (8, 16)])
    assert Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)[0].shape == (64, 64)
    target = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs, [(30, 50)])[0]
    assert target.shape == (30, 50) and (target[:15] == 0).all() and (target[15:] == 1).all()


def test_semantic_scores_are_returned_on_request():
    outputs = painted([0, 1], [(0, 8), (8, 16)])
    result = Mask2FormerImageProcessor().post_process_semantic_segmentation(
        outputs, [(30, 50)], return_segmentation_scores=True
    )[0]
    assert result.segmentation_scores.shape == (4, 30, 50)
    assert torch.equal(result.segmentation, result.segmentation_scores.argmax(0))


def test_target_sizes_of_another_length_are_refused():
    outputs = painted([0], [(0, 8)])
    processor = Mask2FormerImageProcessor()
    for method in ("semantic", "instance", "panoptic"):
        with pytest.raises(ValueError, match="target_sizes has 2 entries for 1 images"):
            getattr(processor, f"post_process_{method}_segmentation")(outputs, target_sizes=[(4, 4), (4, 4)])


def test_outputs_of_a_training_step_without_masks_are_refused():
    outputs = painted([0], [(0, 8)])
    outputs.masks_queries_logits = None
    with pytest.raises(ValueError, match="no masks_queries_logits.*output_auxiliary_logits=True"):
        Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)


def test_panoptic_entries_are_unique_and_void_is_zero():
    outputs = painted([0, 1, 0, 2], [(0, 4), (4, 8), (8, 12), (12, 14)])
    result = Mask2FormerImageProcessor().post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})[0]
    assert [(s["id"], s["label_id"], s["was_fused"]) for s in result["segments_info"]] == [
        (1, 0, True),
        (2, 1, False),
        (3, 2, False),
    ]
    assert result["segmentation"].unique().tolist() == [0, 1, 2, 3]
    own = Mask2FormerImageProcessor(label_ids_to_fuse=[0]).post_process_panoptic_segmentation(outputs)[0]
    assert own["segments_info"] == result["segments_info"]


def test_the_default_threshold_is_the_original_one():
    outputs = painted([0], [(0, 8)])
    outputs.class_queries_logits[0, 0] = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05]).log()
    processor = Mask2FormerImageProcessor()
    assert processor.post_process_panoptic_segmentation(outputs)[0]["segments_info"] == []
    assert len(processor.post_process_panoptic_segmentation(outputs, threshold=0.5)[0]["segments_info"]) == 1


def instances(outputs, **kwargs):
    return Mask2FormerImageProcessor().post_process_instance_segmentation(outputs, **kwargs)[0]


def test_instances_have_ids_scores_and_masks_in_one_order():
    outputs = painted([1, 2, 3], [(0, 8), (4, 16), (0, 0)])
    outputs.class_queries_logits[0, 1] *= 2  # the better one
    result = instances(outputs)
    assert [(s["id"], s["label_id"]) for s in result["segments_info"]] == [(0, 2), (1, 1)]
    assert [s["score"] for s in result["segments_info"]] == result["scores"].tolist()
    assert result["labels"].tolist() == [2, 1] and result["boxes"].tolist() == [[0, 16, 64, 64], [0, 0, 64, 32]]
    assert result["masks"].sum(0).max() == 2
    assert (result["segmentation"][16:] == 0).all() and (result["segmentation"][:16] == 1).all()


def test_the_overlap_threshold_drops_hidden_instances():
    outputs = painted([1, 2], [(0, 8), (4, 16)])
    outputs.class_queries_logits[0, 1] *= 2
    counts = [len(instances(outputs, overlap_mask_area_threshold=t)["segments_info"]) for t in (0.0, 0.5, 0.51, 1.0)]
    assert counts == [2, 2, 1, 1]
    dropped = instances(outputs, overlap_mask_area_threshold=0.8)
    assert len(dropped["masks"]) == 1 and dropped["segmentation"].unique().tolist() == [-1, 0]


def test_the_mask_threshold_acts_on_instances():
    outputs = painted([1], [(0, 16)])
    outputs.masks_queries_logits[0, 0] = torch.linspace(-4, 4, 16)[:, None]
    areas = [int(instances(outputs, mask_threshold=t, threshold=0)["masks"].sum()) for t in (0.2, 0.5, 0.8)]
    assert areas == sorted(areas, reverse=True) and len(set(areas)) == 3


def test_coco_annotations_decode_to_the_overlapping_masks():
    coco = pytest.importorskip("pycocotools.mask")
    outputs = painted([1, 2], [(0, 8), (4, 16)])
    result = instances(outputs, return_coco_annotation=True)
    decoded = coco.decode(result["segmentation"]).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, result["masks"].numpy())
    json.dumps(result["segmentation"])
    assert torch.equal(instances(outputs, return_binary_maps=True)["segmentation"], result["masks"])
    with pytest.raises(ValueError, match="both True"):
        instances(outputs, return_coco_annotation=True, return_binary_maps=True)


def test_no_instance_gives_empty_results():
    outputs = painted([4, 4], [(0, 8), (4, 16)])  # "no object"
    result = instances(outputs)
    assert result["segments_info"] == [] and (result["segmentation"] == -1).all()
    assert instances(outputs, return_binary_maps=True)["segmentation"].shape == (0, 64, 64)
    assert instances(outputs, return_coco_annotation=True)["segmentation"] == []


def test_stuff_is_no_instance_when_the_processor_knows_it():
    outputs = painted([0, 1], [(0, 8), (8, 16)])
    processor = Mask2FormerImageProcessor(label_ids_to_fuse=[0])
    assert processor.post_process_instance_segmentation(outputs)[0]["labels"].tolist() == [1]
    assert sorted(instances(outputs)["labels"].tolist()) == [0, 1]


def test_instances_equal_transformers_at_its_own_size():
    # At 384 × 384 without padding its instance path has no defect: same scores, labels and binary maps.
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(1, 12, 5, generator=generator) * 5,
        masks_queries_logits=torch.nn.functional.interpolate(
            torch.randn(1, 12, 6, 6, generator=generator) * 6, size=(96, 96), mode="bilinear"
        ),
    )
    stock = StockProcessor().post_process_instance_segmentation(outputs, threshold=0.1, return_binary_maps=True)[0]
    ours = instances(outputs, threshold=0.1, return_binary_maps=True, top_k=12)
    assert len(stock["segments_info"]) == len(ours["segments_info"]) > 3
    order = sorted(range(len(stock["segments_info"])), key=lambda i: -stock["segments_info"][i]["score"])
    for n, i in enumerate(order):
        assert ours["segments_info"][n]["label_id"] == stock["segments_info"][i]["label_id"]
        assert ours["segments_info"][n]["score"] == pytest.approx(stock["segments_info"][i]["score"], abs=1e-5)
        assert (ours["segmentation"][n] != stock["segmentation"][i].bool()).sum() <= 2


def test_results_do_not_pass_through_384_pixels():
    # Stripes of 4 pixels at 1024: a detour over 384 × 384 mixes them up.
    outputs = painted([0], [(0, 0)], side=256)
    outputs.masks_queries_logits[0, 0, ::2] = 9.0
    result = Mask2FormerImageProcessor().post_process_panoptic_segmentation(outputs, target_sizes=[(1024, 1024)])[0]
    rows = (result["segmentation"] > 0).float().mean(1)
    assert rows.unique().tolist() == [0, 1]
    assert int((rows[1:] != rows[:-1]).sum()) == 255
