"""Parts of a training step that the compiled library does on CPUs where torch takes several passes.

Each returns None where it does not apply: on other devices, in other dtypes, in graphs, under another `use_kernel`,
and without the library.
"""

import ctypes

import torch
from torch import Tensor

from . import cpu
from .choosing import chosen_name


def uniform_points(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor | None:
    """Uniform numbers in [0, 1), (..., 2) float32, from a counter whose start `generator` draws, or torch's own."""
    if not _runs(device):
        return None
    drawn = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator, device="cpu")
    seed = ctypes.c_int64.from_address(drawn.data_ptr()).value  # without `item`, which counts as waiting for a device
    points = torch.empty(shape, dtype=torch.float32, device="cpu")
    cpu.library().msda_uniform(*map(ctypes.c_int64, (seed, points.numel() // 2, torch.get_num_threads())), _at(points))
    return points


def uncertain_points(maps: Tensor, candidates: Tensor, weights: Tensor | None, count: int) -> Tensor | None:
    """The points at which maps are nearest to 0, of every map as many.

    Args:
        maps: (R, H, W) float32.
        candidates: (R, P, 2) float32 as (x, y) in [0, 1], the outer edges of the map; outside it is zero.
        weights: (R, P) float32; candidates of weight 0 are taken last.
        count: of points, at most P.

    Returns:
        (R, count, 2).
    """
    given = [maps, candidates] if weights is None else [maps, candidates, weights]
    if not (_runs(maps.device) and _fit(given, torch.float32)):
        return None
    R, H, W = maps.shape
    if candidates.shape != (R, candidates.shape[1], 2) or count > candidates.shape[1]:
        return None
    if weights is not None and weights.shape != candidates.shape[:2]:
        return None
    P, out = candidates.shape[1], candidates.new_empty(R, count, 2)
    sizes = (ctypes.c_int64 * 5)(R, H, W, P, count)
    threads = ctypes.c_int64(torch.get_num_threads())
    cpu.library().msda_uncertain_points(_at(maps), _at(candidates), _at(weights), sizes, threads, _at(out))
    return out


def activation_backward_(
    name: str, gradient: Tensor, wide: Tensor, keep_wide: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of a GELU or ReLU between two products; `gradient` is written over.

    Args:
        name: "gelu" (the exact one), or "relu".
        gradient: (N, W) float32, of the activated rows; W a multiple of 8.
        wide: (N, W) float32, what GELU gets, or what ReLU has made.
        keep_wide: whether `wide` stays as it is; else the activated rows take its place.

    Returns:
        (N, W) activated rows, (N, W) gradients of the rows before, in `gradient`, and (W,) sums of these.
    """
    if not (_runs(wide.device) and _fit((gradient, wide), torch.float32)):
        return None
    (N, W), gelu = wide.shape, name == "gelu"
    if W == 0 or W % 8 or gradient.shape != wide.shape:
        return None
    activated = torch.empty_like(wide) if gelu and keep_wide else wide
    sums = torch.zeros(W, dtype=torch.float32, device="cpu")
    numbers = (N, W, gelu, torch.get_num_threads())
    cpu.library().msda_activation_backward(
        _at(wide), _at(gradient), *map(ctypes.c_int64, numbers), *map(_at, (activated, gradient, sums))
    )
    return activated, gradient, sums


def matrix_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    then: str = "none",
    scale: float = 1.0,
    plus: Tensor | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor | None:
    """scale * (a @ b + bias) + plus, `then` "none" or "relu".

    Sums are float32 and rounded once. It needs AVX-512 BF16, in float32 too.

    Args:
        a: (M, K) float32 or bfloat16; where neither of its strides is 1 it is copied.
        b: (K, N) in a's dtype, as a.
        bias: (N,) in a's dtype.
        plus: (M, N) in the result's dtype; may be `out`.
        out: (M, N) for the result, contiguous, in a's dtype or float32; made in a's dtype if not given.
        sums: (M,) float32, to which scale times the sums of a over K are added.
    """
    (M, K), N, dtype = a.shape, b.shape[1], a.dtype
    if not (_runs(a.device) and cpu.multiplies_bfloat16() and dtype in cpu.DTYPES and M * N * K > 0):
        return None
    out = torch.empty(M, N, dtype=dtype, device="cpu") if out is None else out
    fits = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in (a, b))
    fits = fits and b.shape == (K, N) and b.dtype == dtype
    fits = fits and (bias is None or (_fit((bias,), dtype) and bias.shape == (N,)))
    fits = fits and (sums is None or (_fit((sums,), torch.float32) and sums.shape == (M,)))
    fits = fits and out.dtype in (dtype, torch.float32)
    fits = fits and all(x is None or (_fit((x,), out.dtype) and x.shape == (M, N)) for x in (plus, out))
    if not fits:
        return None
    (a, *a_layout), (b, *b_layout) = _laid_out(a, 1), _laid_out(b, 0)
    sizes = (ctypes.c_int64 * 7)(M, N, K, *a_layout, *b_layout)
    flags = (ctypes.c_int64 * 3)(dtype == torch.bfloat16, out.dtype == torch.bfloat16, then == "relu")
    factors = (ctypes.c_void_p * 3)(a.data_ptr(), b.data_ptr(), None if bias is None else bias.data_ptr())
    threads = ctypes.c_int64(torch.get_num_threads())
    cpu.library().msda_matrix_product(
        factors, _at(plus), sizes, flags, ctypes.c_double(scale), threads, _at(sums), _at(out)
    )
    return out


def _laid_out(x: Tensor, inner: int) -> tuple[Tensor, int, bool]:
    """The matrix or a copy, its larger step, and whether `inner`, the index that is summed over, is the slower one."""
    if x.stride(inner) == 1:
        return x, x.stride(1 - inner), False
    if x.stride(1 - inner) == 1:
        return x, x.stride(inner), True
    return x.contiguous(), x.shape[1], inner == 0


def _runs(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
        and chosen_name() in ("auto", "cpp")
        and cpu.why_not(device, torch.float32) is None
    )


def _fit(tensors, dtype: torch.dtype) -> bool:
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.dtype == dtype and x.is_contiguous() and x.device.type == "cpu"
        for x in tensors
    )


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
