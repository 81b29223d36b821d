"""Registration with `torch.library`: one node in compiled and exported graphs, with shapes and gradients known."""

import torch
from torch import Tensor

from . import cpu


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


@torch.library.custom_op("mask2former_hf::deformable_attention", mutates_args=())
def fused(
    value: Tensor, spatial_shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """See `mask2former_hf.kernels.deformable_attention`; `spatial_shapes` is flat: H, W, H, W, ..."""
    return cpu.forward(value, _pairs(spatial_shapes), offsets, logits, reference_points)


@torch.library.custom_op("mask2former_hf::deformable_attention_backward", mutates_args=())
def fused_backward(
    output_gradient: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits."""
    return cpu.backward(output_gradient, value, _pairs(spatial_shapes), offsets, logits, reference_points)


@torch.library.custom_op("mask2former_hf::multi_scale_deformable_attention", mutates_args=())
def standard(
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """Locations in [0, 1] and weights given, as in `deformable_attention.py`; `padding` (B, S): nonzero rows are 0."""
    return cpu.forward(value, _pairs(spatial_shapes), sampling_locations, attention_weights, padding=padding)


@torch.library.custom_op("mask2former_hf::multi_scale_deformable_attention_backward", mutates_args=())
def standard_backward(
    output_gradient: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    return cpu.backward(
        output_gradient, value, _pairs(spatial_shapes), sampling_locations, attention_weights, padding=padding
    )


@fused.register_fake
def _(value, spatial_shapes, reference_points, offsets, logits):
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@standard.register_fake
def _(value, spatial_shapes, sampling_locations, attention_weights, padding=None):
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


@fused_backward.register_fake
def _(output_gradient, value, spatial_shapes, reference_points, offsets, logits):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (value, offsets, logits))


@standard_backward.register_fake
def _(output_gradient, value, spatial_shapes, sampling_locations, attention_weights, padding=None):
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _save_fused(ctx, inputs, output):
    value, ctx.spatial_shapes, reference_points, offsets, logits = inputs
    ctx.save_for_backward(value, reference_points, offsets, logits)


def _fused_gradients(ctx, output_gradient):
    value, reference_points, offsets, logits = ctx.saved_tensors
    gradients = fused_backward(output_gradient, value, ctx.spatial_shapes, reference_points, offsets, logits)
    return gradients[0], None, None, gradients[1], gradients[2]


def _save_standard(ctx, inputs, output):
    value, ctx.spatial_shapes, locations, weights, padding = inputs
    ctx.save_for_backward(value, locations, weights, padding)


def _standard_gradients(ctx, output_gradient):
    value, locations, weights, padding = ctx.saved_tensors
    gradients = standard_backward(output_gradient, value, ctx.spatial_shapes, locations, weights, padding)
    return gradients[0], None, gradients[1], gradients[2], None


fused.register_autograd(_fused_gradients, setup_context=_save_fused)
standard.register_autograd(_standard_gradients, setup_context=_save_standard)
