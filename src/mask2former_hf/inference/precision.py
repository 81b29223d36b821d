"""In which numbers a network runs: what "auto" is on this machine. torch is imported when that is asked."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAMES = ("float32", "bfloat16", "float16")
AUTO = "auto"
# Names of torch.cpu.get_capabilities for products of bfloat16, the last one Arm's. Without AMX Intel's processors are
# faster in float32: 170 to 240 GFLOP/s of two cores, and by AVX-512 BF16 100 to 135 (Emerald Rapids).
NATIVE = {"amx_bf16": "AMX BF16", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
SLOW_ON_INTEL = "avx512_bf16"


def dtype_field(dtype: "torch.dtype | str | None", device: "torch.device | str | None") -> "dict[str, torch.dtype]":
    """The field of `load_model` for weights of a dtype; without one they are as in the checkpoint's file.

    Args:
        dtype: torch's, its name, "auto" for what `fastest_dtype` says, or None.
        device: where the model will run; None for the default one.

    Raises:
        ValueError: for another name.
    """
    if dtype is None:
        return {}
    return {"dtype": _resolved(dtype, device)}


def _resolved(dtype: "torch.dtype | str", device: "torch.device | str | None") -> "torch.dtype":
    import torch

    from .loading import default_device

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == AUTO:
        device = default_device() if device is None else device
        return fastest_dtype(device)[0]
    if dtype not in NAMES:
        raise ValueError(f"dtype={dtype!r}: must be {AUTO}, {', '.join(NAMES)}, or a dtype of torch")
    return getattr(torch, dtype)


def fastest_dtype(device: "torch.device | str") -> "tuple[torch.dtype, str]":
    """bfloat16 where the device multiplies it natively, and faster so, else float32; and why."""
    import torch

    kind = str(device).partition(":")[0]
    if kind == "cpu":
        found = _native_on_cpu()
        return (
            (torch.bfloat16, f"this CPU multiplies bfloat16 natively ({found})")
            if found
            else (
                torch.float32,
                f"this CPU has none of {', '.join(NATIVE.values())} that is faster, as far as torch can tell",
            )
        )
    if kind == "cuda":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return (
            (torch.bfloat16, "this GPU multiplies bfloat16 natively")
            if native
            else (torch.float32, "this GPU does not multiply bfloat16 natively")
        )
    return torch.float32, f"of {kind} it is not known whether it multiplies bfloat16 natively"


def _native_on_cpu() -> str | None:
    """The instructions by which this CPU multiplies bfloat16 faster than float32."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else _asked_one_by_one()
    slow = SLOW_ON_INTEL if "Intel" in str(capabilities.get("cpu_name")) else None
    return next((shown for name, shown in NATIVE.items() if capabilities.get(name) and name != slow), None)


def _asked_one_by_one() -> dict[str, bool | str]:
    """The capabilities that matter here, of an older torch."""
    import torch

    from ..model.onednn import made_by_amd

    questions = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    answers = {name: getattr(torch.cpu, question, lambda: False)() for name, question in questions.items()}
    return {**answers, "cpu_name": "AMD" if made_by_amd() else "Intel"}
