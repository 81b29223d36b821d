"""Convolution, batch norm, residual sum and ReLU together: ResNet at inference.

On x86 CPUs they are one operator of oneDNN; on GPUs what follows a convolution is one kernel.

Norms, sums and ReLUs go over every activation again, which takes 6 % of ResNet-50's time in bfloat16; and in float32
the operator's 1x1 convolutions are 10 to 35 % faster than torch's. A norm with fixed statistics is linear, so it is
multiplied into the convolution's weights, anew in every call: that is 1 % of the time, and parameters that somebody
has changed, also through `.data` as adapters do when they are merged, are never stale. Parameters, names and the state
dict stay. Training, autocast, traced, compiled and exported models, other devices, adapters and hooks take torch's own
path.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compiled import batch_norm_, product
from .compiled import convolution as compiled_convolution
from .cpu_layout import hooked, map_of, plain, tokens_of
from .onednn import is_x86_with_onednn, runs_eagerly

DTYPES = (torch.float32, torch.bfloat16)  # on CPUs


def _may_run_on_a_gpu(x: Tensor) -> bool:
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not recorded and x.device.type == "cuda" and batch_norm_ is not None


def folds(x: Tensor, convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether the two parts are what they were built as, their result is not recorded, and something can make it."""
    return (
        (runs_eagerly(x) or _may_run_on_a_gpu(x))
        and type(convolution) is nn.Conv2d
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and isinstance(norm, nn.BatchNorm2d)
        and not norm.training
        and norm.affine
        and norm.running_mean is not None
        and not any(hooked(part) for part in (convolution, norm))
        and plain(convolution.weight, convolution.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        and x.dim() == 4
        and x.shape[2] * x.shape[3] > 1  # of one pixel no layout can be told, and sums in bfloat16 fail
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.dtype == convolution.weight.dtype
        and (x.device.type != "cpu" or x.dtype in DTYPES and one_operator_works(x.dtype))
    )


def folded(
    x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d, rectify: bool, plus: Tensor | None = None
) -> Tensor:
    """(B, C, H, W) -> norm(convolution(x)), `plus` that, and a ReLU if asked for."""
    if x.device.type != "cpu":
        return finished(convolution(x), norm, rectify, plus)
    scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
    shift = norm.bias.float() - norm.running_mean.float() * scale
    if convolution.bias is not None:
        shift = shift + convolution.bias.float() * scale
    if convolution.kernel_size == convolution.stride == (1, 1) and convolution.padding == (0, 0):
        found = _pointwise(x, convolution, scale, shift.to(x.dtype), rectify, plus)
        if found is not None:
            return found
    if plus is None and compiled_convolution is not None:
        found = compiled_convolution(x, convolution, scale, shift, rectify)
        if found is not None:
            return found
    weight = torch.empty_like(convolution.weight)
    torch.mul(convolution.weight, scale[:, None, None, None], out=weight)  # rounded once
    geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
    return one_operator(x, weight, shift.to(x.dtype), geometry, rectify, plus)


def _pointwise(x: Tensor, convolution: nn.Conv2d, scale: Tensor, shift: Tensor, rectify: bool, plus: Tensor | None):
    """A product, which scales its own sums: the weights need not be changed. None if there is none for the dtype."""
    if product is None or convolution.groups != 1:
        return None
    rows = None if plus is None else tokens_of(plus)
    then = "relu" if rectify else "none"
    output = product(tokens_of(x), convolution.weight.flatten(1), shift, then, rows, scale)
    return None if output is None else map_of(output, x.shape[-2:])


def finished(x: Tensor, norm: nn.BatchNorm2d, rectify: bool, plus: Tensor | None) -> Tensor:
    """norm(x), `plus` that, and a ReLU if asked for, by one kernel if there is one for x's layout."""
    if batch_norm_ is not None and batch_norm_(x, norm, plus, rectify):
        return x
    x = norm(x) if plus is None else norm(x).add_(plus)
    return F.relu(x, inplace=True) if rectify else x


def one_operator(x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple, rectify: bool, plus: Tensor | None):
    """What torch's own compiler calls for such sequences. Sums need channels innermost in both terms."""
    operator, after = torch.ops.mkldnn._convolution_pointwise, "relu" if rectify else "none"
    if plus is None:
        return operator(x, weight, bias, *geometry, after, [], "")
    return operator.binary(x, plus, weight, bias, *geometry, "add", 1.0, after if rectify else None, [], None)


@cache
def one_operator_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operator, which is not public, and it gives what it should."""
    if not is_x86_with_onednn():
        return False
    with torch.inference_mode():
        x = torch.ones(1, 2, 3, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = -torch.ones(2, 2, 1, 1, dtype=dtype), torch.full((2,), 3, dtype=dtype)
        try:
            found = [
                one_operator(x, weight, bias, ((0, 0), (1, 1), (1, 1), 1), True, plus) for plus in (None, x, -2 * x)
            ]
        except (RuntimeError, AttributeError, TypeError):
            return False
        return all(bool((y == value).all()) for y, value in zip(found, (1, 2, 0), strict=True))
