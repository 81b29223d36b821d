"""Attention over shifted windows in Triton (Liu et al., "Swin Transformer", ICCV 2021), forward and backward.

Queries, keys and values are rows (B, H, W, 3 C) of tokens as they were projected, the result is (B, H, W, C): padding,
the shift and the cut into windows of n = SIDE * SIDE tokens are arithmetic on row numbers, so nothing is copied for
them, and no mask of scores exists in memory. Where a window reaches past the last row or column of tokens it holds
padding: keys and values of `fill` there, and queries that nobody reads. Scores of tokens that only the shift made
neighbours get OTHER_REGION added, as in the original.

Products are of the dtype of `projected`, everything else is float32. In the forward pass a program has ROWS queries of
a window and head and goes through their keys COLUMNS at a time, with FlashAttention's running maximum and sum (Dao et
al., NeurIPS 2022).

In the backward pass a program goes through every `groups`-th window and has all its keys at once, COLUMNS of them (n
rounded up to a power of two, at least 16). What a window gives to the position bias and to `fill` it adds to sums of
its own: no atomics, so the gradients are the same in every run.

This module imports Triton: only windows.py imports it, on first use. `triton.jit` compiles on the first call.
"""

import triton
import triton.language as tl

OTHER_REGION = tl.constexpr(-100.0)


@triton.jit
def _tokens(window, row, H, W, shift, SIDE: tl.constexpr):
    """Of rows of a window the token, whether there is one, and on which side of the seams of the shift it is."""
    across = tl.cdiv(W, SIDE)
    height = tl.cdiv(H, SIDE) * SIDE
    width = across * SIDE
    y = window // across * SIDE + row // SIDE
    x = window % across * SIDE + row % SIDE
    region = (y >= height - shift).to(tl.int32) * 2 + (x >= width - shift).to(tl.int32)
    y += shift
    x += shift
    y = tl.where(y >= height, y - height, y)
    x = tl.where(x >= width, x - width, x)
    exists = (row < SIDE * SIDE) & (y < H) & (x < W)
    return (y * W + x).to(tl.int64), exists, region


@triton.jit
def _filled(rows, fill, token, exists, in_window, d, stride, D: tl.constexpr):
    """(COLUMNS, BLOCK_D) keys or values of a window, with what padding is projected to."""
    inside = (d < D)[None, :]
    found = tl.load(rows + token[:, None] * stride + d[None, :], mask=exists[:, None] & inside, other=0.0)
    padding = tl.load(fill + d, mask=d < D, other=0.0).to(found.dtype)
    return tl.where((in_window & (exists == 0))[:, None], padding[None, :], found)


@triton.jit
def _scores(
    query, key, position_bias, row, column, of_row, of_column, scale, N: tl.constexpr, PRECISION: tl.constexpr
):
    """(ROWS, COLUMNS) scores with position bias and seams, -inf past the last key."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    at = position_bias + row[:, None] * N + column[None, :]
    scores += tl.load(at, mask=(row < N)[:, None] & (column < N)[None, :], other=0.0).to(tl.float32)
    scores += tl.where(of_row[:, None] == of_column[None, :], 0.0, OTHER_REGION)
    return tl.where((column < N)[None, :], scores, float("-inf"))


@triton.jit
def forward_kernel(
    projected, fill, position_bias, output, normalizers,  # (B, H, W, h) float32, of the softmax
    H, W, shift, scale, h,
    D: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = SIDE * SIDE
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    C = h * D
    head = tl.program_id(0) // BLOCKS % h
    window = tl.program_id(0) // BLOCKS // h
    windows = tl.cdiv(H, SIDE) * tl.cdiv(W, SIDE)
    image = (window // windows).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    projected += image * H * W * 3 * C + head * D
    fill += head * D
    position_bias += head * N * N
    token, exists, of_row = _tokens(window % windows, row, H, W, shift, SIDE)
    written = exists[:, None] & (d < D)[None, :]
    query = tl.load(projected + token[:, None] * (3 * C) + d[None, :], mask=written, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    attended = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, N, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        key_token, key_exists, of_column = _tokens(window % windows, column, H, W, shift, SIDE)
        key = _filled(projected + C, fill + C, key_token, key_exists, column < N, d, 3 * C, D)
        value = _filled(projected + 2 * C, fill + 2 * C, key_token, key_exists, column < N, d, 3 * C, D)
        scores = _scores(query, key, position_bias, row, column, of_row, of_column, scale, N, PRECISION)
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        before = tl.exp(largest - larger)
        total = total * before + tl.sum(weights, 1)
        attended = attended * before[:, None]
        attended += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        largest = larger
    token += image * H * W
    tl.store(output + token[:, None] * C + head * D + d[None, :], attended / total[:, None], mask=written)
    tl.store(normalizers + token * h + head, largest + tl.log(total), mask=exists)


@triton.jit
def backward_kernel(
    gradient, projected, fill, position_bias, output, normalizers,
    projected_gradient,
    bias_gradients, fill_gradients,  # (groups, h, N, N) zeros and (groups, 2, h, D), float32
    H, W, shift, scale, h, windows,  # of the whole batch
    groups,
    D: tl.constexpr, SIDE: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = SIDE * SIDE
    C = h * D
    head = tl.program_id(0) % h
    group = tl.program_id(0) // h
    windows_of_image = tl.cdiv(H, SIDE) * tl.cdiv(W, SIDE)
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, COLUMNS)
    fill += head * D
    position_bias += head * N * N
    bias_gradients += tl.program_id(0).to(tl.int64) * (N * N)
    of_fill_key = tl.zeros((BLOCK_D,), tl.float32)
    of_fill_value = tl.zeros((BLOCK_D,), tl.float32)
    for window in range(group, windows, groups):
        tokens = (window // windows_of_image).to(tl.int64) * H * W  # before this image
        rows = projected + tokens * 3 * C + head * D
        gradient_rows = projected_gradient + tokens * 3 * C + head * D
        key_token, key_exists, of_column = _tokens(window % windows_of_image, column, H, W, shift, SIDE)
        padding = ((column < N) & (key_exists == 0))[:, None]
        key = _filled(rows + C, fill + C, key_token, key_exists, column < N, d, 3 * C, D)
        value = _filled(rows + 2 * C, fill + 2 * C, key_token, key_exists, column < N, d, 3 * C, D)
        of_key = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
        of_value = tl.zeros((COLUMNS, BLOCK_D), tl.float32)
        for start in range(0, N, ROWS):
            row = start + tl.arange(0, ROWS)
            token, exists, of_row = _tokens(window % windows_of_image, row, H, W, shift, SIDE)
            there = exists[:, None] & (d < D)[None, :]
            query = tl.load(rows + token[:, None] * (3 * C) + d[None, :], mask=there, other=0.0)
            at = (tokens + token)[:, None] * C + head * D + d[None, :]
            incoming = tl.load(gradient + at, mask=there, other=0.0)
            attended = tl.load(output + at, mask=there, other=0.0)
            normalizer = tl.load(normalizers + (tokens + token) * h + head, mask=exists, other=float("inf"))
            scores = _scores(query, key, position_bias, row, column, of_row, of_column, scale, N, PRECISION)
            weights = tl.exp(scores - normalizer[:, None])  # 0 for queries that are padding
            of_value += tl.dot(tl.trans(weights).to(value.dtype), incoming, input_precision=PRECISION)
            of_weights = tl.dot(incoming, tl.trans(value), input_precision=PRECISION)
            shared = tl.sum(incoming.to(tl.float32) * attended.to(tl.float32), 1)
            of_scores = weights * (of_weights - shared[:, None])
            at = bias_gradients + row[:, None] * N + column[None, :]
            inside = (row < N)[:, None] & (column < N)[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) + of_scores, mask=inside)
            of_scores = of_scores.to(key.dtype)
            of_query = tl.dot(of_scores, key, input_precision=PRECISION) * scale
            tl.store(gradient_rows + token[:, None] * (3 * C) + d[None, :], of_query, mask=there)
            of_key += tl.dot(tl.trans(of_scores), query, input_precision=PRECISION) * scale
        there = key_exists[:, None] & (d < D)[None, :]
        at = key_token[:, None] * (3 * C) + d[None, :]
        tl.store(gradient_rows + C + at, of_key, mask=there)
        tl.store(gradient_rows + 2 * C + at, of_value, mask=there)
        of_fill_key += tl.sum(tl.where(padding, of_key, 0.0), 0)
        of_fill_value += tl.sum(tl.where(padding, of_value, 0.0), 0)
        tl.debug_barrier()  # the next window adds to the same sums
    at = fill_gradients + group.to(tl.int64) * 2 * C + head * D + d
    tl.store(at, of_fill_key, mask=d < D)
    tl.store(at + C, of_fill_value, mask=d < D)
