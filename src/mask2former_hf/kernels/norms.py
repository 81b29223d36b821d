"""Norms on GPUs at inference, in the memory of what they norm where that is asked for: see norms_triton.py.

The caller has made sure that nothing needs a gradient and that tensors fit one another.
"""

import torch
from torch import Tensor, nn

from . import triton_gpu

TILE = 4096  # elements that a program of four warps has at a time
PARTS = 256  # into which at most an image's rows are divided for its moments
WIDEST = 8192  # channels of a layer norm, which a program has all


def batch_norm_(x: Tensor, norm: nn.BatchNorm2d, plus: Tensor | None, rectify: bool):
    """Batch norm with the statistics that it keeps, of (B, C, H, W) with channels innermost."""
    B, C, H, W = x.shape
    rows, (ROWS, BLOCK_C) = B * H * W, _shape(min(C, 256))
    programs = (-(-rows // ROWS), -(-C // BLOCK_C))
    with torch.cuda.device_of(x):
        _kernels().batch_norm_kernel[programs](
            x, x if plus is None else plus, norm.weight, norm.bias, norm.running_mean, norm.running_var, rows, C,
            norm.eps, ROWS=ROWS, BLOCK_C=BLOCK_C, PLUS=plus is not None, RECTIFY=rectify,
        )  # fmt: skip


def fits_group_norm(channels: int, groups: int) -> bool:
    """Whether a program can have all channels of some rows, and tell their groups apart."""
    return channels <= 1024 and all(n == triton_gpu.power_of_two(n) for n in (channels, groups))


def group_norm_(x: Tensor, norm: nn.GroupNorm, plus: Tensor | None, rectify: bool):
    """Group norm of (B, C, H, W) with channels innermost, if `fits_group_norm`."""
    B, C, H, W = x.shape
    rows, ROWS = H * W, max(1, TILE // C)
    steps = -(-rows // (ROWS * PARTS))
    parts = -(-rows // (ROWS * steps))
    sums = torch.empty(B, parts, 2, C, dtype=torch.float32, device=x.device)
    scales = torch.empty(B, 2, C, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels = _kernels()
        kernels.moments_kernel[(parts, B)](x, sums, rows, steps, C=C, ROWS=ROWS)
        kernels.moments_to_scale_kernel[(B,)](
            x, sums, norm.weight, norm.bias, scales, rows, parts, norm.eps, C=C, GROUPS=norm.num_groups
        )
        kernels.scale_kernel[(-(-rows // ROWS), 1, B)](
            x, x if plus is None else plus, scales, rows, C=C, ROWS=ROWS, PLUS=plus is not None, RECTIFY=rectify
        )  # fmt: skip


def layer_norm(
    x: Tensor, norm: nn.LayerNorm, update: Tensor | None = None, keep_sum: bool = False
) -> tuple[Tensor | None, Tensor]:
    """The sum x + update, if it is asked for, and its layer norm; x (..., C) and `update` are contiguous."""
    C = x.shape[-1]
    rows, (ROWS, BLOCK_C) = x.numel() // C, _shape(C)
    normed = torch.empty_like(x)
    total = torch.empty_like(x) if keep_sum else None
    with torch.cuda.device_of(x):
        _kernels().layer_norm_kernel[(-(-rows // ROWS), 1)](
            x, x if update is None else update, normed if total is None else total, normed, norm.weight, norm.bias,
            rows, C, norm.eps, ROWS=ROWS, BLOCK_C=BLOCK_C, PLUS=update is not None, TOTAL=keep_sum,
            num_warps=4 if BLOCK_C <= TILE else 8,
        )  # fmt: skip
    return total, normed


def _shape(channels: int) -> tuple[int, int]:
    """Rows and channels of a program's tile."""
    block = triton_gpu.power_of_two(channels)
    return max(1, TILE // block), block


def _kernels():
    from . import norms_triton

    return norms_triton
