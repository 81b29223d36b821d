"""Compiled multi-scale deformable attention: which kernel runs, and how to choose another.

`deformable_attention` is what the model calls; it returns None where no compiled kernel applies, and the model then
runs the plain PyTorch formula. Kernels: "cpp" on CPUs (float32, bfloat16). "reference" is the PyTorch formula.
"""

import contextlib
import contextvars
import logging
import os
from functools import cache

import torch
from torch import Tensor

from . import cpu
from .operators import fused

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "MASK2FORMER_HF_KERNEL"
KERNELS = {"cpp": cpu.why_not}  # name -> reason why it cannot run for a device and dtype, or None
NAMES = ("auto", "reference", *KERNELS)
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("mask2former_hf_kernel", default=None)


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
        (B, Q, h * D) in value's dtype.

    Raises:
        RuntimeError: if a kernel asked for by name cannot run.
    """
    if select(value.device, value.dtype) is None:
        return None
    return fused(value, [side for shape in spatial_shapes for side in shape], reference_points, offsets, logits)


@contextlib.contextmanager
def use_kernel(name: str):
    """Run the model inside with a certain kernel: "auto", "reference" or "cpp".

    For a whole process, set the environment variable MASK2FORMER_HF_KERNEL.
    """
    _check_name(name, "use_kernel")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


@torch.compiler.assume_constant_result
def select(device: torch.device, dtype: torch.dtype) -> str | None:
    """Name of the compiled kernel that will run, or None for the PyTorch formula."""
    name = _chosen.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _check_name(name, ENVIRONMENT_VARIABLE)
    if name == "reference":
        return None
    if name == "auto":
        return _automatic(device.type, dtype)
    reason = KERNELS[name](device, dtype)
    if reason is not None:
        raise RuntimeError(f"kernel {name!r} was asked for, but {reason}")
    return name


@cache
def _automatic(device_type: str, dtype: torch.dtype) -> str | None:
    reasons = {name: why_not(torch.device(device_type), dtype) for name, why_not in KERNELS.items()}
    found = next((name for name, reason in reasons.items() if reason is None), None)
    why = "" if found else " (" + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ")"
    logger.info("deformable attention on %s in %s: %s%s", device_type, dtype, found or "reference", why)
    return found


def kernel_report() -> list[dict[str, str]]:
    """What runs where: a row of device, dtype, kernel, and the reasons against the compiled ones."""
    rows = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            reasons = {name: why_not(torch.device(device), dtype) for name, why_not in KERNELS.items()}
            rows.append(
                {
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": select(torch.device(device), dtype) or "reference",
                    "not": "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason),
                }
            )
    return rows


def _check_name(name: str, where: str):
    if name not in NAMES:
        raise ValueError(f"{where}: {name!r} is not a kernel; choose one of {', '.join(NAMES)}")
