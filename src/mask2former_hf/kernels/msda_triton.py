"""Multi-scale deformable attention in Triton (Zhu et al., "Deformable DETR", ICLR 2021, eq. 3), forward and backward.

The two forms and all layouts are those of msda_cpu.cpp: value (B, S, h, D), offsets or locations (B, Q, h, L, P, 2),
logits or weights (B, Q, h, L * P), reference points (Q, 2), output (B, Q, h * D); `levels` (L, 3) int32 holds H, W and
the first row of each map. Samples outside a map count as zero, also those that are not finite.

A program takes BLOCK_Q consecutive queries of one head of one image and keeps them as (BLOCK_Q, BLOCK_D) tensors with
D contiguous: a row of `value` is half a cache line or a whole one, read 16 bytes per thread; the threads of a query
repeat its few scalar operations instead of exchanging them. In Mask2Former's encoder consecutive queries are
consecutive pixels, so a program reads the same cache lines again and again.

Everything is computed in float32. Offsets within an image are 64-bit only if WIDE says that they need it; the
image's and the block's own offsets always are.

The gradient of value has two ways. By default rows are added atomically in float32, in an order that differs from run
to run. If DETERMINISTIC, the backward kernel records which row each corner belongs to and its weight instead; the host
sorts the records by row, and `sum_records` adds each row's records in that fixed order.

This module imports Triton: only triton_gpu.py imports it, on first use. `triton.jit` compiles on the first call.
"""

import triton
import triton.language as tl


@triton.jit
def _sample(positions, x_reference, y_reference, width, height, FUSED: tl.constexpr):
    """Where a sample lies, in pixels with cell centres at whole numbers."""
    x = tl.load(positions).to(tl.float32)
    y = tl.load(positions + 1).to(tl.float32)
    if FUSED:
        x += x_reference * width
        y += y_reference * height
    else:
        x *= width
        y *= height
    return x - 0.5, y - 0.5


@triton.jit
def _corners(x, y, width, height, first_row, padding, PADDED: tl.constexpr):
    """Fractions of the way to the right and lower corner; rows of the four corners; which of them count."""
    near = (x > -1) & (y > -1) & (x < width) & (y < height)  # false for NaN
    x = tl.where(near, x, 0.0)
    y = tl.where(near, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    in_left = near & (left >= 0)
    in_right = near & (left + 1 < width)
    in_top = top >= 0
    in_bottom = top + 1 < height
    upper_left = first_row + top.to(tl.int32) * width.to(tl.int32) + left.to(tl.int32)
    lower_left = upper_left + width.to(tl.int32)
    in_00 = in_top & in_left
    in_01 = in_top & in_right
    in_10 = in_bottom & in_left
    in_11 = in_bottom & in_right
    if PADDED:
        in_00 &= tl.load(padding + upper_left, mask=in_00, other=1) == 0
        in_01 &= tl.load(padding + upper_left + 1, mask=in_01, other=1) == 0
        in_10 &= tl.load(padding + lower_left, mask=in_10, other=1) == 0
        in_11 &= tl.load(padding + lower_left + 1, mask=in_11, other=1) == 0
    return x - left, y - top, upper_left, lower_left, in_00, in_01, in_10, in_11


@triton.jit
def _offsets(row, stride, d, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    return row[:, None] * stride + d[None, :]


@triton.jit
def _mask(inside, d, D: tl.constexpr):
    mask = inside[:, None]
    if d.shape[0] != D:
        mask = mask & (d < D)[None, :]
    return mask


@triton.jit
def _row(value, row, inside, stride, d, D: tl.constexpr, WIDE: tl.constexpr):
    """(BLOCK_Q, BLOCK_D) channels of one row per query; zero where it does not count."""
    return tl.load(value + _offsets(row, stride, d, WIDE), mask=_mask(inside, d, D), other=0.0).to(tl.float32)


@triton.jit
def _block(Q, h, BLOCK_Q: tl.constexpr):
    """Image, head, number of (query, head) before this block's first, each query's distance to it, and which exist."""
    blocks = tl.cdiv(Q, BLOCK_Q)
    first = tl.program_id(0) % blocks * BLOCK_Q
    image = (tl.program_id(0) // blocks // h).to(tl.int64)
    head = tl.program_id(0) // blocks % h
    query = first + tl.arange(0, BLOCK_Q)
    # Lanes past the last query repeat it: loads need no mask, only what is written does.
    lane = (tl.minimum(query, Q - 1) - first) * h
    return image, head, first, (image * Q + first) * h + head, lane, query < Q


@triton.jit
def _softmax(weights, lane, column, COUNT: tl.constexpr):
    """Logits (BLOCK_Q, columns), -inf past the last sample; their largest; 1 / sum of exp."""
    logits = tl.load(weights + lane[:, None] * COUNT + column[None, :], mask=(column < COUNT)[None, :], other=0.0)
    logits = tl.where((column < COUNT)[None, :], logits.to(tl.float32), float("-inf"))
    largest = tl.max(logits, 1)
    return logits, largest, 1 / tl.sum(tl.exp(logits - largest[:, None]), 1)


@triton.jit
def forward_kernel(
    value, positions, weights, reference, padding, levels, output, Q, S, h,
    bucket,  # of the number of queries: a key of the autotuner
    D: tl.constexpr, L: tl.constexpr, P: tl.constexpr,
    BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,  # D and L * P, rounded up to powers of two
    FUSED: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = ROWS * WARPS * VECTORS
    image, head, first, item, lane, exists = _block(Q, h, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    value += (image * S * h + head) * D
    positions += item * (L * P * 2)
    weights += item * (L * P)
    padding += image * S
    x_reference = 0.0
    y_reference = 0.0
    if FUSED:
        column = tl.arange(0, COLUMNS)
        _, largest, scale = _softmax(weights, lane, column, L * P)
        query = first + lane // h
        x_reference = tl.load(reference + query * 2)
        y_reference = tl.load(reference + query * 2 + 1)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in range(L):
        height = tl.load(levels + level * 3).to(tl.float32)
        width = tl.load(levels + level * 3 + 1).to(tl.float32)
        first_row = tl.load(levels + level * 3 + 2)
        for point in tl.static_range(P):
            sample = lane * (L * P) + level * P + point
            attention = tl.load(weights + sample).to(tl.float32)
            if FUSED:
                attention = tl.exp(attention - largest) * scale
            x, y = _sample(positions + sample * 2, x_reference, y_reference, width, height, FUSED)
            x, y, upper, lower, in_00, in_01, in_10, in_11 = _corners(x, y, width, height, first_row, padding, PADDED)
            above = attention * (1 - y)
            below = attention * y
            total += (above * (1 - x))[:, None] * _row(value, upper, in_00, h * D, d, D, WIDE)
            total += (above * x)[:, None] * _row(value, upper + 1, in_01, h * D, d, D, WIDE)
            total += (below * (1 - x))[:, None] * _row(value, lower, in_10, h * D, d, D, WIDE)
            total += (below * x)[:, None] * _row(value, lower + 1, in_11, h * D, d, D, WIDE)
    output += item * D + lane[:, None] * D + d[None, :]
    tl.store(output, total, mask=_mask(exists, d, D))


@triton.jit
def _give(
    value_gradient, rows, shares, row, corner, inside, share, gradient, head, S, stride, d, exists,
    D: tl.constexpr, WIDE: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """Add `share` of the incoming gradient to a row of value's, or record that it is to be added."""
    if DETERMINISTIC:
        if WIDE:
            head = head.to(tl.int64)
        tl.store(rows + corner, tl.where(inside, head * S + row, -1), mask=exists)  # -1 sorts before every row
        tl.store(shares + corner, share, mask=exists)
    else:
        at = value_gradient + _offsets(row, stride, d, WIDE)
        tl.atomic_add(at, share[:, None] * gradient, mask=_mask(inside & exists, d, D), sem="relaxed")


@triton.jit
def backward_kernel(
    output_gradient, value, positions, weights, reference, padding, levels,
    value_gradient, positions_gradient, weights_gradient,
    rows, shares,  # DETERMINISTIC: (Q, h, L * P, 4) row that a corner's share belongs to, of one image
    Q, S, h, bucket,
    D: tl.constexpr, L: tl.constexpr, P: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    FUSED: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr, DETERMINISTIC: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = ROWS * WARPS * VECTORS
    image, head, first, item, lane, exists = _block(Q, h, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, COLUMNS)
    value += (image * S * h + head) * D
    value_gradient += (image * S * h + head) * D
    positions += item * (L * P * 2)
    weights += item * (L * P)
    padding += image * S
    rows += item * (L * P * 4)
    shares += item * (L * P * 4)
    incoming = tl.load(
        output_gradient + item * D + lane[:, None] * D + d[None, :], mask=_mask(exists, d, D), other=0.0
    ).to(tl.float32)
    x_reference = 0.0
    y_reference = 0.0
    if FUSED:
        logits, largest, scale = _softmax(weights, lane, column, L * P)
        query = first + lane // h
        x_reference = tl.load(reference + query * 2)
        y_reference = tl.load(reference + query * 2 + 1)
    # Gradients of the samples, gathered by column and written at the end, coalesced.
    to_attention = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    to_x = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    to_y = tl.zeros((BLOCK_Q, COLUMNS), tl.float32)
    for level in range(L):
        height = tl.load(levels + level * 3).to(tl.float32)
        width = tl.load(levels + level * 3 + 1).to(tl.float32)
        first_row = tl.load(levels + level * 3 + 2)
        for point in tl.static_range(P):
            sample = lane * (L * P) + level * P + point
            attention = tl.load(weights + sample).to(tl.float32)
            if FUSED:
                attention = tl.exp(attention - largest) * scale
            x, y = _sample(positions + sample * 2, x_reference, y_reference, width, height, FUSED)
            x, y, upper, lower, in_00, in_01, in_10, in_11 = _corners(x, y, width, height, first_row, padding, PADDED)
            above = attention * (1 - y)
            below = attention * y
            _give(
                value_gradient, rows, shares, upper, sample * 4, in_00, above * (1 - x), incoming, head, S, h * D, d,
                exists, D, WIDE, DETERMINISTIC,
            )  # fmt: skip
            _give(
                value_gradient, rows, shares, upper + 1, sample * 4 + 1, in_01, above * x, incoming, head, S, h * D, d,
                exists, D, WIDE, DETERMINISTIC,
            )  # fmt: skip
            _give(
                value_gradient, rows, shares, lower, sample * 4 + 2, in_10, below * (1 - x), incoming, head, S, h * D,
                d, exists, D, WIDE, DETERMINISTIC,
            )  # fmt: skip
            _give(
                value_gradient, rows, shares, lower + 1, sample * 4 + 3, in_11, below * x, incoming, head, S, h * D, d,
                exists, D, WIDE, DETERMINISTIC,
            )  # fmt: skip
            dot_00 = tl.sum(incoming * _row(value, upper, in_00, h * D, d, D, WIDE), 1)
            dot_01 = tl.sum(incoming * _row(value, upper + 1, in_01, h * D, d, D, WIDE), 1)
            dot_10 = tl.sum(incoming * _row(value, lower, in_10, h * D, d, D, WIDE), 1)
            dot_11 = tl.sum(incoming * _row(value, lower + 1, in_11, h * D, d, D, WIDE), 1)
            upper_dot = dot_00 + x * (dot_01 - dot_00)
            lower_dot = dot_10 + x * (dot_11 - dot_10)
            along_x = (1 - y) * (dot_01 - dot_00) + y * (dot_11 - dot_10)
            here = (column == level * P + point)[None, :]
            to_attention = tl.where(here, (upper_dot + y * (lower_dot - upper_dot))[:, None], to_attention)
            to_x = tl.where(here, (attention * along_x * (1.0 if FUSED else width))[:, None], to_x)
            to_y = tl.where(here, (attention * (lower_dot - upper_dot) * (1.0 if FUSED else height))[:, None], to_y)
    if FUSED:
        attention = tl.exp(logits - largest[:, None]) * scale[:, None]
        to_attention = attention * (to_attention - tl.sum(attention * to_attention, 1)[:, None])
    at = item * (L * P) + lane[:, None] * (L * P) + column[None, :]
    written = exists[:, None] & (column < L * P)[None, :]
    tl.store(weights_gradient + at, to_attention, mask=written)
    tl.store(positions_gradient + at * 2, to_x, mask=written)
    tl.store(positions_gradient + at * 2 + 1, to_y, mask=written)


@triton.jit
def sum_records(
    output_gradient,
    order,  # of the records, by row
    bounds,  # (h * S + 1,) first record of each row
    shares,
    value_gradient,
    S,
    h,
    COUNT: tl.constexpr,  # records of one query and head
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Gradient of one image's value: each row adds its records in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < h * S
    d = tl.arange(0, BLOCK_D)
    first = tl.load(bounds + row, mask=exists, other=0)
    last = tl.load(bounds + row + 1, mask=exists, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    most = tl.max(last - first)
    i = 0
    while i < most:
        here = first + i < last
        record = tl.load(order + first + i, mask=here, other=0)
        share = tl.load(shares + record, mask=here, other=0.0)
        total += share[:, None] * _row(output_gradient, record // COUNT, here, D, d, D, False)
        i += 1
    at = value_gradient + ((row % S * h + row // S) * D)[:, None] + d[None, :]
    tl.store(at, total, mask=_mask(exists, d, D))
