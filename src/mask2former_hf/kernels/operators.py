"""Registration with `torch.library`: one node in compiled and exported graphs, with shapes and gradients known.

Which kernel computes is decided when an operator runs, by its tensors' device and dtype and by `use_kernel`. The
backward operators take the forward's kernel by name, because autograd may run them in another thread or after the
`use_kernel` context was left; if that one cannot run (a graph made on another device), the device's own does.

Autocast converts value alone, to its dtype, unless value is float64; so the output is in that dtype as well. Offsets,
locations, reference points, logits and weights stay as they are: half precision cannot tell neighbouring pixels apart,
and the kernels read any dtype and compute in float32.
"""

import torch
from torch import Tensor

from .choosing import IMPLEMENTATIONS, kernel_for_operator
from .problem import check_devices

AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _pairs(flat: list[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _kernel(value: Tensor, name: str = ""):
    return IMPLEMENTATIONS[kernel_for_operator(value.device, value.dtype, name)]


@torch.library.custom_op("mask2former_hf::deformable_attention", mutates_args=())
def fused(
    value: Tensor, spatial_shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """See `mask2former_hf.kernels.deformable_attention`; `spatial_shapes` is flat: H, W, H, W, ..."""
    return _kernel(value).forward(value, _pairs(spatial_shapes), offsets, logits, reference_points)


@torch.library.custom_op("mask2former_hf::deformable_attention_backward", mutates_args=())
def fused_backward(
    output_gradient: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    kernel: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits; `kernel` is the forward's."""
    return _kernel(value, kernel).backward(
        output_gradient, value, _pairs(spatial_shapes), offsets, logits, reference_points
    )


@torch.library.custom_op("mask2former_hf::multi_scale_deformable_attention", mutates_args=())
def standard(
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """Locations in [0, 1] and weights given, as in `deformable_attention.py`; `padding` (B, S): nonzero rows are 0."""
    return _kernel(value).forward(
        value, _pairs(spatial_shapes), sampling_locations, attention_weights, padding=padding
    )


@torch.library.custom_op("mask2former_hf::multi_scale_deformable_attention_backward", mutates_args=())
def standard_backward(
    output_gradient: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding: Tensor | None = None,
    kernel: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; `kernel` is the forward's."""
    return _kernel(value, kernel).backward(
        output_gradient, value, _pairs(spatial_shapes), sampling_locations, attention_weights, padding=padding
    )


@fused.register_fake
def _(value, spatial_shapes, reference_points, offsets, logits):
    check_devices(value, reference_points, offsets, logits)
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


@standard.register_fake
def _(value, spatial_shapes, sampling_locations, attention_weights, padding=None):
    check_devices(value, sampling_locations, attention_weights, padding)
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


@fused_backward.register_fake
def _(output_gradient, value, spatial_shapes, reference_points, offsets, logits, kernel=""):
    check_devices(output_gradient, value, reference_points, offsets, logits)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (value, offsets, logits))


@standard_backward.register_fake
def _(output_gradient, value, spatial_shapes, sampling_locations, attention_weights, padding=None, kernel=""):
    check_devices(output_gradient, value, sampling_locations, attention_weights, padding)
    inputs = (value, sampling_locations, attention_weights)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)


def _save_fused(ctx, inputs, output):
    value, ctx.spatial_shapes, reference_points, offsets, logits = inputs
    ctx.kernel = kernel_for_operator(value.device, value.dtype)
    ctx.save_for_backward(value, reference_points, offsets, logits)


def _fused_gradients(ctx, output_gradient):
    value, *others = ctx.saved_tensors
    gradients = fused_backward(output_gradient, value, ctx.spatial_shapes, *others, ctx.kernel)
    return gradients[0], None, None, gradients[1], gradients[2]


def _save_standard(ctx, inputs, output):
    value, ctx.spatial_shapes, locations, weights, padding = inputs
    ctx.kernel = kernel_for_operator(value.device, value.dtype)
    ctx.save_for_backward(value, locations, weights, padding)


def _standard_gradients(ctx, output_gradient):
    value, *others = ctx.saved_tensors
    gradients = standard_backward(output_gradient, value, ctx.spatial_shapes, *others, ctx.kernel)
    return gradients[0], None, gradients[1], gradients[2], None


fused.register_autograd(_fused_gradients, setup_context=_save_fused)
standard.register_autograd(_standard_gradients, setup_context=_save_standard)


def dtype_under_autocast(value: Tensor) -> torch.dtype:
    """The dtype in which the operators will get `value`."""
    device_type = value.device.type
    autocast = device_type in AUTOCAST_KEYS and torch.is_autocast_enabled(device_type)  # meta has no autocast
    if autocast and value.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return value.dtype


def _autocast_rule(operator, device_type: str):
    def rule(value, *others):
        value = value.to(dtype_under_autocast(value))
        with torch.autocast(device_type, enabled=False):
            return operator(value, *others)

    return rule


# torch.library.register_autocast (torch 2.7) would convert every argument.
_library = torch.library.Library("mask2former_hf", "FRAGMENT")
for _device_type, _key in AUTOCAST_KEYS.items():
    _library.impl("deformable_attention", _autocast_rule(fused, _device_type), _key)
    _library.impl("multi_scale_deformable_attention", _autocast_rule(standard, _device_type), _key)
