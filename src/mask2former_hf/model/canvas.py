"""Where an image lies in its batch: sizes, canvases, images of equal canvas run together, padding taken off again.

An image is at the top left of its canvas, its own size rounded up to `SIZE_DIVISOR`, and the canvas at the top left of
the batch's tensor. Letters: B batch, H and W of the batch's tensor, (height, width) of an image or a canvas.
"""

import torch
from torch import Tensor

from .transfers import to_device

SIZE_DIVISOR = 32  # an image's canvas is its size rounded up to this
PADDING_LOGIT = -100.0  # mask logit outside an image's canvas: certainly not part of any segment


def image_extents(pixel_mask: Tensor) -> Tensor:
    """(B, 3) int64: height, width and number of pixels of what a (B, H, W) mask marks."""
    mask = pixel_mask != 0
    H, W = mask.shape[1:]
    rows = (mask.any(2) * torch.arange(1, H + 1, device=mask.device)).amax(1)
    columns = (mask.any(1) * torch.arange(1, W + 1, device=mask.device)).amax(1)
    return torch.stack((rows, columns, mask.sum((1, 2))), dim=1)


def image_sizes_of(pixel_mask: Tensor) -> list[tuple[int, int]]:
    """(height, width) of each image in a (B, H, W) mask that is nonzero on it; one copy to the host.

    Raises:
        ValueError: if an image is not one rectangle at the top left.
    """
    sizes = image_extents(pixel_mask).tolist()
    for image, (height, width, area) in enumerate(sizes):
        if area == 0 or area != height * width:
            raise ValueError(
                f"pixel_mask[{image}] marks {area} pixels within {height}x{width}: it must be 1 on the image, one "
                "rectangle that starts at the top left, and 0 on the padding (Mask2FormerImageProcessor makes it)"
            )
    return [(height, width) for height, width, _ in sizes]


def canvas_of(size: tuple[int, int]) -> tuple[int, int]:
    """Input size on which an image's result is defined: its own, rounded up to the size divisor."""
    return tuple(-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)


def crop_to_canvas(maps: Tensor, canvas_size: tuple[int, int], stride: int) -> Tensor:
    """Take the batch's padding off one image's maps, a view.

    Args:
        maps: (..., h, w), such as mask logits, of the batch's whole tensor.
        canvas_size: (height, width) of the image's canvas in pixels.
        stride: pixels per cell of the maps; `config.common_stride` for mask logits and mask features.
    """
    height, width = (-(-side // stride) for side in canvas_size)
    return maps[..., :height, :width]


def merge_groups(parts: list, groups: list[list[int]], fill: float = 0.0):
    """Put the results of groups of images back in batch order; smaller maps are filled up to the largest."""
    if parts[0] is None:
        return None
    if not isinstance(parts[0], Tensor):
        return tuple(merge_groups(list(column), groups, fill) for column in zip(*parts, strict=True))
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    merged = parts[0].new_full((sum(len(group) for group in groups), *shape), fill)
    for part, group in zip(parts, groups, strict=True):
        merged[(to_device(group, part.device), *(slice(size) for size in part.shape[1:]))] = part
    return merged
