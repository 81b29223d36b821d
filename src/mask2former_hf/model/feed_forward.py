"""Feed-forward blocks in training: a norm, two linear layers and the sum with what came in, as one step of autograd.

Autograd alone keeps the normed rows, and the wide rows before and after the activation: 10 widths of a row. Here the
rows that came in are kept, and if asked for the wide rows before the activation: 1 or 5 widths. The rest is computed
again, for some rows at a time, so that it stays near the caches.

Letters: N rows, C channels, W the width inside.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_layout import chunk_length

ACTIVATIONS = {
    "gelu": (F.gelu, lambda gradient, x: torch.ops.aten.gelu_backward(gradient, x)),
    "relu": (F.relu, lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0)),
}


class Norm(NamedTuple):
    """Layer norm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed rows, and of each row mean and inverse deviation."""
        return torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def backward(self, gradient: Tensor, x: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of rows, weight and bias."""
        return torch.ops.aten.native_layer_norm_backward(
            gradient.to(x.dtype), x, x.shape[-1:], mean, deviation, self.weight, self.bias, [True, True, True]
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """In which linear layers multiply: autocast's dtype, which leaves float64 alone, or that of the rows."""
    kind = x.device.type  # of tensors without data autocast knows nothing
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def some_rows(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` rows that take `width` float32 each inside."""
    step = chunk_length(width, device)
    return (slice(start, start + step) for start in range(0, count, step))


class Sums:
    """Sums over chunks of rows, in float32 at least: the gradients of a linear layer's parameters."""

    def __init__(self, weight: Tensor, wanted: tuple[bool, bool]):
        """`wanted`: whether the weight's is, and the bias's; either may be frozen alone."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        self.weight, self.bias = (
            torch.zeros(shape, dtype=precise, device=weight.device) if asked else None
            for shape, asked in zip((weight.shape, weight.shape[:1]), wanted, strict=True)
        )

    def add(self, gradient: Tensor, rows: Tensor):
        """(N, O) gradients of the layer's results and its (N, I) rows."""
        if self.weight is not None:
            if gradient.dtype == self.weight.dtype:
                self.weight.addmm_(gradient.T, rows)
            else:
                self.weight.add_(gradient.T @ rows)
        if self.bias is not None:
            self.bias.add_(gradient.sum(0))

    def gradients(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None else self.bias.to(bias.dtype),
        )


class FeedForward(torch.autograd.Function):
    """`x + factor * second(activation(first(norm(x))))` of (N, C) rows; without a norm if its weight is None."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, options):
        activation, eps, factor, keep = options
        dtype, width = product_dtype(x), first_weight.shape[0]
        function, _ = ACTIVATIONS[activation]
        output = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, dtype), device=x.device)
        kept = torch.empty(len(x), width, dtype=dtype, device=x.device) if keep else None
        weights = [weight.to(dtype) for weight in (first_weight, second_weight)]
        biases = [bias.to(dtype) for bias in (first_bias, second_bias)]
        with torch.autocast(x.device.type, enabled=False):
            for some in some_rows(len(x), width, x.device):
                rows = x[some] if norm_weight is None else Norm(norm_weight, norm_bias, eps)(x[some])[0]
                if keep:
                    hidden = torch.addmm(biases[0], rows.to(dtype), weights[0].T, out=kept[some])
                else:
                    hidden = torch.addmm(biases[0], rows.to(dtype), weights[0].T)
                added = torch.addmm(biases[1], function(hidden), weights[1].T)
                torch.add(x[some], added, alpha=factor, out=output[some])
        ctx.save_for_backward(x, norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, kept)
        ctx.options, ctx.dtype = options, dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, kept = ctx.saved_tensors
        (activation, eps, factor, _), dtype = ctx.options, ctx.dtype
        function, derivative = ACTIVATIONS[activation]
        of_x = torch.empty_like(x)
        wanted = ctx.needs_input_grad
        first, second = Sums(first_weight, wanted[3:5]), Sums(second_weight, wanted[5:7])
        norm = None if norm_weight is None else Norm(norm_weight, norm_bias, eps)
        of_norm = [None, None] if norm is None else [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        weights = [weight.to(dtype) for weight in (first_weight, second_weight)]
        with torch.autocast(x.device.type, enabled=False):
            for some in some_rows(len(x), first_weight.shape[0], x.device):
                rows, *moments = (x[some],) if norm is None else norm(x[some])
                rows, of_added = rows.to(dtype), gradient[some].to(dtype)
                of_added = of_added if factor == 1 else of_added * factor
                hidden = torch.addmm(first_bias.to(dtype), rows, weights[0].T) if kept is None else kept[some]
                second.add(of_added, function(hidden))
                of_hidden = derivative(of_added @ weights[1], hidden)
                first.add(of_hidden, rows)
                of_rows = of_hidden @ weights[0]
                if norm is not None:
                    of_rows, *own = norm.backward(of_rows, x[some], *moments)
                    for total, part in zip(of_norm, own, strict=True):
                        total.add_(part)
                torch.add(gradient[some], of_rows, out=of_x[some])
        return (
            of_x,
            *of_norm,
            *first.gradients(first_weight, first_bias),
            *second.gradients(second_weight, second_bias),
            None,
        )
