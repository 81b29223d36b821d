"""Masks of instances at the size of a result: thresholded, with their mean probability and their boxes.

Letters and sizes are those of postprocessing.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .argument_checks import as_tensor
from .mask_resizing import query_chunks
from .mask_windows import MaskWindows
from .panoptic_rules import mask_areas


class Thresholded(NamedTuple):
    """Masks of Q queries."""

    quality: Tensor  # (Q,) mean probability inside the mask
    boxes: Tensor  # (Q, 4), see `masks_to_boxes`
    masks: Callable[[Tensor], Tensor]  # (N,) queries → (N, H, W) bool


def thresholded(mask_logits: Tensor, sizes, threshold: float, decide: Callable | None) -> Thresholded:
    """(Q, h, w) mask logits → masks of what is above a logit, or of what `decide` says of probabilities.

    Args:
        sizes: of the canvas, the image and the result.
    """
    if decide is None and mask_logits.device.type == "cpu":
        return _in_windows(mask_logits, sizes, threshold)
    masks = torch.empty(len(mask_logits), *sizes[2], dtype=torch.bool, device=mask_logits.device)
    quality = torch.empty(len(mask_logits), device=mask_logits.device)
    for start, logits in query_chunks(mask_logits, *sizes):
        chunk = slice(start, start + len(logits))
        probabilities = logits.sigmoid()
        masks[chunk] = hits = logits > threshold if decide is None else decide(probabilities)
        inside = probabilities.mul_(hits).flatten(1).sum(1)
        quality[chunk] = inside / (mask_areas(hits) + 1e-6)
    return Thresholded(quality, masks_to_boxes(masks), lambda queries: masks[queries])


def _in_windows(mask_logits: Tensor, sizes, threshold: float) -> Thresholded:
    """The same, of the pixels alone that a mask can reach; its mean sums them in another order."""
    windows = MaskWindows(mask_logits.shape[1:], *sizes, threshold)
    found, quality, boxes = [], mask_logits.new_zeros(len(mask_logits)), mask_logits.new_zeros(len(mask_logits), 4)
    for query, cells in enumerate(mask_logits):
        (left, top, right, bottom), bands = windows.of(cells)
        hits, inside = torch.empty(bottom - top, right - left, dtype=torch.bool), mask_logits.new_zeros(())
        for start, logits in bands:
            some = torch.gt(logits, threshold, out=hits[start : start + len(logits)])
            inside += logits.sigmoid().mul_(some).sum()
        found.append((hits, slice(top, bottom), slice(left, right)))
        if area := int(hits.count_nonzero()):
            quality[query] = inside / (area + 1e-6)
            boxes[query] = masks_to_boxes(hits[None])[0] + torch.tensor([left, top, left, top])

    def masks(queries: Tensor) -> Tensor:
        # Zeros in pages that nobody has touched. torch writes every one, and NumPy asks for huge ones, whose first use
        # takes four times as long.
        size = len(queries), *sizes[2]
        painted = torch.frombuffer(bytearray(max(1, math.prod(size))), dtype=torch.bool)[: math.prod(size)].view(size)
        for mask, query in zip(painted, queries.tolist(), strict=True):
            hits, rows, columns = found[query]
            mask[rows, columns] = hits
        return painted

    return Thresholded(quality, boxes, masks)


def masks_to_boxes(masks):
    """Tight boxes of (N, H, W) bool masks → (N, 4) float32 (x0, y0, x1, y1); x1, y1 are exclusive, empty is zeros."""
    masks, edges = as_tensor("masks", masks, 3), []
    for used in (masks.any(1).int(), masks.any(2).int()):  # (N, W) columns, (N, H) rows
        first, last = used.argmax(1), used.shape[1] - used.flip(1).argmax(1)
        edges.append(torch.stack([first, last], 1) * used.any(1, keepdim=True))
    return torch.stack(edges, 2).flatten(1).float()  # (N, 4)
