"""Canvases: padding off and on again."""

import pytest
import torch

from mask2former_hf.model.canvas import PADDING_LOGIT, canvas_of, crop_to_canvas, merge_groups


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("canvas", [(32, 64), (33, 50), (96, 96)])
def test_crop_gives_the_cells_that_the_canvas_touches(canvas, stride):
    maps = torch.randn(3, 96 // stride, 96 // stride)
    pixels = maps.repeat_interleave(stride, -2).repeat_interleave(stride, -1)
    cropped = crop_to_canvas(maps, canvas, stride)
    assert cropped.data_ptr() == maps.data_ptr()
    restored = cropped.repeat_interleave(stride, -2).repeat_interleave(stride, -1)
    assert torch.equal(restored[:, : canvas[0], : canvas[1]], pixels[:, : canvas[0], : canvas[1]])
    assert all(0 <= side * stride - size < stride for side, size in zip(cropped.shape[1:], canvas, strict=True))


def test_crop_undoes_what_merging_groups_has_padded():
    wide, tall = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 24, 8)
    merged = merge_groups([wide, tall], [[1], [0]], fill=PADDING_LOGIT)
    assert merged.shape == (2, 2, 24, 16)
    assert torch.equal(crop_to_canvas(merged[1], (32, 64), 4), wide[0])
    assert torch.equal(crop_to_canvas(merged[0], canvas_of((90, 31)), 4), tall[0])


def test_groups_of_different_size_are_merged_in_batch_order():
    parts = [torch.ones(2, 1, 2), torch.full((1, 2, 1), 2.0)]
    merged = merge_groups(parts, [[0, 2], [1]], fill=-1)
    assert merged.tolist() == [[[1, 1], [-1, -1]], [[2, -1], [2, -1]], [[1, 1], [-1, -1]]]
