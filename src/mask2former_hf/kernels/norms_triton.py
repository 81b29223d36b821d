"""Norms in Triton for inference, each with what stands before and after it: one pass over memory instead of several.

All work on rows of C channels that are contiguous: tokens, or maps with channels innermost. Everything is computed in
float32. This module imports Triton: only norms.py imports it, on first use.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(rows, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets (ROWS, BLOCK_C) of this program's elements, which of them exist, and its channels."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row[:, None] * C + c[None, :], (row < rows)[:, None] & (c < C)[None, :], c


@triton.jit
def _finish(x, plus, at, exists, scale, shift, PLUS: tl.constexpr, RECTIFY: tl.constexpr):
    """x * scale + shift, `plus` that, and a ReLU, in x's memory."""
    y = tl.load(x + at, mask=exists, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if PLUS:
        y += tl.load(plus + at, mask=exists, other=0.0).to(tl.float32)
    if RECTIFY:
        y = tl.where(y < 0, 0.0, y)  # NaN stays
    tl.store(x + at, y, mask=exists)


@triton.jit
def batch_norm_kernel(
    x, plus, weight, bias, mean, variance, rows, C, eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PLUS: tl.constexpr, RECTIFY: tl.constexpr,
):  # fmt: skip
    at, exists, c = _tile(rows, C, ROWS, BLOCK_C)
    scale = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.load(variance + c, mask=c < C, other=1.0).to(tl.float32) + eps)
    shift = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    shift -= tl.load(mean + c, mask=c < C, other=0.0).to(tl.float32) * scale
    _finish(x, plus, at, exists, scale, shift, PLUS, RECTIFY)


@triton.jit
def moments_kernel(x, sums, rows, steps, C: tl.constexpr, ROWS: tl.constexpr):
    """Of some rows of an image (rows, C) per channel the sums of differences from its first row, and of their squares.

    Differences, because in sums of the values themselves digits cancel where the mean is large.
    """
    c = tl.arange(0, C)
    x += tl.program_id(1).to(tl.int64) * rows * C
    origin = tl.load(x + c).to(tl.float32)
    first = tl.zeros((ROWS, C), tl.float32)
    second = tl.zeros((ROWS, C), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        exists = (row < rows)[:, None]
        found = tl.load(x + row.to(tl.int64)[:, None] * C + c[None, :], mask=exists, other=0.0).to(tl.float32)
        found = tl.where(exists, found - origin[None, :], 0.0)
        first += found
        second += found * found
    sums += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2 * C
    tl.store(sums + c, tl.sum(first, 0))
    tl.store(sums + C + c, tl.sum(second, 0))


@triton.jit
def moments_to_scale_kernel(
    x, sums, weight, bias, scales, rows, parts, eps, C: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Of an image's sums the scale and shift (2, C) that norm each group of channels."""
    c = tl.arange(0, C)
    origin = tl.load(x + tl.program_id(0).to(tl.int64) * rows * C + c).to(tl.float32)
    sums += tl.program_id(0).to(tl.int64) * parts * 2 * C
    first = tl.zeros((C,), tl.float32)
    second = tl.zeros((C,), tl.float32)
    for part in range(parts):
        first += tl.load(sums + part * 2 * C + c)
        second += tl.load(sums + (part * 2 + 1) * C + c)
    count = rows * 1.0
    mean = origin + first / count
    squares = second - first * first / count  # of differences from the channel's mean
    WIDTH: tl.constexpr = C // GROUPS
    mean = tl.reshape(mean, (GROUPS, WIDTH))
    of_group = tl.sum(mean, 1) / WIDTH
    apart = mean - of_group[:, None]
    squares = tl.maximum(tl.reshape(squares, (GROUPS, WIDTH)), 0.0)  # rounding may leave less
    variance = (tl.sum(squares, 1) / count + tl.sum(apart * apart, 1)) / WIDTH
    scale = tl.reshape(tl.load(weight + c).to(tl.float32), (GROUPS, WIDTH)) * tl.rsqrt(variance + eps)[:, None]
    shift = tl.reshape(tl.load(bias + c).to(tl.float32), (GROUPS, WIDTH)) - of_group[:, None] * scale
    scales += tl.program_id(0) * 2 * C
    tl.store(scales + c, tl.reshape(scale, (C,)))
    tl.store(scales + C + c, tl.reshape(shift, (C,)))


@triton.jit
def scale_kernel(
    x, plus, scales, rows, C: tl.constexpr, ROWS: tl.constexpr, PLUS: tl.constexpr, RECTIFY: tl.constexpr
):  # fmt: skip
    """Rows of image `program_id(2)` with its scale and shift."""
    at, exists, c = _tile(rows, C, ROWS, C)
    at += tl.program_id(2).to(tl.int64) * rows * C
    scales += tl.program_id(2) * 2 * C
    _finish(x, plus, at, exists, tl.load(scales + c), tl.load(scales + C + c), PLUS, RECTIFY)


@triton.jit
def layer_norm_kernel(
    x, update, total, normed, weight, bias, rows, C, eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PLUS: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """normed = norm(x + update), and if asked for total = x + update."""
    at, exists, c = _tile(rows, C, ROWS, BLOCK_C)
    y = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    if PLUS:
        y += tl.load(update + at, mask=exists, other=0.0).to(tl.float32)
    if TOTAL:
        tl.store(total + at, y, mask=exists)
    y -= (tl.sum(y, 1) / C)[:, None]
    y = tl.where((c < C)[None, :], y, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 1) / C + eps)[:, None]
    scale = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(normed + at, y * scale[None, :] + shift[None, :], mask=exists)
