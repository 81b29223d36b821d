"""Compiled multi-scale deformable attention, norms, and attention over Swin's windows.

`deformable_attention` is what the model calls; it returns None where no compiled kernel applies, and the model then
runs the plain PyTorch formula. Kernels: "cpp" on CPUs (float32, bfloat16), "triton" on GPUs (float32, float16,
bfloat16). "reference" is the PyTorch formula.
"""

import contextlib
import contextvars
from collections.abc import Callable

import torch
from torch import Tensor

from . import convolutions, cpu, norms, problem, triton_gpu, windows
from .choosing import ENVIRONMENT_VARIABLE, KERNELS, chosen_name, kernel_report, select, use_kernel
from .operators import dtype_under_autocast, fused
from .training import activation_backward_, matrix_product, uncertain_points, uniform_points

# Elements from which a kernel saves more of a GPU's time than its launch from Python takes of the host's: 0.1 ms and
# more (H200, with a host that takes 30 us for an operator of torch).
BATCH_NORM_FROM, LAYER_NORM_FROM, GROUP_NORM_FROM = 2**26, 2**24, 2**21


_for_a_graph: contextvars.ContextVar[bool] = contextvars.ContextVar("mask2former_hf_for_a_graph", default=False)


@contextlib.contextmanager
def for_a_graph():
    """Run the model inside with the kernels that it has in a CUDA graph: before one is captured, so that they are
    compiled by then."""
    token = _for_a_graph.set(True)
    try:
        yield
    finally:
        _for_a_graph.reset(token)


def leaving_pytorch() -> bool:
    """Whether the model is being traced for another system, which knows no operators of ours."""
    return torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


__all__ = [
    "ENVIRONMENT_VARIABLE",
    "KERNELS",
    "activation_backward_",
    "attend_in_windows",
    "attend_in_windows_backward",
    "attention",
    "batch_norm_",
    "convolution",
    "deformable_attention",
    "feed_forward",
    "for_a_graph",
    "group_norm_",
    "kernel_report",
    "layer_norm",
    "matrix_product",
    "product",
    "select",
    "uncertain_points",
    "uniform_points",
    "use_kernel",
    "window_attention",
]


def deformable_attention(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor | None:
    """Multi-scale deformable attention with softmax and location arithmetic inside; None if no kernel applies.

    Args:
        value: (B, S, h, D).
        spatial_shapes: L pairs (H, W) of Python ints with sum(H * W) == S.
        reference_points: (Q, 2) float32 as (x, y) in units of the maps' width and height; gets no gradient.
        offsets: (B, Q, h, L, P, 2) in pixels of each level.
        logits: (B, Q, h, L * P) before the softmax.

    Returns:
        (B, Q, h * D) in value's dtype, under autocast in autocast's.

    Raises:
        ValueError: if the tensors do not fit one another; also where no kernel applies.
        RuntimeError: if a kernel asked for by name cannot run.
    """
    if leaving_pytorch() or (not torch.compiler.is_compiling() and _in_functions()):
        return None
    if select(value.device, dtype_under_autocast(value)) is None:
        if not torch.compiler.is_compiling():  # a bound would become a condition of the graph
            problem.check(value, spatial_shapes, offsets, logits, reference_points)
        return None
    return fused(value, [side for shape in spatial_shapes for side in shape], reference_points, offsets, logits)


def group_norm_(x: Tensor, norm: torch.nn.GroupNorm, plus: Tensor | None = None, rectify: bool = False) -> bool:
    """Group norm in x's memory, then `plus` another map, then a ReLU if asked for; False if it was not done.

    It is done in eager mode without a graph, for maps (B, C, H, W) with channels innermost, if a kernel can run for
    their dtype and no other was asked for; on GPUs for large maps, and for all of a CUDA graph. On CPUs sums are
    float64, the arithmetic is float32; on GPUs all is float32.
    """
    if not _maps_to_change(x, plus, norm.weight, norm.bias):
        return False
    if _cpp_runs(x):
        cpu.group_norm_(x, norm.num_groups, norm.weight, norm.bias, norm.eps, plus, rectify)
        return True
    if not (_triton_pays(x, GROUP_NORM_FROM) and norms.fits_group_norm(x.shape[1], norm.num_groups)):
        return False
    norms.group_norm_(x, norm, plus, rectify)
    return True


def batch_norm_(x: Tensor, norm: torch.nn.BatchNorm2d, plus: Tensor | None = None, rectify: bool = False) -> bool:
    """Batch norm by the statistics that it keeps, as `group_norm_`; on GPUs alone."""
    kept = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if not (_triton_pays(x, BATCH_NORM_FROM) and _maps_to_change(x, plus, *kept)):
        return False
    norms.batch_norm_(x, norm, plus, rectify)
    return True


def layer_norm(
    x: Tensor, norm: torch.nn.LayerNorm, update: Tensor | None = None, keep_sum: bool = False
) -> tuple[Tensor | None, Tensor] | None:
    """x + update, if it is to be kept, and its layer norm, in one pass; None if it was not done.

    It is done in eager mode without a graph, for x and `update` (..., C) of one dtype; on CPUs for a multiple of 8
    channels.
    """
    rows = [x] if update is None else [x, update]
    fits = (
        _unrecorded()
        and norm.normalized_shape == x.shape[-1:]
        and norm.weight is not None
        and norm.bias is not None
        and _plain(norm.weight, norm.bias)
        and all(type(y) is Tensor and _kind(y) == _kind(x) for y in rows)
        and x.numel() > 0
    )
    if not fits:
        return None
    x, update = x.contiguous(), None if update is None else update.contiguous()  # as torch's own
    if x.device.type == "cpu" and x.shape[-1] % 8 == 0 and _eager(x) and _cpp_runs(x):
        return cpu.layer_norm(x, norm.weight, norm.bias, norm.eps, update, keep_sum)
    if x.shape[-1] > norms.WIDEST or not _triton_pays(x, LAYER_NORM_FROM):
        return None
    return norms.layer_norm(x, norm, update, keep_sum)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    then: str,
    plus: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor | None:
    """x @ weight.T * scale + bias + plus, `then` "none", "relu" or "gelu" (the exact one); None if it was not done.

    It is done in eager mode without a graph, for contiguous tensors of bfloat16 on CPUs with AVX-512 BF16. Sums are
    float32, and rounded once.

    Args:
        x: (..., K), K even.
        weight: (N, K).
        plus: (..., N).
        scale: (N,) float32, contiguous.
    """
    given = [y for y in (x, weight, bias, plus) if y is not None]
    fits = _multiplies(*given) and x.shape[-1] == weight.shape[-1] and x.shape[-1] % 2 == 0 and weight.dim() == 2
    fits = fits and all(y is None or y.shape == weight.shape[:1] for y in (bias, scale))
    fits = fits and (plus is None or plus.shape == (*x.shape[:-1], len(weight)))
    fits = fits and (scale is None or (scale.dtype == torch.float32 and scale.is_contiguous()))
    return cpu.product(x, weight, bias, then, plus, scale) if fits else None


def feed_forward(
    x: Tensor, first: torch.nn.Linear, second: torch.nn.Linear, then: str, plus: Tensor | None = None
) -> Tensor | None:
    """The second layer of what the first makes of (..., C), `then` in between, `plus` that, as `product`; C and the
    width even."""
    layers = first.weight, first.bias, second.weight, second.bias
    given = [x, *layers] if plus is None else [x, *layers, plus]
    if any(layer is None for layer in layers) or not _multiplies(*given):
        return None
    W, C = first.weight.shape
    fits = x.shape[-1] == C and second.weight.shape == (C, W) and C % 2 == W % 2 == 0
    fits = fits and (plus is None or plus.shape == x.shape)
    return cpu.feed_forward(x, layers, then, plus) if fits else None


def convolution(
    x: Tensor,
    convolution: torch.nn.Conv2d,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    rectify: bool = False,
) -> Tensor | None:
    """A 3 x 3 convolution, by Winograd's algorithm but for AMX; None if it was not done.

    It is done in eager mode on CPUs with AVX-512 BF16, for maps (B, C, H, W) with channels innermost, of a multiple of
    16 channels to a multiple of 32, with stride and padding 1; with a graph in float32 alone, of a multiple of 32
    channels, without scale and ReLU. In float32 it errs by 0.7 of what oneDNN's does (fewer sums). In bfloat16 its
    factors are rounded once more than a product's: the mean error is 2.5 times that of a result that is rounded once,
    0.4 % of the result's deviation. By AMX, of a multiple of 32 channels, it has all multiplications and is rounded
    once.

    Args:
        scale: (O,) of the sums, before anything is added.
        bias: (O,) instead of the convolution's.
        rectify: a ReLU at the end.
    """
    if x.device.type != "cpu" or _transformed():  # first: a graph of torch must not see what follows
        return None
    bias = convolution.bias if bias is None else bias
    given = [y for y in (x, convolution.weight, scale, bias) if y is not None]
    runs = chosen_name() in ("auto", "cpp") and cpu.why_not(x.device, x.dtype) is None and cpu.multiplies_bfloat16()
    if not runs or torch.is_autocast_enabled("cpu") or not _plain(*given) or not convolutions.fits(x, convolution):
        return None
    if not torch.is_grad_enabled():
        return convolutions.convolved(x, convolution.weight, bias, scale, rectify)
    recorded = x.dtype == torch.float32 and x.shape[1] % 32 == 0 and scale is None and not rectify
    return convolutions.RecordedConvolution.apply(x, convolution.weight, bias) if recorded else None


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, allowed: Tensor | None) -> Tensor | None:
    """Multi-head attention; None if it was not done.

    It is done as a product is, for heads of 32 channels. Scores and their softmax are float32; a query that may look
    nowhere gets zeros.

    Args:
        query: (B, Q, C).
        key: (B, S, C).
        value: (B, S, C).
        allowed: (B, Q, S) bool, shared by heads; None for everywhere.
    """
    fits = query.shape[-1] == num_heads * cpu.HEAD and _multiplies(query, key, value)
    fits = fits and key.shape == value.shape == (len(query), key.shape[1], query.shape[2])
    fits = fits and 2 * len(query) * num_heads >= torch.get_num_threads()  # a head of an image is a thread's
    if allowed is not None:
        fits = fits and type(allowed) is Tensor and allowed.dtype == torch.bool and allowed.is_contiguous()
        fits = fits and allowed.shape == (*query.shape[:2], key.shape[1]) and allowed.device == query.device
    return cpu.attention(query, key, value, num_heads, allowed) if fits else None


def _multiplies(*tensors: Tensor) -> bool:
    """Whether kernels for AVX-512 BF16 may compute on the tensors."""
    fits = all(
        x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous() and x.numel() > 0 for x in tensors
    )
    return fits and _plain(*tensors) and _eager(tensors[0]) and _cpp_runs(tensors[0]) and cpu.multiplies_bfloat16()


def _unrecorded() -> bool:
    """Whether what is done leaves no trace: in no graph, and under no transformation of functions, whose tensors have
    no memory, or a tangent that would be lost."""
    return not (torch.is_grad_enabled() or _transformed())


def _transformed() -> bool:
    return torch.compiler.is_compiling() or leaving_pytorch() or _in_functions()


def _in_functions() -> bool:
    """Whether functions are transformed, by `torch.func` or for derivatives in forward mode."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _kind(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.device


def _eager(x: Tensor) -> bool:
    """Whether nothing records or replaces what is done with x."""
    return _unrecorded() and not torch.is_autocast_enabled(x.device.type)


def _cpp_runs(x: Tensor) -> bool:
    """Whether a kernel that is no operator of torch may compute on x: nothing records it, "cpp" can and may run."""
    return _unrecorded() and cpu.why_not(x.device, x.dtype) is None and chosen_name() in ("auto", "cpp")


def _triton_pays(x: Tensor, elements: int) -> bool:
    """Whether nothing records what is done with x, Triton's kernels can run, and they were asked for by name, or x is
    large, or a CUDA graph is made, whose launches cost nothing."""
    if not _eager(x):  # first: a graph of torch must not see what follows
        return False
    name = chosen_name()
    if name == "auto" and x.device.type == "cuda":
        pays = x.numel() >= elements or _for_a_graph.get() or torch.cuda.is_current_stream_capturing()
    else:
        pays = name == "triton"
    return pays and triton_gpu.why_not(x.device, x.dtype) is None


def _plain(*parameters: Tensor | None) -> bool:
    return all(type(parameter) in (Tensor, torch.nn.Parameter) for parameter in parameters)


def _maps_to_change(x: Tensor, plus: Tensor | None, *parameters: Tensor | None) -> bool:
    """Whether a kernel for maps with channels innermost may change x in its memory; `plus` is another of its kind."""
    if x.device.type not in ("cpu", "cuda") or not _eager(x):  # first: vmap knows no layouts
        return False
    maps = [x] if plus is None else [x, plus]
    fits = all(
        type(y) is Tensor and _kind(y) == _kind(x) and y.is_contiguous(memory_format=torch.channels_last) for y in maps
    )
    return fits and _plain(*parameters) and x.numel() > 0


def window_attention(device: torch.device, dtype: torch.dtype, side: int, head_dim: int) -> Callable | None:
    """What computes attention over shifted windows of tokens, `windows.forward`; None where no kernel applies.

    Args:
        dtype: of the projected tokens.
        side: of a window, in tokens.
        head_dim: channels of a head.
    """
    if leaving_pytorch() or windows.why_not(device, dtype, side, head_dim) is not None:
        return None
    return windows.forward


def attend_in_windows(
    projected: Tensor, fill: Tensor, places: Tensor, bias: Tensor, seam: Tensor | None, scale: float
) -> Tensor | None:
    """Attention of tokens within their windows; None if it was not done.

    It is done in eager mode, where no graph is recorded, on CPUs, for heads of a multiple of 8 channels, if kernel
    "cpp" can run for their dtype and no other was asked for. The arithmetic is float32.

    Args:
        projected: (N, 3 C) queries, keys and values of N tokens.
        fill: (3 C,) those of padding.
        places: (w * n,) int64 of each row of w windows of n tokens the token, N for padding; every token once.
        bias: (h, n, n) of the scores.
        seam: (s, n, n) what is added to the scores of the last s windows; None for nothing.
        scale: of the scores.

    Returns:
        (N, C) in projected's dtype.
    """
    heads = _window_heads(projected, fill, places, bias, seam, scale) if _cpp_runs(projected) else None
    return None if heads is None else cpu.window_attention(heads)


def attend_in_windows_backward(
    of_attended: Tensor,
    projected: Tensor,
    fill: Tensor,
    places: Tensor,
    bias: Tensor,
    seam: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of `projected`, and in float32 of `fill` and `bias`, of the (N, C) gradient of what was attended.

    The other arguments are those of `attend_in_windows`, and it is for what that attended, whichever kernel is chosen
    by now. None where "cpp" cannot run.
    """
    heads = _window_heads(projected, fill, places, bias, seam, scale)
    if heads is None:
        return None
    return cpu.window_attention_backward(heads, of_attended.to(projected.dtype).contiguous())


def _window_heads(projected, fill, places, bias, seam, scale) -> cpu.WindowHeads | None:
    h, n, _ = bias.shape
    tensors = [tensor for tensor in (projected, fill, places, bias, seam) if tensor is not None]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)
    runs = plain and _unrecorded() and cpu.why_not(projected.device, projected.dtype) is None
    if not runs or projected.shape[1] % (3 * h * 8):
        return None
    return cpu.WindowHeads(
        projected.contiguous(),
        fill.to(projected.dtype).contiguous(),
        places.view(-1, n),
        bias.float().contiguous(),
        None if seam is None else seam.float().contiguous(),
        scale,
    )
