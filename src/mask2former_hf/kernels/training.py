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


def activation_backward(name: str, gradient: Tensor, wide: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of a GELU or ReLU between two products.

    Args:
        name: "gelu" (the exact one), or "relu".
        gradient: (N, W) float32, of the activated rows; W a multiple of 8.
        wide: (N, W) float32, what GELU gets, or what ReLU has made.

    Returns:
        (N, W) activated rows, (N, W) gradients of the rows before, and (W,) sums of these.
    """
    if not (_runs(wide.device) and _fit((gradient, wide), torch.float32)):
        return None
    (N, W), gelu = wide.shape, name == "gelu"
    if W == 0 or W % 8 or gradient.shape != wide.shape:
        return None
    activated, of_wide = torch.empty_like(wide) if gelu else wide, torch.empty_like(wide)
    sums = torch.zeros(W, dtype=torch.float32, device="cpu")
    numbers = (N, W, gelu, torch.get_num_threads())
    cpu.library().msda_activation_backward(
        _at(wide), _at(gradient), *map(ctypes.c_int64, numbers), *map(_at, (activated, of_wide, sums))
    )
    return activated, of_wide, sums


def _runs(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
        and chosen_name() in ("auto", "cpp")
        and cpu.why_not(device, torch.float32) is None
    )


def _fit(tensors, dtype: torch.dtype) -> bool:
    return all(type(x) is Tensor and x.dtype == dtype and x.is_contiguous() for x in tensors)


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
