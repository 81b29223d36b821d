"""The compiled CPU kernel: loading it, and calling it on torch tensors' memory."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import problem

INTERFACE_VERSION = 6
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY = Path(__file__).with_name(f"_msda_cpu{SUFFIX}")
DTYPES = (torch.float32, torch.bfloat16)
HEAD, LONGEST_WINDOW = 32, 144  # channels and tokens of attentions in AVX-512 BF16


@cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built (install with a C++ compiler: pip install --force-reinstall .)"
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        for name in ("msda_interface_version", "msda_max_samples", "msda_multiplies_bfloat16"):
            getattr(loaded, name).restype = ctypes.c_int64
        if loaded.msda_interface_version() != INTERFACE_VERSION:
            return f"{LIBRARY.name} belongs to another version of this package; reinstall it"
        for name in (
            "msda_forward",
            "msda_backward",
            "msda_group_norm",
            "msda_layer_norm",
            "msda_window_attention",
            "msda_window_attention_backward",
            "msda_window_attention_bf16",
            "msda_attention",
            "msda_convolution",
            "msda_feed_forward",
            "msda_product",
            "msda_use_pool",
            "msda_use_tiles",
            "msda_uniform",
            "msda_uncertain_points",
            "msda_activation_backward",
            "msda_matrix_product",
        ):
            getattr(loaded, name).restype = None
        loaded.msda_use_pool(_pool_of_threads())
    except (OSError, AttributeError) as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    return loaded


def _pool_of_threads() -> ctypes.c_void_p:
    """OpenMP's entry to the threads that torch's operators use, null where torch's OpenMP has another."""
    entry = None
    if sys.platform == "linux":
        entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return ctypes.cast(entry, ctypes.c_void_p)


@cache
def multiplies_bfloat16() -> bool:
    """Whether products and attentions of bfloat16 can run: where the processor has AVX-512 BF16."""
    loaded = library()
    return not isinstance(loaded, str) and bool(loaded.msda_multiplies_bfloat16())


def has_tiles() -> bool:
    """Whether they run by AMX, as far as their shapes allow."""
    return multiplies_bfloat16() and library().msda_multiplies_bfloat16() == 2


def use_tiles(wanted: bool):
    """Whether AMX multiplies where there is one: for tests and measurements."""
    library().msda_use_tiles(ctypes.c_int64(wanted))


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernel can run for tensors of this device and dtype, else the reason."""
    if device.type != "cpu":
        return f"it runs on CPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"it computes float32 and bfloat16, not {dtype}"
    loaded = library()
    return loaded if isinstance(loaded, str) else None


def forward(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    positions: Tensor,
    weights: Tensor,
    reference_points: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """(B, S, h, D) values -> (B, Q, h * D); the fused form if `reference_points` is given (see msda_cpu.cpp)."""
    problem.check(value, spatial_shapes, positions, weights, reference_points, padding)
    arguments, keep, (B, Q, h, D) = _arguments(value, spatial_shapes, positions, weights, reference_points, padding)
    output = value.new_empty(B, Q, h * D)
    library().msda_forward(*arguments, _pointer(output))
    del keep
    return output


def backward(
    output_gradient: Tensor,
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    positions: Tensor,
    weights: Tensor,
    reference_points: Tensor | None = None,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, positions (offsets or locations) and weights (logits or weights)."""
    problem.check(value, spatial_shapes, positions, weights, reference_points, padding, output_gradient)
    arguments, keep, _ = _arguments(value, spatial_shapes, positions, weights, reference_points, padding)
    B, S, h, D = value.shape
    output_gradient = output_gradient.to(value.dtype).contiguous()
    _, own_positions, own_weights, *_ = keep
    gradients = value.new_empty(B, S, h, D), torch.empty_like(own_positions), torch.empty_like(own_weights)
    sums = value.new_zeros(B, h, S, D, dtype=torch.float32)
    library().msda_backward(*arguments, *map(_pointer, (output_gradient, sums, *gradients)))
    inputs = (value, positions, weights)
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True))


def group_norm_(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float, plus: Tensor | None, rectify: bool
):
    """See `mask2former_hf.kernels.group_norm_`, which looks at the tensors."""
    B, C, H, W = x.shape
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    sizes = (ctypes.c_int64 * 4)(B, H * W, C, groups)
    flags = (rectify, x.dtype == torch.bfloat16, torch.get_num_threads())
    library().msda_group_norm(
        *map(_pointer, (x, plus, weight, bias)), sizes, ctypes.c_double(epsilon), *map(ctypes.c_int64, flags)
    )


class WindowHeads(NamedTuple):
    """Contiguous tensors of an attention over windows (see window_attention_cpu.cpp)."""

    projected: Tensor  # (N, 3 C) float32 or bfloat16: queries, keys and values of N tokens
    fill: Tensor  # (3 C,) in the same dtype: those of padding
    places: Tensor  # (w, n) int64: token of each row of w windows, N for padding
    bias: Tensor  # (h, n, n) float32 of the scores
    seam: Tensor | None  # (s, n, n) float32, added to the scores of the last s windows
    scale: float  # of the scores


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, update: Tensor | None, keep_sum: bool
) -> tuple[Tensor | None, Tensor]:
    """See `mask2former_hf.kernels.layer_norm`, which looks at the tensors."""
    C = x.shape[-1]
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    output, total = torch.empty_like(x), torch.empty_like(x) if keep_sum else None
    sizes = (ctypes.c_int64 * 2)(x.numel() // C, C)
    flags = (x.dtype == torch.bfloat16, torch.get_num_threads())
    library().msda_layer_norm(
        *map(_pointer, (x, update, weight, bias)), sizes, ctypes.c_double(epsilon), *map(ctypes.c_int64, flags),
        *map(_pointer, (total, output)),
    )  # fmt: skip
    return total, output


THEN = ("none", "relu", "gelu")  # by their numbers in products_cpu.cpp


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, then: str, plus: Tensor | None, scale: Tensor | None
) -> Tensor:
    """See `mask2former_hf.kernels.product`, which looks at the tensors."""
    N, K = weight.shape
    output = x.new_empty(*x.shape[:-1], N)
    sizes = (ctypes.c_int64 * 3)(x.numel() // K, N, K)
    flags = (THEN.index(then), torch.get_num_threads())
    library().msda_product(
        *map(_pointer, (x, weight, scale, bias, plus)), sizes, *map(ctypes.c_int64, flags), _pointer(output)
    )
    return output


def feed_forward(x: Tensor, layers: tuple[Tensor, ...], then: str, plus: Tensor | None) -> Tensor:
    """See `mask2former_hf.kernels.feed_forward`, which looks at the tensors."""
    output, (W, C) = torch.empty_like(x), layers[0].shape
    sizes = (ctypes.c_int64 * 3)(x.numel() // C, W, C)
    weights = (ctypes.c_void_p * 4)(*(layer.data_ptr() for layer in layers))
    flags = (THEN.index(then), torch.get_num_threads())
    library().msda_feed_forward(
        _pointer(x), weights, _pointer(plus), sizes, *map(ctypes.c_int64, flags), _pointer(output)
    )
    return output


def convolution(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, rectify: bool) -> Tensor:
    """See `mask2former_hf.kernels.convolution`, which looks at the tensors."""
    B, C, H, W = x.shape
    output = torch.empty(B, len(weight), H, W, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    sizes = (ctypes.c_int64 * 5)(B, H, W, C, len(weight))
    flags = (rectify, x.dtype == torch.bfloat16, torch.get_num_threads())
    library().msda_convolution(
        *map(_pointer, (x, weight, scale, bias)), sizes, *map(ctypes.c_int64, flags), _pointer(output)
    )
    return output


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, allowed: Tensor | None) -> Tensor:
    """See `mask2former_hf.kernels.attention`, which looks at the tensors."""
    (B, Q, _), S = query.shape, key.shape[1]
    output = torch.empty_like(query)
    sizes = (ctypes.c_int64 * 4)(B, Q, S, num_heads)
    threads = ctypes.c_int64(torch.get_num_threads())
    library().msda_attention(*map(_pointer, (query, key, value, allowed)), sizes, threads, _pointer(output))
    return output


def window_attention(heads: WindowHeads) -> Tensor:
    """(N, C) what every token has attended to."""
    output = heads.projected.new_empty(len(heads.projected), heads.projected.shape[1] // 3)
    arguments = _window_arguments(heads)
    fits = heads.projected.dtype == torch.bfloat16 and output.shape[1] == HEAD * len(heads.bias)
    if fits and heads.places.shape[1] <= LONGEST_WINDOW and multiplies_bfloat16():
        *arguments, _, threads = arguments
        library().msda_window_attention_bf16(*arguments, threads, _pointer(output))
    else:
        library().msda_window_attention(*arguments, _pointer(output))
    return output


def window_attention_backward(heads: WindowHeads, of_attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tokens' queries, keys and values, and in float32 of those of padding and of the bias."""
    gradients = (
        torch.empty_like(heads.projected),
        heads.bias.new_zeros(heads.projected.shape[1]),
        torch.zeros_like(heads.bias),
    )
    library().msda_window_attention_backward(
        *_window_arguments(heads), _pointer(of_attended), *map(_pointer, gradients)
    )
    return gradients


def _window_arguments(heads: WindowHeads):
    h, n, _ = heads.bias.shape
    seams = 0 if heads.seam is None else len(heads.seam)
    N, width = heads.projected.shape
    sizes = (ctypes.c_int64 * 6)(N, len(heads.places), n, h, width // (3 * h), seams)
    flags = (heads.projected.dtype == torch.bfloat16, torch.get_num_threads())
    return *map(_pointer, heads[:5]), sizes, ctypes.c_double(heads.scale), *map(ctypes.c_int64, flags)


def _pointer(tensor: Tensor | None):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _arguments(value, spatial_shapes, positions, weights, reference_points, padding):
    """C arguments, the tensors that own their memory, and (B, Q, h, D)."""
    B, S, h, D = value.shape
    L, Q, P = len(spatial_shapes), positions.shape[1], positions.shape[4]
    if L * P > library().msda_max_samples():
        raise ValueError(
            f"{L} levels x {P} points: this kernel takes at most {library().msda_max_samples()} samples per query and "
            'head; use mask2former_hf.kernels.use_kernel("reference")'
        )
    value = value.contiguous()
    both_half = positions.dtype == weights.dtype == torch.bfloat16
    positions, weights = (x.contiguous() if both_half else x.float().contiguous() for x in (positions, weights))
    reference = None if reference_points is None else reference_points.float().contiguous()
    padding = None if padding is None else padding.to(torch.uint8).contiguous()
    tensors = (value, positions, weights, reference, padding)
    shapes = (ctypes.c_int64 * (2 * L))(*(side for shape in spatial_shapes for side in shape))
    sizes = (ctypes.c_int64 * 7)(B, S, Q, h, D, L, P)
    flags = (reference is not None, value.dtype == torch.bfloat16, both_half, torch.get_num_threads())
    return (*map(_pointer, tensors), shapes, sizes, *map(ctypes.c_int64, flags)), tensors, (B, Q, h, D)
