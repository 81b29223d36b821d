"""Masks as runs of pixels: every operation is that of the dense masks."""

import numpy as np
import pytest

from mask2former_hf.data.rle import coco_code
from mask2former_hf.data.runs import NOTHING, Runs, joined, paint, runs_of_map, visible
from mask2former_hf.model.run_lengths import mask_to_rle


def blobs(count, size=(23, 31), seed=0):
    """Rectangles with holes, one of them of whole columns, one of the whole image, one empty."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, size[0] - 3), rng.integers(0, size[1] - 3)
        mask[top : top + rng.integers(2, 15), left : left + rng.integers(2, 20)] = True
        mask &= rng.random(size) < 0.8
    masks[0], masks[1], masks[2] = False, True, False
    masks[2, :, 4:9] = True
    return masks


@pytest.fixture(scope="module")
def masks():
    return blobs(9)


def dense(runs, size=(23, 31)):
    return runs.crop((0, 0, size[1], size[0]))


def test_their_code_is_that_of_the_coco_package(masks):
    pycocotools = pytest.importorskip("pycocotools.mask")
    noise = np.random.default_rng(1).random((40, 23, 31)) < 0.5
    for mask in [*masks, *noise, np.ones((700, 900), bool)]:
        code = coco_code(Runs.of_mask(mask), mask.shape)
        assert code["counts"] == pycocotools.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def test_a_mask_comes_back_with_its_area_and_box(masks):
    for mask in masks:
        runs = Runs.of_mask(mask)
        assert (dense(runs) == mask).all() and runs.area == mask.sum()
        left, top, right, bottom = runs.box
        assert mask[top:bottom, left:right].sum() == mask.sum() and (runs.crop(runs.box)).shape == (
            bottom - top,
            right - left,
        )


def test_counts_are_cocos(masks):
    for mask in masks:
        assert Runs.of_mask(mask).counts((0, 0, 31, 23)).tolist() == mask_to_rle(mask)["counts"]


def test_cutting_and_moving_are_slicing(masks):
    for mask in masks:
        runs = Runs.of_mask(mask)
        assert (runs.crop((5, 3, 20, 17)) == mask[3:17, 5:20]).all()
        assert runs.cut((5, 3, 20, 17)).area == mask[3:17, 5:20].sum()
        assert (runs.moved(4, 2).crop((4, 2, 35, 25)) == mask).all()


def test_overlaps_and_unions_are_those_of_the_dense_masks(masks):
    runs = [Runs.of_mask(mask) for mask in masks]
    for one, first in zip(masks, runs, strict=True):
        for other, second in zip(masks, runs, strict=True):
            assert first.overlap(second) == (one & other).sum()
            assert (dense(joined(first, second)) == (one | other)).all()
    assert (dense(joined(*runs[3:])) == masks[3:].any(0)).all()


def test_of_masks_on_each_other_the_first_is_seen(masks):
    order = [*masks[2:], masks[1], masks[0]]
    expected = np.zeros(masks.shape[1:], dtype=int)
    for number, mask in reversed(list(enumerate(order, start=1))):
        expected[mask] = number
    seen = visible([Runs.of_mask(mask) for mask in order])
    for number, runs in enumerate(seen, start=1):
        assert (dense(runs) == (expected == number)).all()
    assert (paint(masks.shape[1:], seen, range(1, len(seen) + 1)) == expected).all()
    assert visible([]) == [] and visible([NOTHING])[0].area == 0


def test_a_map_and_its_runs_are_the_same():
    ids = np.random.default_rng(1).integers(0, 5, (40, 700)).astype(np.int32)  # more columns than are painted at once
    ids[:, 100:300] = 3
    found = runs_of_map(ids)
    assert list(found) == [1, 2, 3, 4]
    assert (paint(ids.shape, list(found.values()), list(found)) == ids).all()
    assert runs_of_map(np.zeros((4, 4), dtype=int)) == {}


def test_every_third_pixel_is_that_of_the_mask(masks):
    for mask in masks:
        assert (dense(Runs.of_mask(mask).every(3), (8, 11)) == mask[::3, ::3]).all()


def test_a_mask_of_a_huge_image_costs_its_outline():
    runs = Runs.of_mask(np.ones((30, 20), dtype=bool)).moved(99_000, 99_500)
    assert runs.box == (99_000, 99_500, 99_020, 99_530) and len(runs.starts) == 20
    assert runs.counts((0, 0, 100_000, 100_000)).sum() == 10**10
