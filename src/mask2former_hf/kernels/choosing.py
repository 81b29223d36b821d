"""Which compiled kernel runs for a device and dtype, and how to choose another."""

import contextlib
import contextvars
import logging
import os
from functools import cache

import torch

from . import cpu, triton_gpu

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "MASK2FORMER_HF_KERNEL"
# name -> reason why it cannot run for a device and dtype, or None
KERNELS = {"cpp": cpu.why_not, "triton": triton_gpu.why_not}
IMPLEMENTATIONS = {"cpp": cpu, "triton": triton_gpu}  # modules with `forward` and `backward`
NAMES = ("auto", "reference", *KERNELS)
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("mask2former_hf_kernel", default=None)


@contextlib.contextmanager
def use_kernel(name: str):
    """Run the model inside with a certain kernel: "auto", "reference", "cpp" or "triton".

    A backward pass uses the kernel of its forward pass, also after the context is left. For a whole process, set the
    environment variable MASK2FORMER_HF_KERNEL.
    """
    _check_name(name, "use_kernel")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_name() -> str:
    """What was asked for: "auto", "reference" or a kernel's name.

    Raises:
        ValueError: if the environment variable names no kernel.
    """
    name = _chosen.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def select(device: torch.device, dtype: torch.dtype) -> str | None:
    """Name of the compiled kernel that will run, or None for the PyTorch formula.

    Raises:
        RuntimeError: if a kernel asked for by name cannot run.
        ValueError: if the environment variable names no kernel.
    """
    name = chosen_name()
    if name == "reference":
        return None
    if name == "auto":
        return _automatic(device.type, dtype)
    reason = KERNELS[name](device, dtype)
    if reason is not None:
        raise RuntimeError(f"kernel {name!r} was asked for, but {reason}")
    return name


# What torch.compiler.assume_constant_result does, which first imports torch._dynamo: two seconds, and Triton with it.
select._dynamo_marked_constant = True


def kernel_for_operator(device: torch.device, dtype: torch.dtype, name: str = "") -> str:
    """Name of the kernel that an operator runs: `name` if it can, else the chosen one, else the device's.

    An operator that a graph already contains needs a compiled kernel, also under "reference".
    """
    if name and KERNELS[name](device, dtype) is None:
        return name
    found = select(device, dtype) or _automatic(device.type, dtype)
    if found is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in _reasons(device, dtype).items())
        raise RuntimeError(
            f"the compiled operator got {dtype} on {device.type}, for which there is no kernel ({reasons}); "
            f"convert the tensors, or call mask2former_hf.kernels.deformable_attention, which checks"
        )
    return found


def _reasons(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """Why each kernel is not chosen automatically, or None."""
    reasons = {name: why_not(device, dtype) for name, why_not in KERNELS.items()}
    if reasons["triton"] is None and device.type == "cpu":
        reasons["triton"] = "its interpreter runs only when asked for by name"
    return reasons


@cache
def _automatic(device_type: str, dtype: torch.dtype) -> str | None:
    reasons = _reasons(torch.device(device_type), dtype)
    found = next((name for name, reason in reasons.items() if reason is None), None)
    why = "" if found else " (" + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ")"
    logger.info("deformable attention on %s in %s: %s%s", device_type, dtype, found or "reference", why)
    return found


def kernel_report() -> list[dict[str, str]]:
    """What runs where: a row of device, dtype, kernel, and the reasons against the compiled ones."""
    rows = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            rows.append(
                {
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": select(torch.device(device), dtype) or "reference",
                    "not": "; ".join(
                        f"{name}: {reason}" for name, reason in _reasons(torch.device(device), dtype).items() if reason
                    ),
                }
            )
    return rows


def _check_name(name: str, where: str):
    if name not in NAMES:
        raise ValueError(f"{where}: {name!r} is not a kernel; choose one of {', '.join(NAMES)}")
