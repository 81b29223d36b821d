"""Compiled multi-scale deformable attention, and for CPUs a group norm and the attention of Swin's windows.

`deformable_attention` is what the model calls; it returns None where no compiled kernel applies, and the model then
runs the plain PyTorch formula. Kernels: "cpp" on CPUs (float32, bfloat16), "triton" on GPUs (float32, float16,
bfloat16). "reference" is the PyTorch formula.
"""

import torch
from torch import Tensor

from . import cpu, problem
from .choosing import ENVIRONMENT_VARIABLE, KERNELS, chosen_name, kernel_report, select, use_kernel
from .operators import dtype_under_autocast, fused


def leaving_pytorch() -> bool:
    """Whether the model is being traced for another system, which knows no operators of ours."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


__all__ = [
    "ENVIRONMENT_VARIABLE",
    "KERNELS",
    "attend_in_windows",
    "attend_in_windows_backward",
    "deformable_attention",
    "group_norm_",
    "kernel_report",
    "select",
    "use_kernel",
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


def runs_here(x: Tensor) -> bool:
    """Whether a kernel that is no operator of torch may compute on x: nothing records it, "cpp" can and may run."""
    return (
        not (torch.is_grad_enabled() or torch.compiler.is_compiling() or leaving_pytorch())
        and cpu.why_not(x.device, x.dtype) is None
        and chosen_name() in ("auto", "cpp")
    )


def group_norm_(x: Tensor, norm: torch.nn.GroupNorm, plus: Tensor | None = None, rectify: bool = False) -> bool:
    """Group norm in x's memory, then `plus` another map, then a ReLU if asked for; False if it was not done.

    It is done in eager mode without a graph, on CPUs, for maps (B, C, H, W) with channels innermost, if kernel "cpp"
    can run for their dtype and no other was asked for. Sums are float64, the arithmetic is float32.
    """
    maps = [x] if plus is None else [x, plus]
    fits = all(
        type(y) is Tensor
        and y.device.type == "cpu"
        and (y.shape, y.dtype) == (x.shape, x.dtype)
        and y.is_contiguous(memory_format=torch.channels_last)
        for y in maps
    )
    plain = all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in (norm.weight, norm.bias))
    if not (fits and plain and x.numel() and runs_here(x)) or torch.is_autocast_enabled("cpu"):
        return False
    cpu.group_norm_(x, norm.num_groups, norm.weight, norm.bias, norm.eps, plus, rectify)
    return True


def attend_in_windows(
    projected: Tensor, fill: Tensor, places: Tensor, bias: Tensor, seam: Tensor | None, scale: float
) -> Tensor | None:
    """Attention of tokens within their windows; None if it was not done.

    It is done in eager mode, where no graph is recorded, on CPUs, for heads of a multiple of 8 channels, if kernel
    "cpp" can run for their dtype and no other was asked for. The arithmetic is float32.

    Args:
        projected: (N, 3 C) queries, keys and values of N tokens.
        fill: (3 C,) those of padding.
        places: (w * n,) int64 of each row of w windows of n tokens the token, N for padding; every token once.
        bias: (h, n, n) of the scores.
        seam: (s, n, n) what is added to the scores of the last s windows; None for nothing.
        scale: of the scores.

    Returns:
        (N, C) in projected's dtype.
    """
    heads = _window_heads(projected, fill, places, bias, seam, scale)
    return None if heads is None else cpu.window_attention(heads)


def attend_in_windows_backward(
    of_attended: Tensor,
    projected: Tensor,
    fill: Tensor,
    places: Tensor,
    bias: Tensor,
    seam: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of `projected`, and in float32 of `fill` and `bias`, of the (N, C) gradient of what was attended.

    The other arguments are those of `attend_in_windows`; None where that is None.
    """
    heads = _window_heads(projected, fill, places, bias, seam, scale)
    if heads is None:
        return None
    return cpu.window_attention_backward(heads, of_attended.to(projected.dtype).contiguous())


def _window_heads(projected, fill, places, bias, seam, scale) -> cpu.WindowHeads | None:
    h, n, _ = bias.shape
    tensors = [tensor for tensor in (projected, fill, places, bias, seam) if tensor is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)
    if not (plain and runs_here(projected)) or projected.shape[1] % (3 * h * 8):
        return None
    return cpu.WindowHeads(
        projected.contiguous(),
        fill.to(projected.dtype).contiguous(),
        places.view(-1, n),
        bias.float().contiguous(),
        None if seam is None else seam.float().contiguous(),
        scale,
    )
