"""A checkpoint as a program of `torch.export`, and compiled ahead of time where there is a C++ compiler."""

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .. import __version__
from ..inference.exported import LOGITS
from ..model.channels import model_channels
from .errors import ExportError
from .exporting import check_size, complete_or_nothing
from .modules import Network
from .parity import largest

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
    pixels = torch.randn(1, model_channels(model.config), *size, generator=torch.Generator().manual_seed(0))
    with complete_or_nothing(Path(folder), overwrite) as staging, torch.no_grad():
        network = Network(model)
        expected = network(pixels)
        on_step("exporting the program")
        program = torch.export.export(network, (pixels,), strict=False)
        torch.export.save(program, staging / PROGRAM)
        on_step("checking it against the checkpoint")
        row = {"input": list(pixels.shape)}
        row |= _differences(torch.export.load(staging / PROGRAM).module(), pixels, expected)
        if shutil.which(os.environ.get("CXX", "c++")):
            on_step("compiling it ahead of time")
            torch._inductor.aoti_compile_and_package(program, package_path=str(staging / PACKAGE))
            compiled = torch._inductor.aoti_load_package(str(staging / PACKAGE))
            row |= {f"compiled_{name}": value for name, value in _differences(compiled, pixels, expected).items()}
        model.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        versions = {"mask2former_hf": __version__, "torch": importlib.metadata.version("torch")}
        report = {"size": list(size), "versions": versions, "differences": [row]}
        (staging / "program.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _differences(run, pixels, expected) -> dict[str, float]:
    outputs = run(pixels)
    row = {
        name: largest(ours.numpy(), theirs.numpy())
        for name, ours, theirs in zip(LOGITS, outputs, expected, strict=True)
    }
    if not max(row.values()) <= 1e-4:
        raise ExportError(f"the program differs from the checkpoint by {row}; 1e-4 is allowed. Please report it")
    return row
