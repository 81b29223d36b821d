"""The Triton kernel for GPUs: whether it can run, and calling it on torch tensors. Imports Triton on first use.

Nothing compiles before the first call. With TRITON_INTERPRET=1 in the environment before Triton is imported, the same
kernels run on CPU tensors, in Triton's interpreter: that is for tests, and for who asks for "triton" by name.
"""

import importlib.util
import os
from functools import cache, lru_cache

import torch
from torch import Tensor

from . import problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (warps, 16-byte vectors of `value` per thread). With one vector and up to 8 warps Triton keeps a query's scalars in
# the threads that use them: no barrier in the loop (seen in its code for compute capability 9.0, Triton 3.9).
CONFIGS = ((2, 1), (4, 1), (8, 1), (16, 1), (4, 2))
UNTUNED = {"WARPS": 1, "VECTORS": 1, "ROWS": 16}  # under the interpreter: few, large programs
WIDE_FROM = 2**31  # numbers from here on need 64 bits
TUNED_FOR = ("D", "L", "P", "FUSED", "bucket")  # and, always, the dtypes


def interpreted() -> bool:
    """Whether the environment asks for Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernel can run for tensors of this device and dtype, else the reason."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"it runs on GPUs, not on {device.type}"
    if dtype not in DTYPES:
        return f"it computes float32, float16 and bfloat16, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cuda":
        return _why_not_gpu(device.index, dtype)
    return None


@cache
def _why_not_gpu(index: int | None, dtype: torch.dtype) -> str | None:
    if not torch.cuda.is_available():
        return "no GPU can be used"
    if torch.version.hip is None:
        needed = (8, 0) if dtype == torch.bfloat16 else (7, 0)
        found = torch.cuda.get_device_capability(index)
        if found < needed:
            return f"{dtype} needs compute capability {needed[0]}.{needed[1]}, the GPU has {found[0]}.{found[1]}"
    return None


def forward(
    value: Tensor,
    spatial_shapes: list[tuple[int, int]],
    positions: Tensor,
    weights: Tensor,
    reference_points: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """(B, S, h, D) values -> (B, Q, h * D); the fused form if `reference_points` is given (see msda_triton.py)."""
    problem.check(value, spatial_shapes, positions, weights, reference_points, padding)
    inputs, numbers, constants = _arguments(value, spatial_shapes, positions, weights, reference_points, padding)
    B, Q, h, D = value.shape[0], positions.shape[1], value.shape[2], value.shape[3]
    output = value.new_empty(B, Q, h * D)
    if output.numel():
        with torch.cuda.device_of(value):
            _tuned("forward_kernel")[_blocks(B, Q, h)](*inputs, output, *numbers, **constants)
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
    """Gradients of value, positions (offsets or locations) and weights (logits or weights).

    Value's is added up atomically, so its last bits differ between runs. With
    `torch.use_deterministic_algorithms(True)` its terms are sorted and added in a fixed order, one image at a time:
    slower, and 20 bytes of memory for each of an image's Q * h * L * P * 4 corners, and as much again for sorting.
    """
    problem.check(value, spatial_shapes, positions, weights, reference_points, padding, output_gradient)
    B, Q, (S, h, D) = value.shape[0], positions.shape[1], value.shape[1:]
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic and B > 1:
        images = []
        for b in range(B):
            gradient, own, where, weight = (x[b : b + 1] for x in (output_gradient, value, positions, weights))
            mask = None if padding is None else padding[b : b + 1]
            images.append(backward(gradient, own, spatial_shapes, where, weight, reference_points, mask))
        return tuple(torch.cat(gradients) for gradients in zip(*images, strict=True))
    inputs, numbers, constants = _arguments(value, spatial_shapes, positions, weights, reference_points, padding)
    output_gradient = output_gradient.contiguous()
    value_gradient = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (positions, weights)]
    if B * Q == 0:
        return value_gradient.to(value.dtype), *gradients
    if not interpreted():
        constants["ROWS"] = _rows_of_a_warp(D, 4)  # one vector of the float32 gradient per thread, as for `value`
    corners = Q * h * constants["L"] * constants["P"] * 4 if deterministic else 1
    row_type = torch.int64 if h * S >= WIDE_FROM else torch.int32
    rows = torch.empty(corners, dtype=row_type, device=value.device)
    shares = torch.empty(corners, dtype=torch.float32, device=value.device)
    with torch.cuda.device_of(value):
        _tuned("backward_kernel")[_blocks(B, Q, h)](
            output_gradient, *inputs, value_gradient, *gradients, rows, shares, *numbers, **constants,
            DETERMINISTIC=deterministic,
        )  # fmt: skip
        if deterministic:
            rows, order = rows.sort(stable=True)
            bounds = torch.searchsorted(rows, torch.arange(h * S + 1, dtype=row_type, device=value.device))
            _kernels().sum_records[(-(-h * S // 16),)](
                output_gradient, order, bounds, shares, value_gradient, S, h,
                COUNT=corners // (Q * h), D=D, BLOCK_D=constants["BLOCK_D"], BLOCK_R=16,
            )  # fmt: skip
    return value_gradient.to(value.dtype), *gradients


def _kernels():
    from . import msda_triton

    return msda_triton


@cache
def _tuned(name: str):
    """A kernel that chooses among its configurations on the first call for a kind of problem, and remembers."""
    kernel = getattr(_kernels(), name)
    if interpreted():
        return kernel
    import triton

    configs = [triton.Config({"WARPS": warps, "VECTORS": vectors}, num_warps=warps) for warps, vectors in CONFIGS]
    zeroed = ["value_gradient"] if name == "backward_kernel" else None  # every trial adds to it
    return triton.autotune(configs, key=list(TUNED_FOR), reset_to_zero=zeroed)(kernel)


def tuned_configurations() -> list[dict]:
    """What the autotuner has chosen in this process: kernel, kind of problem, warps and vectors per thread."""
    return [
        {"kernel": name, "problem": [str(part) for part in key], **config.kwargs}
        for name in ("forward_kernel", "backward_kernel")
        for key, config in _tuned(name).cache.items()
    ]


def _blocks(B: int, Q: int, h: int):
    def grid(constants):
        queries = constants["WARPS"] * constants["VECTORS"] * constants["ROWS"]
        return (-(-Q // queries) * B * h,)

    return grid


@lru_cache(1024)
def _level_table(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(L, 3) height, width and first row; kept, so that later calls copy nothing to the GPU."""
    rows, start = [], 0
    for H, W in spatial_shapes:
        rows.append((H, W, start))
        start += H * W
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _arguments(value, spatial_shapes, positions, weights, reference_points, padding):
    """Tensors, numbers and compile-time constants that both kernels take."""
    B, S, h, D = value.shape
    L, Q = len(spatial_shapes), positions.shape[1]
    P = positions.shape[4]
    value, positions, weights = value.contiguous(), positions.contiguous(), weights.contiguous()
    reference = value if reference_points is None else reference_points.float().contiguous()  # any pointer: unread
    byte_mask = value if padding is None else padding.to(torch.uint8).contiguous()
    inputs = (value, positions, weights, reference, byte_mask, _level_table(tuple(spatial_shapes), value.device))
    constants = {
        "D": D,
        "L": L,
        "P": P,
        "BLOCK_D": power_of_two(D),
        "COLUMNS": power_of_two(L * P),
        "FUSED": reference_points is not None,
        "PADDED": padding is not None,
        "WIDE": S * h * D >= WIDE_FROM,
        "ROWS": _rows_of_a_warp(D, value.element_size()),
    }
    constants |= UNTUNED if interpreted() else {}
    return inputs, (Q, S, h, (B * Q).bit_length()), constants


def _rows_of_a_warp(D: int, bytes_each: int) -> int:
    """How many queries' rows the 32 threads of a warp hold, 16 bytes each."""
    return max(1, 32 * 16 // (power_of_two(D) * bytes_each))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
