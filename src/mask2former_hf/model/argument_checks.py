"""What the forward and the functions of results ask of tensors: name, value, rule and repair."""

import numpy as np
import torch
from torch import Tensor

from .number_checks import NOT_FINITE


def as_tensor(name, value, ndim=None) -> Tensor:
    """A tensor, or a NumPy array as one: what runtimes without torch return."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor or a NumPy array of numbers.")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have {ndim} dimensions.")
    return value


def check_logits(class_logits: Tensor, mask_logits: Tensor):
    """Refuse logits (..., K + 1) and (..., h, w) of which no probabilities can be made.

    Those of masks are finite. Those of classes may be -inf, of a class that cannot be, unless all of a query are.

    Raises:
        ValueError: naming the logits.
    """
    if class_logits.numel() and not class_logits.amax(-1).isfinite().all():
        raise ValueError(f"class_logits {NOT_FINITE}")
    if mask_logits.numel() and not torch.stack(mask_logits.aminmax()).isfinite().all():
        raise ValueError(f"mask_logits {NOT_FINITE}")


def check_pixels(pixel_values: Tensor, pixel_mask: Tensor | None, channels: int = 3):
    for name, value in (("pixel_values", pixel_values), ("pixel_mask", pixel_mask)):
        if value is not None or name == "pixel_values":
            check_tensor(name, value)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or 0 in pixel_values.shape:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: it must be (batch, {channels}, height, width), none "
            "of them 0 (Mask2FormerImageProcessor makes it)"
        )
    B, _, H, W = pixel_values.shape
    if pixel_mask is not None and pixel_mask.shape != (B, H, W):
        raise ValueError(
            f"pixel_mask has shape {tuple(pixel_mask.shape)}: it must be (batch, height, width) of pixel_values, "
            f"{(B, H, W)}"
        )


def check_tensor(name: str, value):
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}: it must be a tensor, such as torch.as_tensor makes of an array, or "
            'Mask2FormerImageProcessor with return_tensors="pt"'
        )


def check_generator(value):
    if not isinstance(value, torch.Generator | None):
        raise TypeError(
            f"generator is a {type(value).__name__}: it must be a torch.Generator, such as "
            "torch.Generator().manual_seed(0), or None for torch's own"
        )


def check_labels_given(mask_labels, class_labels, ignore_masks):
    if (mask_labels is None) != (class_labels is None):
        given, missing = ("mask_labels", "class_labels") if class_labels is None else ("class_labels", "mask_labels")
        raise ValueError(f"{given} without {missing}: the loss needs both, one entry per image")
    if ignore_masks is not None and mask_labels is None:
        raise ValueError("ignore_masks without mask_labels and class_labels: they only act in the loss")
    for name, value in (("mask_labels", mask_labels), ("class_labels", class_labels), ("ignore_masks", ignore_masks)):
        if not isinstance(value, list | tuple | Tensor | None):
            raise TypeError(f"{name} is a {type(value).__name__}: it must be a list of tensors, one per image")
        for image, entry in enumerate(() if value is None else value):
            check_tensor(f"{name}[{image}]", entry)


def check_mask_sizes(mask_labels: list[Tensor], canvas: tuple[int, int], image_sizes: Tensor):
    if all(tuple(masks.shape[-2:]) == canvas for masks in mask_labels):
        return  # the common case, without a copy of the sizes to the host
    for image, (masks, size) in enumerate(zip(mask_labels, image_sizes.tolist(), strict=False)):
        if tuple(masks.shape[-2:]) not in (canvas, tuple(size)):
            raise ValueError(
                f"mask_labels[{image}] has shape {tuple(masks.shape)}: masks must have the size of pixel_values, "
                f"{canvas[0]}x{canvas[1]}, or of the image by pixel_mask, {size[0]}x{size[1]}"
            )


def check_clips(pixel_values_videos: Tensor, pixel_mask: Tensor | None):
    for name, value in (("pixel_values_videos", pixel_values_videos), ("pixel_mask", pixel_mask)):
        if value is not None or name == "pixel_values_videos":
            check_tensor(name, value)
    shape = tuple(pixel_values_videos.shape)
    if len(shape) != 5 or shape[2] != 3 or 0 in shape:
        raise ValueError(
            f"pixel_values_videos has shape {shape}: it must be (batch, frames, 3, height, width), none of them 0 "
            "(Mask2FormerVideoProcessor makes it)"
        )
    wanted = (shape[0], *shape[3:])
    if pixel_mask is not None and tuple(pixel_mask.shape) != wanted:
        raise ValueError(
            f"pixel_mask has shape {tuple(pixel_mask.shape)}: it must be (batch, height, width) of "
            f"pixel_values_videos, {wanted}: all frames of a clip have one size"
        )


def check_frames(mask_labels: list[Tensor], num_frames: int):
    for clip, masks in enumerate(mask_labels):
        if masks.ndim != 4 or masks.shape[1] != num_frames:
            raise ValueError(
                f"mask_labels[{clip}] has shape {tuple(masks.shape)}: it must be (N, frames, height, width) with the "
                f"{num_frames} frames of pixel_values_videos; empty masks where an object is not to be seen"
            )
