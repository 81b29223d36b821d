"""Products of matrices by oneDNN's operators with a ReLU or GELU inside: inference on x86 CPUs, in eager mode.

torch multiplies float32 with MKL, which on AMD's processors is slower than oneDNN: by 18 to 28 % at the sizes of the
pixel decoder (EPYC with AVX-512, one thread). In bfloat16 both are oneDNN, but torch's way writes the bias first and
adds to it: 5 to 15 %. The operators are those that torch's own compiler calls; weights are given as they are, so
nothing is kept. The operator's GELU is off by some 1e-6, so in float32 it stays torch's.
Graphs, autocast, traced, compiled and exported models, other devices, adapters, hooks and tensors of other classes
(quantized, distributed) take torch's own path.
"""

import platform
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cpu_layout import hooked, plain

AFTER = {"none": lambda x: x, "relu": F.relu_, "gelu": F.gelu}


def linear(layer: nn.Linear, x: Tensor, then: str = "none") -> Tensor:
    """layer(x), `then` rectified or through the exact GELU."""
    if type(layer) is nn.Linear and not hooked(layer):
        return product(x, layer.weight, layer.bias, then)
    output = layer(x)
    return F.relu(output) if then == "relu" else AFTER[then](output)  # a hook may have kept it


def product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """F.linear(x, weight, bias), `then` "none", "relu" or "gelu"."""
    if runs_eagerly(x) and plain(weight, bias) and x.dtype == weight.dtype and products_are_faster(x.dtype):
        if then == "gelu" and x.dtype == torch.float32:
            return F.gelu(product(x, weight, bias))
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none" if then == "gelu" else "")
    return AFTER[then](F.linear(x, weight, bias))


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
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.numel() > 0
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export())
        and torch.backends.mkldnn.enabled
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


def made_by_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as info:
            return any("AuthenticAMD" in line for line in info if line.startswith("vendor_id"))
    except OSError:
        return "AuthenticAMD" in platform.processor()  # Windows names it there
