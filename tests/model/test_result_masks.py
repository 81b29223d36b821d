"""Boxes and run lengths of masks, and the memory that a large result takes."""

import json

import numpy as np
import pytest
import torch
from processes import python

from mask2former_hf.model.postprocessing import (
    masks_to_boxes,
)
from mask2former_hf.model.run_lengths import mask_to_rle, masks_to_coco_rle


def random_masks(seed, count=6, size=(37, 53)):
    rng = np.random.default_rng(seed)
    masks = rng.random((count, *size)) < rng.random((count, 1, 1))
    masks[0], masks[1] = False, True
    masks[2] = False
    masks[2, 5:30, 7:11] = True
    return torch.from_numpy(masks)


def test_boxes_touch_the_outermost_pixels():
    masks = random_masks(0)
    masks[3] = False
    masks[3, 36, 52] = True
    boxes = masks_to_boxes(masks)
    assert boxes[0].tolist() == [0, 0, 0, 0]
    assert boxes[1].tolist() == [0, 0, 53, 37]
    assert boxes[2].tolist() == [7, 5, 11, 30]
    assert boxes[3].tolist() == [52, 36, 53, 37]


@pytest.mark.parametrize("seed", range(5))
def test_run_length_codes_are_the_ones_of_pycocotools(seed):
    coco = pytest.importorskip("pycocotools.mask")
    masks = torch.rand(4, *((1, 53) if seed == 3 else (91, 1))) < 0.5 if seed > 2 else random_masks(seed)
    codes = masks_to_coco_rle(masks)
    reference = coco.encode(np.asfortranarray(masks.numpy().transpose(1, 2, 0).astype(np.uint8)))
    assert [code["counts"] for code in codes] == [code["counts"].decode() for code in reference]
    np.testing.assert_array_equal(coco.decode(codes).transpose(2, 0, 1), masks.numpy())
    height, width = masks.shape[1:]
    for mask, code in zip(masks, json.loads(json.dumps([mask_to_rle(m) for m in masks])), strict=True):
        np.testing.assert_array_equal(coco.decode(coco.frPyObjects(code, height, width)), mask.numpy())
        assert sum(code["counts"]) == height * width


def test_run_lengths_of_a_large_mask_need_many_characters_per_count():
    coco = pytest.importorskip("pycocotools.mask")
    mask = torch.zeros(1, 5000, 4000, dtype=torch.bool)
    mask[0, 17:, 1500:2900] = True
    mask[0, 3, 3999] = True
    np.testing.assert_array_equal(coco.decode(masks_to_coco_rle(mask))[..., 0], mask[0].numpy())


MEMORY = """
import resource, sys, torch
from mask2former_hf.model import postprocessing as p
generator = torch.Generator().manual_seed(0)
classes = torch.randn(100, 134, generator=generator) * 4
masks = torch.nn.functional.interpolate(torch.randn(1, 100, 20, 30, generator=generator), size=(200, 336))[0] * 5
kinds = {
    "semantic_map": lambda *a: p.semantic_map(*a),
    "panoptic_segmentation": lambda *a: p.panoptic_segmentation(*a, object_mask_threshold=0.5, overlap_threshold=0.0),
    "instance_segmentation": lambda *a: p.instance_segmentation(*a)["masks"],
}
function = kinds[sys.argv[1]]
function(classes, masks[:, :4, :4], (16, 16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = 4 if sys.argv[1] == "semantic_map" else 1  # all of it takes 12 s, a band of rows after the other
function(classes, masks, (800, 1344), (750 // parts, 1333), (2160 // parts, 3840))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * parts)
"""


@pytest.mark.parametrize("kind", ["semantic_map", "panoptic_segmentation", "instance_segmentation"])
def test_a_4k_result_with_100_queries_and_133_classes_peaks_below_3_gb(kind):
    pytest.importorskip("resource")
    done = python("-c", MEMORY, kind)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 2e9, f"{int(done.stdout) / 1e6:.2f} GB"
