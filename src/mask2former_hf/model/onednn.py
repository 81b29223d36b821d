"""Products of matrices by oneDNN's operators on x86 CPUs in eager mode: at inference with a ReLU or GELU inside, in
training as a step of autograd of their own.

torch multiplies float32 with MKL, which on AMD's processors is slower than oneDNN: by 18 to 28 % at the sizes of the
pixel decoder (EPYC with AVX-512, one thread). In bfloat16 both are oneDNN, but torch's way writes the bias first and
adds to it: 5 to 15 %. The operators are those that torch's own compiler calls; weights are given as they are, so
nothing is kept. The operator's GELU is off by some 1e-6, so in float32 it stays torch's.
In training results are such products, too (float32: 15 to 40 % faster than MKL's). Gradients of weights, and of rows
in bfloat16, are products of the package's own on AMD's CPUs, elsewhere torch's and oneDNN's.
Traced, compiled and exported models, other devices, adapters, hooks and tensors of other classes (quantized,
distributed) take torch's own path.
"""

import platform
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compiled import feed_forward as compiled_feed_forward
from .compiled import matrix_product as compiled_matrix_product
from .compiled import product as compiled_product
from .cpu_layout import hooked, plain, transformed

AFTER = {"none": lambda x: x, "relu": F.relu_, "gelu": F.gelu}


def linear(layer: nn.Linear, x: Tensor, then: str = "none") -> Tensor:
    """layer(x), `then` rectified or through the exact GELU."""
    if type(layer) is nn.Linear and not hooked(layer):
        return product(x, layer.weight, layer.bias, then)
    output = layer(x)
    return F.relu(output) if then == "relu" else AFTER[then](output)  # a hook may have kept it


def product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """F.linear(x, weight, bias), `then` "none", "relu" or "gelu"."""
    if compiled_product is not None and x.dtype == weight.dtype == torch.bfloat16:
        output = compiled_product(x, weight, bias, then)
        if output is not None:
            return output
    if runs_eagerly(x) and plain(weight, bias) and x.dtype == weight.dtype and products_are_faster(x.dtype):
        if then == "gelu" and x.dtype == torch.float32:
            return torch.ops.aten.gelu_(product(x, weight, bias))
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none" if then == "gelu" else "")
    if records_eagerly(x) and plain(weight, bias) and products_are_faster(product_dtype(x)):
        rows = RecordedProduct.apply(x.flatten(0, -2), weight, bias)
        return AFTER[then](rows).view(*x.shape[:-1], len(weight))
    return AFTER[then](F.linear(x, weight, bias))


def feed_forward(
    first: nn.Linear, second: nn.Linear, x: Tensor, then: str, plus: Tensor | None = None
) -> Tensor | None:
    """Both layers at once, `then` in between, so that the wide rows stay in the caches, and `plus` that; None if it
    was not done."""
    if compiled_feed_forward is None or type(first) is not nn.Linear or type(second) is not nn.Linear:
        return None
    return None if hooked(first) or hooked(second) else compiled_feed_forward(x, first, second, then, plus)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which linear layers multiply: autocast's dtype, which leaves float64 alone, or that of the rows."""
    kind = x.device.type  # of tensors without data autocast knows nothing
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def matrix_product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a @ b of (M, K) and (K, N), where no gradient is recorded."""
    if a.dtype == torch.bfloat16:  # in float32 oneDNN is as fast
        output = _own_product(a, b, scale=scale)
        if output is not None:
            return output
    output = product(a, b.T, None)
    return output if scale == 1 else output.mul_(scale)


def plus_product(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, factor: float, out: Tensor):
    """x + factor * F.linear(rows, weight, bias) into `out`, of x's shape, where no gradient is recorded."""
    plus = x if x.dtype == out.dtype else x.to(out.dtype)
    if _own_product(rows, weight.T, bias, scale=factor, plus=plus, out=out) is None:
        torch.add(x, product(rows, weight, bias), alpha=factor, out=out)


def _own_product(*factors: Tensor | None, **options) -> Tensor | None:
    if compiled_matrix_product is None or not made_by_amd():  # Intel's have units for products, which oneDNN knows
        return None
    return compiled_matrix_product(*factors, **options)


class Sums:
    """Sums over chunks of rows, in float32 at least: the gradients of a linear layer's parameters."""

    def __init__(self, wanted: tuple[bool, bool]):
        """`wanted`: whether the weight's is, and the bias's; either may be frozen alone."""
        self.wants_weight, self.wants_bias = wanted
        self.weight = self.bias = None

    def add(self, gradient: Tensor, rows: Tensor, of_bias: Tensor | None = None, factor: float = 1.0):
        """(N, O) gradients of the layer's results, its (N, I) rows, and sums of the gradients if they are known;
        `factor` is on the gradients."""
        if self.wants_weight and self._add_at_once(gradient, rows, of_bias, factor):
            return
        gradient = gradient if factor == 1 else gradient * factor
        if self.wants_weight:
            if self.weight is None:
                self.weight = _precise(gradient.T @ rows)
            elif gradient.dtype == self.weight.dtype:
                self.weight.addmm_(gradient.T, rows)
            else:
                self.weight.add_(gradient.T @ rows)
        self.add_to_bias(gradient.sum(0) if self.wants_bias and of_bias is None else of_bias)

    def _add_at_once(self, gradient: Tensor, rows: Tensor, of_bias: Tensor | None, factor: float) -> bool:
        """By the package's product, which sums the gradients up while it reads them; False if it does not apply."""
        plus = weight = self.weight
        if weight is None:
            weight = rows.new_empty(gradient.shape[1], rows.shape[1], dtype=torch.float32)
        sums = None
        if self.wants_bias and of_bias is None:
            sums = weight.new_zeros(len(weight)) if self.bias is None else self.bias
        if _own_product(gradient.T, rows, scale=factor, plus=plus, out=weight, sums=sums) is None:
            return False
        self.weight, self.bias = weight, self.bias if sums is None else sums
        self.add_to_bias(of_bias)
        return True

    def add_to_bias(self, sums: Tensor | None):
        if self.wants_bias and sums is not None:
            self.bias = _precise(sums) if self.bias is None else self.bias.add_(sums)

    def gradients(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of the parameters, zero where there was no row."""
        given = ((self.wants_weight, self.weight, weight), (self.wants_bias, self.bias, bias))
        return tuple(
            None if not asked else torch.zeros_like(parameter) if sums is None else sums.to(parameter.dtype)
            for asked, sums, parameter in given
        )


def _precise(sums: Tensor) -> Tensor:
    return sums.to(torch.promote_types(sums.dtype, torch.float32))


class RecordedProduct(torch.autograd.Function):
    """`F.linear` of (N, I) rows."""

    @staticmethod
    def forward(ctx, rows, weight, bias):
        dtype = product_dtype(rows)
        rows = rows.to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            output = product(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        ctx.save_for_backward(rows, weight, bias)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        rows, weight, bias = ctx.saved_tensors
        sums = Sums(ctx.needs_input_grad[1:3])
        with torch.autocast(rows.device.type, enabled=False):
            sums.add(gradient, rows)
            of_rows = matrix_product(gradient, weight.to(rows.dtype)) if ctx.needs_input_grad[0] else None
        return of_rows, *sums.gradients(weight, bias)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, dropout: float
) -> Tensor:
    """torch's; where gradients of bfloat16 are recorded on x86 CPUs, in float32: forward and backward, casts included,
    that takes 0.85 of the time of 100 queries and 4096 keys, and half of that of 100 keys on an AMD EPYC, 0.75 and a
    quarter on an Intel Xeon with AMX."""
    if not (query.dtype == torch.bfloat16 and records_eagerly(query) and is_x86_with_onednn()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        heads = (x.float() for x in (query, key, value))
        output = F.scaled_dot_product_attention(*heads, attn_mask=allowed, dropout_p=dropout)
        return output.to(query.dtype)


def times_features(rows: Tensor, features: Tensor) -> Tensor:
    """(B, Q, C) @ (B, C, S); image by image where channels are innermost: torch's batched product would transpose the
    features, which in bfloat16 takes longer than to multiply them."""
    by_pixel = features.transpose(1, 2)  # (B, S, C)
    if not (runs_eagerly(rows) and by_pixel.is_contiguous() and products_are_faster(rows.dtype)):
        return rows @ features
    products = [product(some, pixels, None) for some, pixels in zip(rows, by_pixel, strict=True)]
    return products[0].unsqueeze(0) if len(products) == 1 else torch.stack(products)


def times_map(rows: Tensor, features: Tensor) -> Tensor:
    """(B, Q, C) rows and (B, C, H, W) features -> (B, Q, H, W)."""
    if runs_eagerly(features):
        return times_features(rows, features.flatten(2)).unflatten(-1, features.shape[-2:])
    return torch.einsum("bqc,bchw->bqhw", rows, features)


def runs_eagerly(x: Tensor) -> bool:
    """Whether x is a plain tensor of a CPU and nothing records or replaces what is done with it."""
    return _is_eager(x) and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def records_eagerly(x: Tensor) -> bool:
    """Whether x is a plain tensor of a CPU, and what is done with it is recorded for gradients and nothing else."""
    return _is_eager(x) and torch.is_grad_enabled()


def _is_eager(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() > 0
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())
        and torch.backends.mkldnn.enabled
        and not transformed()
    )


def is_x86_with_onednn() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


@cache
def products_are_faster(dtype: torch.dtype) -> bool:
    """Whether the operator, which is not public, is in this build of torch, right, and faster here."""
    if not is_x86_with_onednn() or not (dtype == torch.bfloat16 or dtype == torch.float32 and made_by_amd()):
        return False
    with torch.inference_mode():
        x, weight, bias = (torch.eye(3, dtype=dtype), -torch.ones(2, 3, dtype=dtype), torch.full((2,), 3, dtype=dtype))
        try:
            found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
            smooth = torch.ops.mkldnn._linear_pointwise(x, weight, None, "gelu", [], "none")
        except (RuntimeError, AttributeError, TypeError):
            return False
        return bool((found == 2).all()) and torch.allclose(smooth.float(), torch.tensor(-0.1587), atol=1e-3)


@cache
def made_by_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return any("AuthenticAMD" in line for line in info if line.startswith("vendor_id"))
    except OSError:
        return "AuthenticAMD" in platform.processor()  # Windows names it there
