"""Attention over shifted windows as an operator of torch, for GPUs: shapes and gradients known, compiled on first use.

It takes the place of a dozen copies and of a mask of scores for every window: see windows_triton.py.
"""

from functools import cache

import torch
from torch import Tensor

from . import triton_gpu
from .choosing import chosen_name

LONGEST_WINDOW = 256  # tokens whose scores a program holds at once
WIDEST_HEAD = 32  # channels, which Swin's heads have; with more the backward pass leaves registers and shared memory
FEW = 64  # tokens of a window from which on programs have other sizes
PROGRAMS = 1056  # of the backward pass, eight for each of an H100's multiprocessors


def why_not(device: torch.device, dtype: torch.dtype, side: int, head_dim: int) -> str | None:
    """None if the kernels can run and none but Triton's was asked for, else the reason."""
    name = chosen_name()
    if name not in ("auto", "triton"):
        return f"kernel {name!r} was asked for"
    if device.type != "cuda" and name == "auto":
        return f"it runs on GPUs, not on {device.type}"
    longest = LONGEST_WINDOW if torch.version.hip is None else FEW  # whose GPUs have 64 KB of shared memory
    if side**2 > longest or head_dim > WIDEST_HEAD:
        return f"a window of {side} x {side} tokens or heads of {head_dim} channels do not fit a program"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0, for its shared memory"
    return triton_gpu.why_not(device, dtype)


@torch.library.custom_op("mask2former_hf::window_attention", mutates_args=())
def forward(
    projected: Tensor, fill: Tensor, position_bias: Tensor, side: int, shift: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each token over the tokens of its window.

    Args:
        projected: (B, H, W, 3 C) queries, keys and values of h heads, one after the other.
        fill: (3 C,) those of padding: the bias of the projection.
        position_bias: (h, n, n) added to the scores, n = side * side.
        side: of a window, in tokens.
        shift: of the windows, down and to the right, in tokens; less than `side`.
        scale: of the scores.

    Returns:
        (B, H, W, C) and (B, H, W, h) float32 logarithms of the softmax' sums, for the backward pass.
    """
    projected, fill, position_bias = projected.contiguous(), fill.contiguous(), position_bias.contiguous()
    output, normalizers = _empty_results(projected, position_bias)
    if output.numel():
        B, H, W, _ = projected.shape
        h = len(position_bias)
        heads = B * -(-H // side) * -(-W // side) * h
        constants = _constants(projected, position_bias, side) | (UNTUNED if triton_gpu.interpreted() else {})
        with torch.cuda.device_of(projected):
            _tuned_forward()[lambda chosen: (heads * -(-(side**2) // chosen["ROWS"]),)](
                projected, fill, position_bias, output, normalizers, H, W, shift, scale, h, **constants
            )
    return output, normalizers


@torch.library.custom_op("mask2former_hf::window_attention_backward", mutates_args=())
def backward(
    gradient: Tensor,
    projected: Tensor,
    fill: Tensor,
    position_bias: Tensor,
    output: Tensor,
    normalizers: Tensor,
    side: int,
    shift: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `projected`, of `fill` and of the position bias; the latter two are added up in float32."""
    gradient, projected, output = gradient.contiguous(), projected.contiguous(), output.contiguous()
    fill, position_bias, normalizers = fill.contiguous(), position_bias.contiguous(), normalizers.contiguous()
    (B, H, W, width), (h, n, _) = projected.shape, position_bias.shape
    C, windows = width // 3, B * -(-H // side) * -(-W // side)
    groups = min(windows, -(-PROGRAMS // h))
    projected_gradient = torch.empty_like(projected)
    bias_gradients = torch.zeros(groups, h, n, n, dtype=torch.float32, device=projected.device)
    fill_gradients = torch.empty(groups, 2 * C, dtype=torch.float32, device=projected.device)
    if groups:
        rows, warps = BACKWARD[side**2 > FEW, projected.element_size()]
        columns = max(16, triton_gpu.power_of_two(side**2))
        constants = _constants(projected, position_bias, side) | {"ROWS": min(rows, columns), "COLUMNS": columns}
        if side**2 > FEW:
            constants["PRECISION"] = "ieee"  # TF32 would take 121 KB of shared memory, which not all GPUs have
        with torch.cuda.device_of(projected):
            _kernels().backward_kernel[(groups * h,)](
                gradient, projected, fill, position_bias, output, normalizers, projected_gradient, bias_gradients,
                fill_gradients, H, W, shift, scale, h, windows, groups, **constants, num_warps=warps, num_stages=1,
            )  # fmt: skip
    of_fill = torch.cat([fill_gradients.new_zeros(C), fill_gradients.sum(0)])
    return projected_gradient, of_fill.to(fill.dtype), bias_gradients.sum(0).to(position_bias.dtype)


@forward.register_fake
def _(projected, fill, position_bias, side, shift, scale):
    return _empty_results(projected, position_bias)


@backward.register_fake
def _(gradient, projected, fill, position_bias, output, normalizers, side, shift, scale):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (projected, fill, position_bias))


def _empty_results(projected: Tensor, position_bias: Tensor) -> tuple[Tensor, Tensor]:
    B, H, W, width = projected.shape
    normalizers = projected.new_empty(B, H, W, len(position_bias), dtype=torch.float32)
    return projected.new_empty(B, H, W, width // 3), normalizers


def _save(ctx, inputs, output):
    *tensors, ctx.side, ctx.shift, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, gradient, _):
    of_inputs = backward(gradient, *ctx.saved_tensors, ctx.side, ctx.shift, ctx.scale)
    return *of_inputs, None, None, None


forward.register_autograd(_gradients, setup_context=_save)

# (queries at a time, keys at a time, warps): which is fastest depends on window, dtype and GPU, and is tried out.
FORWARD = ((64, 64, 4), (64, 32, 4), (64, 16, 4), (32, 64, 4), (32, 32, 2))
UNTUNED = {"ROWS": 64, "COLUMNS": 32}  # under the interpreter
# (queries at a time, warps), the largest whose tensors stay in registers (seen in the code for compute capability 9.0,
# Triton 3.9), all within 100 KB of shared memory.
BACKWARD = {(False, 2): (64, 4), (True, 2): (16, 8), (False, 4): (32, 4), (True, 4): (16, 8)}


def _constants(projected: Tensor, position_bias: Tensor, side: int) -> dict:
    """What both kernels are compiled for."""
    D = projected.shape[-1] // 3 // len(position_bias)
    return {
        "D": D,
        "SIDE": side,
        "BLOCK_D": max(16, triton_gpu.power_of_two(D)),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }


@cache
def _tuned_forward():
    """The kernel that tries its configurations out on the first call for a kind of window, and remembers."""
    kernel = _kernels().forward_kernel
    if triton_gpu.interpreted():
        return kernel
    import triton

    configs = [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=1)
        for rows, columns, warps in FORWARD
    ]
    return triton.autotune(configs, key=["D", "SIDE", "PRECISION"])(kernel)


def _kernels():
    from . import windows_triton

    return windows_triton
