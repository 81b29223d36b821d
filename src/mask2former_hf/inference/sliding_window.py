"""Semantic scores by a sliding window, as DINOv3's segmentor is tested.

The windows of an image overlap, and a pixel's scores are the mean over the windows that see it. A checkpoint says so
in its config: `sliding_window = {"side": 896, "stride": 596}`, in pixels of the resized image.
Letters: K classes, (H, W) the resized image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.canvas import image_sizes_of
from ..model.postprocessing import logits_per_image, semantic_scores

FACTORS = (
    0.9,
    0.95,
    1.0,
    1.05,
    1.1,
)  # of the test size: the passes of Meta's test-time augmentation, each mirrored too
PASS_DIVISOR = 32  # a pass below the test size is rounded up to it


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Where the windows begin along an image's side; the last one ends with the image."""
    if length <= side:
        return [0]
    return [min(start, length - side) for start in range(0, length - side + stride, stride)]


def windows_of(size: tuple[int, int], side: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of the windows of an image, row by row.

    A side that is shorter than the window is used whole; if both are, the windows are squares of the shorter one.
    """
    if max(size) < side:
        side = min(size)
    height, width = (min(side, length) for length in size)
    return [
        (top, top + height, left, left + width)
        for top in window_starts(size[0], side, stride)
        for left in window_starts(size[1], side, stride)
    ]


@torch.inference_mode()
def window_scores(model, pixel_values: Tensor, side: int, stride: int) -> Tensor:
    """(K, H, W) mean over the windows of the score of every class at every pixel of (1, 3, H, W)."""
    size = tuple(pixel_values.shape[-2:])
    total = counts = None
    for top, bottom, left, right in windows_of(size, side, stride):
        outputs = model(pixel_values[..., top:bottom, left:right])
        scores = semantic_scores(*next(logits_per_image(outputs, [(bottom - top, right - left)])))
        if total is None:
            total, counts = scores.new_zeros(len(scores), *size), scores.new_zeros(size)
        total[:, top:bottom, left:right] += scores
        counts[top:bottom, left:right] += 1
    return total.div_(counts)


@torch.inference_mode()
def sliding_scores(model, processor, image, target_size: tuple[int, int], window: dict, tta: bool = False) -> Tensor:
    """Score of every class at every pixel of one image.

    Args:
        image: as the processor takes it.
        target_size: (height, width) of the result.
        window: `side` and `stride`.
        tta: mean of ten passes, the sizes of `FACTORS` as they are and mirrored, each after a softmax over its scores,
            as there.

    Returns:
        (K, height, width) float32.
    """
    if not tta:
        return _pass(model, processor, image, target_size, window, 1.0, False)
    total = 0
    for factor in FACTORS:
        for mirrored in (False, True):
            total = total + _pass(model, processor, image, target_size, window, factor, mirrored).softmax(0)
    return total / (2 * len(FACTORS))


def _pass(model, processor, image, target_size, window: dict, factor: float, mirrored: bool) -> Tensor:
    size = pass_size(processor.size, factor)
    inputs = processor([image], size=size, return_tensors="pt").to(model.device)
    ((height, width),) = image_sizes_of(inputs["pixel_mask"])
    pixels = inputs["pixel_values"][..., :height, :width]
    scores = window_scores(model, pixels.flip(-1) if mirrored else pixels, **window)
    scores = F.interpolate(scores[None], size=target_size, mode="bilinear", align_corners=False)[0]
    return scores.flip(-1) if mirrored else scores


def pass_size(size, factor: float) -> dict[str, int]:
    """A processor's size for a pass: its shorter side times the factor, below 1 rounded up to a multiple of 32."""
    lengths = dict(size)
    shortest = int(lengths["shortest_edge"] * factor)
    if factor < 1:
        shortest = -(-shortest // PASS_DIVISOR) * PASS_DIVISOR
    return {**lengths, "shortest_edge": shortest}
