"""Swin's blocks in training on CPUs: each of a block's two halves is one step of autograd that keeps little.

Of a block autograd alone keeps about 21 widths of a token: the normed tokens of both halves, queries, keys and values
and scaled copies of them, the attention's probabilities, the windows before and after they are put back, and the wide
rows of the MLP before and after GELU. Here it keeps 6: the block's input, queries, keys and values, what was attended,
and the sum after the attention; and where C is large the wide rows before GELU, 4 more. The rest is computed again.

Stochastic depth drops a half of a block for some images of a batch: for them it is not computed at all.

Letters: B batch, N = H * W tokens of an image, C channels, h heads, D channels of a head, w windows, n tokens of one.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .compiled import attend_in_windows, attend_in_windows_backward
from .cpu_layout import chunk_length
from .feed_forward import FeedForward, Norm, some_rows
from .onednn import Sums, matrix_product, plus_product, product, product_dtype

# Channels up to which the MLP's wide rows are computed again: that takes C / 2 operations for each byte not kept, and
# at 96 and 192 channels no more time than keeping them, at 384 2 to 8 % of a block's (float32 and bfloat16, AMD EPYC).
LITTLE_WORK = 192


class WindowedAttention(NamedTuple):
    """What an attention over windows takes besides tensors with gradients."""

    windows: tuple  # `swin_speed.Windows`
    heads: int
    side: int  # of a window
    scale: float  # of the scores
    eps: float  # of the norm
    factor: float  # on what is added

    def chunks(self, position_bias: Tensor, channels: int) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of the windows at a time, and the (1 or w, h, n, n) bias of their scores."""
        n, seam = self.side**2, self.windows.seam
        count = len(self.windows.tokens) // n
        whole = count - (0 if seam is None else len(seam))
        step = chunk_length(n * (8 * channels + 3 * self.heads * n), position_bias.device)
        for start in range(0, whole, step):
            yield slice(start * n, min(start + step, whole) * n), position_bias
        for start in range(whole, count, step):
            end = min(start + step, count)
            yield slice(start * n, end * n), position_bias + seam[start - whole : end - whole].to(position_bias.dtype)


class AttentionHalf(torch.autograd.Function):
    """`x + factor * project(attention(norm(x)))` of (B * N, C) tokens in windows."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, position_bias, out_weight, out_bias, options):
        (N, C), dtype = x.shape, product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            fill = x.new_zeros(3 * C, dtype=dtype) if bias is None else bias.to(dtype)
            rows = Norm(norm_weight, norm_bias, options.eps)(x)[0].to(dtype)
            projected = product(rows, weight.to(dtype), fill)
            del rows
            attended = attend_where_tokens_are(projected, fill, options.windows, position_bias, options.scale)
            ctx.compiled = attended is not None  # kernels.use_kernel may be left before the backward pass
            if not ctx.compiled:
                attended = attended_in_windows(projected, fill, position_bias, options)
            output = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, dtype))
            out_weight_cast, out_bias_cast = out_weight.to(dtype), out_bias.to(dtype)
            for some in some_rows(N, C, x.device):
                plus_product(x[some], attended[some], out_weight_cast, out_bias_cast, options.factor, output[some])
        ctx.save_for_backward(
            x, norm_weight, norm_bias, weight, bias, position_bias, out_weight, out_bias, projected, fill, attended
        )
        ctx.options = options
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, norm_weight, norm_bias, weight, bias, position_bias, out_weight, out_bias, *made = ctx.saved_tensors
        projected, fill, attended = made
        options, norm = ctx.options, Norm(norm_weight, norm_bias, ctx.options.eps)
        with torch.autocast(x.device.type, enabled=False):
            out_sums = Sums(ctx.needs_input_grad[6:8])
            of_added = gradient.to(attended.dtype)
            out_sums.add(of_added, attended, factor=options.factor)
            of_attended = matrix_product(of_added, out_weight.to(attended.dtype), options.factor)
            del of_added
            of_projected, of_fill, of_position_bias = gradients_in_windows(
                of_attended, projected, fill, position_bias, options, ctx.compiled
            )
            del of_attended
            sums = Sums(ctx.needs_input_grad[3:5])
            sums.add_to_bias(of_fill)  # padding is projected to the bias
            of_x, *of_norm = gradient_of_normed(gradient, x, norm, of_projected, weight, sums)
        return (
            of_x,
            *of_norm,
            *sums.gradients(weight, bias),
            of_position_bias.to(position_bias.dtype),
            *out_sums.gradients(out_weight, out_bias),
            None,
        )


def split_heads(rows: Tensor, options: WindowedAttention, channels: int) -> Tensor:
    """(w * n, parts * C) -> (parts, w, h, n, D)."""
    rows = rows.view(-1, options.side**2, rows.shape[1] // channels, options.heads, channels // options.heads)
    return rows.permute(2, 0, 3, 1, 4)


def attend_where_tokens_are(
    projected: Tensor, fill: Tensor, windows, position_bias: Tensor, scale: float
) -> Tensor | None:
    """(N, 3 C) tokens' queries, keys and values, and those of padding -> (N, C), if a kernel applies."""
    if attend_in_windows is None:
        return None
    seam = None if windows.seam is None else windows.seam[:, 0]
    return attend_in_windows(projected, fill, windows.places, position_bias[0], seam, scale)


def attended_in_windows(projected: Tensor, fill: Tensor, position_bias: Tensor, options: WindowedAttention) -> Tensor:
    """(N, 3 C) tokens' queries, keys and values, and (3 C,) those of padding -> (N, C)."""
    windows, C, dtype = options.windows, projected.shape[1] // 3, projected.dtype
    projected, in_windows = torch.cat([projected, fill[None]]), projected.new_empty(len(windows.places), C)
    for some, scores_bias in options.chunks(position_bias.to(dtype), C):
        query, key, value = split_heads(projected.index_select(0, windows.places[some]), options, C)
        query, key, value = (x.reshape(-1, *x.shape[2:]) for x in (query * options.scale, key, value))
        attended = torch.bmm(attention_weights(query, key, scores_bias), value)
        (into,) = split_heads(in_windows[some], options, C)
        into.copy_(attended.view(into.shape))
    return in_windows.index_select(0, windows.rows)


def gradients_in_windows(
    of_attended: Tensor,
    projected: Tensor,
    fill: Tensor,
    position_bias: Tensor,
    options: WindowedAttention,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of (N, C) gradients of what was attended those of queries, keys and values, (N, 3 C), the sum of those of
    padding, (3 C,), and that of the position bias; `compiled` if it was the kernel that attended."""
    windows, C, dtype = options.windows, of_attended.shape[1], projected.dtype
    if compiled and attend_in_windows_backward is not None:
        seam = None if windows.seam is None else windows.seam[:, 0]
        heads = (projected, fill, windows.places, position_bias[0], seam, options.scale)
        gradients = attend_in_windows_backward(of_attended, *heads)
        if gradients is not None:
            return *gradients[:2], gradients[2].unsqueeze(0)
    projected, of_attended = torch.cat([projected, fill[None]]), torch.cat([of_attended, fill.new_zeros(1, C)])
    of_windows = torch.empty(len(windows.places), 3 * C, dtype=dtype, device=projected.device)
    precise = torch.promote_types(position_bias.dtype, torch.float32)
    of_position_bias = torch.zeros(position_bias.shape, dtype=precise, device=projected.device)
    for some, scores_bias in options.chunks(position_bias.to(dtype), C):
        query, key, value = split_heads(projected.index_select(0, windows.places[some]), options, C)
        (of_output,) = split_heads(of_attended.index_select(0, windows.places[some]), options, C)
        of_parts, of_scores = attention_gradients(query, key, value, scores_bias, of_output, options.scale)
        for into, part in zip(split_heads(of_windows[some], options, C), of_parts, strict=True):
            into.copy_(part)
        of_position_bias.add_(of_scores.sum(0))
    return of_windows.index_select(0, windows.rows), of_windows[windows.padding].sum(0), of_position_bias


def attention_weights(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """(w * h, n, n) of (w * h, n, D) scaled queries and keys, and of the (1 or w, h, n, n) bias of their scores.

    torch's attention on CPUs would do the same with an exponential that is right to 1e-6, where autograd does not come
    into it; where it does, as in transformers' block, it takes these steps.
    """
    scores = torch.bmm(query, key.mT)
    scores.view(-1, *bias.shape[1:]).add_(bias)
    return scores.softmax(-1)


def attention_gradients(query, key, value, bias, of_output, scale: float) -> tuple[list[Tensor], Tensor]:
    """Of (w, h, n, D) queries, keys and values, and of the (w, h, n, n) scores."""
    shape = query.shape
    query, key, value, of_output = (x.reshape(-1, *shape[2:]) for x in (query * scale, key, value, of_output))
    weights = attention_weights(query, key, bias)
    of_value = torch.bmm(weights.mT, of_output)
    of_scores = torch._softmax_backward_data(torch.bmm(of_output, value.mT), weights, -1, weights.dtype)
    of_query, of_key = torch.bmm(of_scores, key).mul_(scale), torch.bmm(of_scores.mT, query)
    return [x.view(shape) for x in (of_query, of_key, of_value)], of_scores.unflatten(0, shape[:2])


def gradient_of_normed(gradient, x, norm: Norm, of_projected, weight, sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (N, C) tokens, which pass by as well, and of the norm's weight and bias."""
    weight, of_x = weight.to(of_projected.dtype), torch.empty_like(x)
    of_norm = [torch.zeros_like(norm.weight), torch.zeros_like(norm.bias)]
    for some in some_rows(len(x), 4 * x.shape[1], x.device):
        rows, *moments = norm(x[some])
        sums.add(of_projected[some], rows.to(weight.dtype))
        of_rows, *own = norm.backward(matrix_product(of_projected[some], weight), x[some], *moments)
        for total, part in zip(of_norm, own, strict=True):
            total.add_(part)
        torch.add(gradient[some], of_rows, out=of_x[some])
    return of_x, *of_norm


def attention_half(attention: nn.Module, norm: nn.LayerNorm, x: Tensor, windows, side: int, factor: float) -> Tensor:
    """(B, N, C) tokens plus what `SwinAttention` makes of them, normed and in `windows` of `side` x `side`."""
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    options = WindowedAttention(windows, attention.num_attention_heads, side, attention.scaling, norm.eps, factor)
    output = AttentionHalf.apply(
        x.flatten(0, 1),
        norm.weight,
        norm.bias,
        torch.cat([part.weight for part in parts]),
        bias,
        attention.relative_position_bias(),
        attention.o_proj.weight,
        attention.o_proj.bias,
        options,
    )
    return output.view_as(x)


def feed_forward_half(mlp: nn.Module, norm: nn.LayerNorm, x: Tensor, factor: float) -> Tensor:
    """(B, N, C) tokens plus what `SwinMLP` makes of them, normed."""
    keep = x.shape[-1] > LITTLE_WORK
    layers = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    output = FeedForward.apply(x.flatten(0, 1), norm.weight, norm.bias, *layers, ("gelu", norm.eps, factor, keep))
    return output.view_as(x)


def for_kept_images(drop_path: nn.Module, x: Tensor, half: Callable[[Tensor, float], Tensor]) -> Tensor:
    """`half(x, factor)` of the images in (B, N, C) whose path `SwinDropPath` keeps; the others stay as they are.

    It draws what transformers' would draw, so a seed means the same.
    """
    if not (drop_path.training and getattr(drop_path, "drop_prob", 0.0)):
        return half(x, 1.0)
    keep = 1 - drop_path.drop_prob
    drawn = torch.rand((len(x), 1, 1), dtype=product_dtype(x), device=x.device)
    kept = (drawn + keep).floor().flatten().bool().tolist()
    if all(kept):
        return half(x, 1 / keep)
    images = x.unbind(0)
    chosen = [image for image, stays in zip(images, kept, strict=True) if stays]
    if not chosen:
        return torch.cat([x, half(x[:0], 1.0)])  # so that the parameters get gradients, of zero
    done = iter(half(torch.stack(chosen), 1 / keep).unbind(0))
    return torch.stack([next(done) if stays else image for image, stays in zip(images, kept, strict=True)])
