"""`mask2former-hf export`: a checkpoint to a folder that runs in ONNX Runtime, OpenVINO or as a PyTorch program."""

import argparse
import sys
import time
from pathlib import Path

from ..export.errors import ExportError
from ..export.exporting import DTYPES, export_model
from ..export.tracing import OPSETS
from ..inference.exported import LOGITS
from ..model.channels import image_channels
from ..model.result_defaults import TASKS
from .loading import load
from .main import UserError
from .verify import read_images

TARGETS = ("onnx", "openvino", "torch")
MOST_IMAGES = 64  # of calibration: ranges no longer change


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the export")
    parser.add_argument("--to", default="onnx", help=f"{', '.join(TARGETS)} (default: %(default)s)")
    parser.add_argument("--task", help=f"put the rules of these results into the graph: {', '.join(TASKS)}")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="the only size (default: any multiples of 32)"
    )
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    parser.add_argument("--opset", type=int, help=f"{OPSETS[0]} to {OPSETS[-1]} (default: {OPSETS[0]})")
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="IMAGE", help="files or folders that int8 measures its ranges on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at --output")


def run(arguments: argparse.Namespace) -> int:
    if arguments.to not in TARGETS:
        raise UserError(f"--to {arguments.to}: must be one of {', '.join(TARGETS)}")
    if arguments.to == "torch":
        _refuse_for_torch(arguments)
    if arguments.images and arguments.dtype != "int8":
        raise UserError("--images are for --dtype int8; leave them out")
    model, processor = load(arguments.checkpoint, "cpu", "CHECKPOINT")
    calibration = read_images(arguments.images, image_channels(processor), MOST_IMAGES) if arguments.images else []
    steps = Steps()
    common = {"size": arguments.size, "overwrite": arguments.overwrite, "on_step": steps}
    try:
        if arguments.to == "torch":
            from ..export.programs import export_program

            report = export_program(model, processor, arguments.output, **common)
        else:
            report = export_model(
                model,
                processor,
                arguments.output,
                task=arguments.task,
                dtype=arguments.dtype,
                opset=OPSETS[0] if arguments.opset is None else arguments.opset,
                calibration=calibration,
                openvino=arguments.to == "openvino",
                **common,
            )
    except (ExportError, ImportError) as error:
        raise UserError(_with_flags(str(error))) from error
    finally:
        steps.close()
    for rows, runtime in (("differences", ""), ("openvino", " in OpenVINO")):
        if rows in report:
            worst = max(row[name] for row in report[rows] for name in LOGITS)
            print(f"{arguments.output}: logits{runtime} differ from the checkpoint's by {worst:.1e} of the largest")
    if arguments.to != "torch":
        print(f"Next: mask2former-hf predict IMAGE --model {arguments.output} --output of_the_export")
    return 0


def _refuse_for_torch(arguments):
    if arguments.opset is not None:
        raise UserError(f"--opset {arguments.opset}: is of ONNX; leave it out with --to torch")
    given = {"--task": arguments.task, "--dtype": arguments.dtype != "float32" and arguments.dtype}
    for flag, value in given.items():
        if value:
            raise UserError(f"{flag} {value}: a program of --to torch gives float32 logits; leave it out")


def _with_flags(text: str) -> str:
    """An error of Python's arguments in the words of the command line."""
    for name in ("task", "size", "dtype", "opset"):
        if text.startswith(f"{name}="):
            text = f"--{text.replace('=', ' ', 1).replace(chr(39), '')}"
    return text.replace("needs calibration: give", "needs --images: give").replace(
        "or overwrite it", "or add --overwrite to replace it"
    )


class Steps:
    """Prints each step, and the seconds that it took."""

    def __init__(self):
        self.step, self.start = None, 0.0

    def __call__(self, step: str):
        self.close()
        self.step, self.start = step, time.perf_counter()
        print(f"{step} ...", end=" ", flush=True, file=sys.stderr)

    def close(self):
        if self.step is not None:
            print(f"{time.perf_counter() - self.start:.0f} s", file=sys.stderr)
            self.step = None
