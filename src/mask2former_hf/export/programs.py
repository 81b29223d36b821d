"""A checkpoint as a program of `torch.export`, and compiled ahead of time where there is a C++ compiler."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from ..inference.exported import LOGITS
from ..kernels import use_kernel
from ..model.channels import model_channels
from .errors import ExportError
from .exporting import check_model, check_size, fitted_processor, versions, write_report
from .folders import PROGRAM_REPORT, complete_or_nothing
from .modules import Network
from .parity import largest, reference_of

PROGRAM, PACKAGE = "model.pt2", "model_compiled.pt2"


def export_program(
    model,
    processor,
    folder: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict:
    """Write `model.pt2`, which `torch.export.load(...).module()` runs without this package, for one image of one size.

    With a C++ compiler also `model_compiled.pt2`, which `torch._inductor.aoti_load_package` runs, from C++ as well.

    Args:
        size: (height, width), multiples of 32.
        folder, overwrite, on_step: as in `export_model`.

    Raises:
        ExportError: without a size, and for a program that is not the checkpoint.
    """
    if size is None:
        raise ExportError("size is missing: a program of torch has one size, multiples of 32, such as --size 640 640")
    check_size(size)
    check_model(model, processor)
    pixels = torch.randn(1, model_channels(model.config), *size, generator=torch.Generator().manual_seed(0))
    with complete_or_nothing(Path(folder), overwrite) as staging, torch.no_grad():
        on_step("exporting the program")
        with use_kernel("reference"):  # the operator of a kernel of ours would need this package
            program = torch.export.export(Network(model), (pixels,), strict=False)
        torch.export.save(program, staging / PROGRAM)
        on_step("checking it against the checkpoint")
        outputs = reference_of(model)(pixels.to(model.device), return_dict=True)
        expected = [outputs[name].cpu() for name in LOGITS]
        row = {"input": list(pixels.shape)}
        row |= _differences(torch.export.load(staging / PROGRAM).module(), pixels, expected)
        if shutil.which(os.environ.get("CXX", "c++")):
            on_step("compiling it ahead of time")
            _compile(program, staging / PACKAGE)
            compiled = torch._inductor.aoti_load_package(str(staging / PACKAGE))
            row |= {f"compiled_{name}": value for name, value in _differences(compiled, pixels, expected).items()}
        model.config.save_pretrained(staging)
        fitted_processor(processor, size).save_pretrained(staging)
        report = {"size": list(size), "versions": versions("torch", "transformers"), "differences": [row]}
        write_report(staging, PROGRAM_REPORT, report)
    return report


def _compile(program, path: Path):
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except (RuntimeError, subprocess.CalledProcessError) as error:  # the compiler's, and what comes before it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"the program cannot be compiled ahead of time ({reason}); name a C++ compiler with OpenMP in "
            f"the variable CXX, or one that does not exist to leave {path.name} out"
        ) from error


def _differences(run, pixels, expected) -> dict[str, float]:
    pairs = zip(LOGITS, run(pixels), expected, strict=True)
    row = {name: largest(ours.numpy(), theirs.numpy()) for name, ours, theirs in pairs}
    if not max(row.values()) <= 1e-4:
        raise ExportError(f"the program differs from the checkpoint by {row}; 1e-4 is allowed. Please report it")
    return row
