"""Feed-forward blocks in training: a norm, two linear layers and the sum with what came in, as one step of autograd.

Autograd alone keeps the normed rows, and the wide rows before and after the activation: 10 widths of a row. Here the
rows that came in are kept, and if asked for the wide rows before the activation: 1 or 5 widths. The rest is computed
again, for some rows at a time, so that it stays near the caches.

Letters: N rows, C channels, W the width inside.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .compiled import activation_backward_
from .cpu_layout import chunk_length
from .onednn import Sums, matrix_product, plus_product, product, product_dtype


class Activation(NamedTuple):
    """What lies between the two layers: a part of the first product, and a function of that product's result."""

    within: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]  # of a gradient and the product's result


ACTIVATIONS = {
    "gelu": Activation("none", F.gelu, torch.ops.aten.gelu_backward),
    "relu": Activation("relu", lambda y: y, lambda gradient, y: torch.ops.aten.threshold_backward(gradient, y, 0)),
}


def gradients_before_(
    name: str, gradient: Tensor, wide: Tensor, keep_wide: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of (N, W) gradients after an activation: the activated rows, the gradients before, and their sums if at hand.

    The gradients may be written over, and unless they are to be kept the wide rows.
    """
    if activation_backward_ is not None:
        found = activation_backward_(name, gradient, wide, keep_wide)
        if found is not None:
            return found
    activation = ACTIVATIONS[name]
    return activation.function(wide), activation.derivative(gradient, wide), None


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


def some_rows(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `count` rows that take `width` float32 each inside: on CPUs half of a chunk, as there are up to four
    such tensors at a time, and what they leave free at the heap's end goes back to the system."""
    step = chunk_length(2 * width if device.type == "cpu" else width, device)
    return (slice(start, start + step) for start in range(0, count, step))


class FeedForward(torch.autograd.Function):
    """`x + factor * second(activation(first(norm(x))))` of (N, C) rows; without a norm if its weight is None."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, options):
        activation, eps, factor, keep = options
        activation, dtype, width = ACTIVATIONS[activation], product_dtype(x), first_weight.shape[0]
        output = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, dtype), device=x.device)
        weights = [weight.to(dtype) for weight in (first_weight, second_weight)]
        biases = [bias.to(dtype) for bias in (first_bias, second_bias)]
        kept = []
        with torch.autocast(x.device.type, enabled=False):
            for some in some_rows(len(x), width, x.device):
                rows = x[some] if norm_weight is None else Norm(norm_weight, norm_bias, eps)(x[some])[0]
                wide = product(rows.to(dtype), weights[0], biases[0], activation.within)
                if keep:
                    kept.append(wide)
                plus_product(x[some], activation.function(wide), weights[1], biases[1], factor, output[some])
        ctx.save_for_backward(x, norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, *kept)
        ctx.options, ctx.dtype = options, dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias, *kept = ctx.saved_tensors
        (activation, eps, factor, keep), dtype, wanted = ctx.options, ctx.dtype, ctx.needs_input_grad
        activation, of_x = ACTIVATIONS[activation], torch.empty_like(x)
        first, second = Sums(wanted[3:5]), Sums(wanted[5:7])
        norm = None if norm_weight is None else Norm(norm_weight, norm_bias, eps)
        of_norm = [None, None] if norm is None else [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        weights = [weight.to(dtype) for weight in (first_weight, second_weight)]
        with torch.autocast(x.device.type, enabled=False):
            for index, some in enumerate(some_rows(len(x), first_weight.shape[0], x.device)):
                rows, *moments = (x[some],) if norm is None else norm(x[some])
                rows, of_added = rows.to(dtype), gradient[some].to(dtype)
                wide = kept[index] if keep else product(rows, weights[0], first_bias.to(dtype), activation.within)
                of_activated = matrix_product(of_added, weights[1], factor)
                activated, of_wide, of_bias = gradients_before_(ctx.options[0], of_activated, wide, keep)
                second.add(of_added, activated, factor=factor)
                first.add(of_wide, rows, of_bias)
                if norm is None:
                    plus_product(gradient[some], of_wide, weights[0].T, None, 1.0, of_x[some])
                    continue
                of_rows, *own = norm.backward(matrix_product(of_wide, weights[0]), x[some], *moments)
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
