"""Mask logits at the size of a result: a few queries, or a few rows, at a time, so that memory stays bounded.

Letters: `Q` queries; sizes are (rows, columns) in pixels and mean what they do in postprocessing.py.
"""

import reprlib

import numpy as np
import torch
from torch.nn import functional as F

from .cpu_layout import chunk_length

LARGEST_SIDE = 2**20  # pixels: no image is larger, and a number by mistake fills the memory


def resize_mask_logits(mask_logits, canvas_size, image_size=None, target_size=None):
    """Bring mask logits to the size of the result: up to the canvas, crop the padding, resize to the target.

    Cropping before the last resize is what keeps an object's place and size when images were padded to batch.
    Both resizes are bilinear with align_corners=False; a resize to the same size is skipped.

    Returns:
        (Q, H, W) float32 logits.
    """
    canvas_size, image_size, target_size = check_sizes(canvas_size, image_size, target_size)
    logits = _resize(mask_logits.float(), canvas_size)[:, : image_size[0], : image_size[1]]
    return _resize(logits, target_size)


def check_sizes(canvas_size, image_size, target_size):
    image_size = canvas_size if image_size is None else image_size
    target_size = image_size if target_size is None else target_size
    given = {"canvas_size": canvas_size, "image_size": image_size, "target_size": target_size}
    canvas_size, image_size, target_size = (_check_size(name, size) for name, size in given.items())
    if image_size[0] > canvas_size[0] or image_size[1] > canvas_size[1]:
        raise ValueError(f"image_size={image_size} must fit into canvas_size={canvas_size}; are the two swapped?")
    return canvas_size, image_size, target_size


def _check_size(name, size):
    try:
        sides = tuple(int(side) for side in size)
        whole = all(side == given for side, given in zip(sides, size, strict=True))
    except (TypeError, ValueError, OverflowError):
        sides, whole = (), False
    if not whole or len(sides) != 2 or not 1 <= min(sides) <= max(sides) <= LARGEST_SIDE:
        raise ValueError(
            f"{name}={reprlib.repr(size)} must be two positive numbers (rows, columns), whole, up to {LARGEST_SIDE}."
        )
    return sides


def _resize(maps, size):
    if maps.shape[-2:] == torch.Size(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def query_chunks(mask_logits, canvas_size, image_size, target_size):
    """Yield (first query, its and its followers' resized logits), as many queries as a chunk holds."""
    pixels = max(canvas_size[0] * canvas_size[1], target_size[0] * target_size[1])
    step = chunk_length(pixels, mask_logits.device)
    for start in range(0, len(mask_logits), step):
        yield start, resize_mask_logits(mask_logits[start : start + step], canvas_size, image_size, target_size)


def resize_rows(maps, size, start, stop, first=0, height=None):
    """Rows [start, stop) of `_resize(full, size)`, where maps (C, rows, w) holds full's rows from `first` on.

    height is full's; None when maps is all of it. Columns go through F.interpolate, rows are blended here, in the
    order in which F.interpolate blends them, so the two agree to float32 rounding.
    """
    height = height or maps.shape[1]
    if (height, maps.shape[2]) == size:
        return maps[:, start - first : stop - first]
    if maps.shape[1] == height and stop - start == size[0]:
        return _resize(maps, size)
    upper, lower, weight = source_rows(height, size[0], start, stop)
    top, bottom = int(upper[0]), int(lower[-1]) + 1
    wide = _resize(maps[:, top - first : bottom - first], (bottom - top, size[1]))
    upper, lower, weight = (upper - top).to(maps.device), (lower - top).to(maps.device), weight.to(maps.device)
    return wide[:, upper].mul_(1 - weight).addcmul_(wide[:, lower], weight)


def source_rows(height, out_height, start, stop):
    """Row above, row below and the lower one's share (rows, 1) of each output row in an align_corners=False resize."""
    scale = np.float64(np.float32(height) / np.float32(out_height))  # F.interpolate's scale is a float32
    source = torch.from_numpy(np.maximum((np.arange(start, stop) + 0.5) * scale - 0.5, 0).astype(np.float32))
    upper = source.long().clamp(max=height - 1)
    return upper, (upper + 1).clamp(max=height - 1), (source - upper).clamp(0, 1)[:, None]
