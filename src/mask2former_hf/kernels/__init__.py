"""Compiled multi-scale deformable attention, for CPUs a group norm, and for GPUs attention over shifted windows.

`deformable_attention` is what the model calls; it returns None where no compiled kernel applies, and the model then
runs the plain PyTorch formula. Kernels: "cpp" on CPUs (float32, bfloat16), "triton" on GPUs (float32, float16,
bfloat16). "reference" is the PyTorch formula.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import cpu, problem, windows
from .choosing import ENVIRONMENT_VARIABLE, KERNELS, chosen_name, kernel_report, select, use_kernel
from .operators import dtype_under_autocast, fused


def leaving_pytorch() -> bool:
    """Whether the model is being traced for another system, which knows no operators of ours."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


__all__ = [
    "ENVIRONMENT_VARIABLE",
    "KERNELS",
    "deformable_attention",
    "group_norm_",
    "kernel_report",
    "select",
    "use_kernel",
    "window_attention",
]


def deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor | None:
    """Multi-scale deformable attention with softmax and location arithmetic inside; None if no kernel applies.

    Args:
        value: (B, S, h, D).
        spatial_shapes: L pairs (H, W) of Python ints with sum(H * W) == S.
        reference_points: (Q, 2) float32 as (x, y) in units of the maps' width and height; gets no gradient.
        offsets: (B, Q, h, L, P, 2) in pixels of each level.
        logits: (B, Q, h, L * P) before the softmax.

    Returns:
        (B, Q, h * D) in value's dtype, under autocast in autocast's.

    Raises:
        ValueError: if the tensors do not fit one another; also where no kernel applies.
        RuntimeError: if a kernel asked for by name cannot run.
    """
    if leaving_pytorch():
        return None
    if select(value.device, dtype_under_autocast(value)) is None:
        if not torch.compiler.is_compiling():  # a bound would become a condition of the graph
            problem.check(value, spatial_shapes, offsets, logits, reference_points)
        return None
    return fused(value, [side for shape in spatial_shapes for side in shape], reference_points, offsets, logits)


def group_norm_(x: Tensor, norm: torch.nn.GroupNorm, plus: Tensor | None = None, rectify: bool = False) -> bool:
    """Group norm in x's memory, then `plus` another map, then a ReLU if asked for; False if it was not done.

    It is done in eager mode without a graph, on CPUs, for maps (B, C, H, W) with channels innermost, if kernel "cpp"
    can run for their dtype and no other was asked for. Sums are float64, the arithmetic is float32.
    """
    maps = [x] if plus is None else [x, plus]
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or leaving_pytorch())
    fits = all(
        type(y) is Tensor
        and y.device.type == "cpu"
        and (y.shape, y.dtype) == (x.shape, x.dtype)
        and y.is_contiguous(memory_format=torch.channels_last)
        for y in maps
    )
    plain = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in (norm.weight, norm.bias))
    if not (eager and fits and plain and x.numel()) or torch.is_autocast_enabled("cpu"):
        return False
    if cpu.why_not(x.device, x.dtype) is not None or chosen_name() not in ("auto", "cpp"):
        return False
    cpu.group_norm_(x, norm.num_groups, norm.weight, norm.bias, norm.eps, plus, rectify)
    return True


def window_attention(device: torch.device, dtype: torch.dtype, side: int, head_dim: int) -> Callable | None:
    """What computes attention over shifted windows of tokens, `windows.forward`; None where no kernel applies.

    Args:
        dtype: of the projected tokens.
        side: of a window, in tokens.
        head_dim: channels of a head.
    """
    if leaving_pytorch() or windows.why_not(device, dtype, side, head_dim) is not None:
        return None
    return windows.forward
