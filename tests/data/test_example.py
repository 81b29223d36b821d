"""The type of an example: what it refuses, what it computes, and how foreign examples become one."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from mask2former_hf.data.example import Example

H, W = 12, 20


def overlapping():
    """A box 1, a box 2 over it, and a crowd 7 without a pixel, on two layers."""
    ids = np.full((2, H, W), -1, dtype=np.int32)
    ids[0, 2:8, 2:8] = 1
    ids[1, 4:10, 4:16] = 2
    segments = [
        {"id": 2, "category_id": 0, "area": 72, "bbox": [4, 4, 12, 6]},
        {"id": 1, "category_id": 3},
        {"id": 7, "category_id": 3, "iscrowd": 1},
    ]
    return Example(np.zeros((H, W, 3), np.uint8), ids, segments, image_id="a", file_name="x/a.png")


def test_masks_are_in_the_order_of_the_segments_and_complete_where_they_overlap():
    example = overlapping()
    masks = example.masks()
    assert masks.dtype == bool and masks.sum((1, 2)).tolist() == [72, 36, 0]
    assert (masks[0] & masks[1]).sum() == 16
    buffer = np.zeros((2, H + 3, W), dtype=bool)
    example.masks(example.objects, out=buffer[:, :H])
    assert (buffer[:, :H] == masks[:2]).all() and not buffer[:, H:].any()
    single = dataclasses.replace(example, segmentation=example.layers[1], segments=example.segments[:1])
    assert len(single.layers) == 1 and (single.masks() == masks[:1]).all()


def test_objects_crowds_and_void():
    example = overlapping()
    assert [s["id"] for s in example.objects] == [2, 1] and [s["id"] for s in example.crowds] == [7]
    assert not example.void().any()
    example.segmentation[0, 0] = 0
    assert not example.void().any()  # the other layer says background
    example.segmentation[1, 0, :5] = 0
    assert example.void().sum() == 5


def test_an_example_travels_as_its_arrays_and_no_more():
    example = overlapping()
    example.masks(), example.void()
    packed = pickle.dumps(example, protocol=5)
    assert len(packed) < example.image.nbytes + example.segmentation.nbytes + 1000
    copy = pickle.loads(packed)
    assert (copy.layers == example.layers).all() and copy.segments == example.segments and copy.name == "x/a.png"


def test_a_new_geometry_leaves_no_stale_areas_and_the_old_example_as_it_was():
    example = overlapping()
    moved = example.moved(None, example.segmentation[..., ::-1])
    assert moved.segments[0] == {"id": 2, "category_id": 0} and example.segments[0]["area"] == 72
    assert moved.image is None and moved.image_id == "a"
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.image = None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": np.zeros((8, 8, 3))}, "image of a.png is float64"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"shape \(8, 8\).*\(H, W, 3\)"),
        ({"image": Image.new("RGB", (8, 8))}, "image of a.png is Image"),
        ({"segmentation": np.zeros((72, 96), np.int64)}, "segmentation of a.png is int64"),
        ({"segmentation": np.zeros((72, 95), np.int32)}, "a.png: the image is 72 x 96 .* its annotation 72 x 95"),
        ({"image": np.zeros((0, 5, 3), np.uint8), "segmentation": np.zeros((0, 5), np.int32)}, "an image has pixels"),
        ({"segments": [{"id": 1}]}, "a segment of a.png has no category_id"),
        ({"segments": [{"id": 1, "category_id": 1.5}]}, "has category_id=1.5: it must be a whole number"),
        ({"segments": [{"id": "1", "category_id": 1}]}, "has id='1': it must be a whole number"),
        ({"segments": [{"id": 1, "category_id": -1}]}, "category_id=-1: it is the index of a class"),
        ({"segments": [{"id": 4, "category_id": 0}] * 2}, r"a.png has the segment ids \[4\] twice"),
        ({"segments": [{"id": 0, "category_id": 0}]}, "a.png has the segment id 0: ids are 1 or more"),
    ],
)
def test_bad_examples_are_refused(change, message):
    good = {"image": np.zeros((72, 96, 3), np.uint8), "segmentation": np.zeros((72, 96), np.int32), "segments": []}
    with pytest.raises(ValueError, match=message):
        Example(**good | change, file_name="a.png")


@pytest.mark.parametrize("convert", [np.asarray, Image.fromarray, torch.from_numpy, np.ndarray.tolist])
def test_an_example_of_a_mapping_with_pixels_of_any_kind(convert):
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    ids = np.ones((H, W), dtype=np.uint8)
    found = Example.of(
        {"image": convert(pixels), "segmentation": convert(ids), "segments_info": [{"id": 1, "category_id": 5}]}
        | {"image_id": 7, "weather": "rain"}
    )
    assert (found.image == pixels).all() and found.segmentation.dtype == np.int32 and found.name == "image 7"
    assert Example.of(found) is found


@pytest.mark.parametrize(
    "given, error, message",
    [
        ([1, 2], TypeError, "an example is a list"),
        ({"image": 0}, ValueError, "an example has image but no segmentation, segments_info"),
        ({"segmentation": np.zeros((2, 2)), "segments_info": []}, ValueError, "float64 .* must be whole numbers"),
        ({"segmentation": np.full((2, 2), 2**40), "segments_info": []}, ValueError, "fit 32 bits"),
    ],
)
def test_what_is_no_example_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        Example.of(given)
