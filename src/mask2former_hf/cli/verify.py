"""`mask2former-hf verify`: is a checkpoint the same network here and in stock transformers, or in an export, and how
fast is each?"""

import argparse
import statistics
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.utils import ModelOutput

from .. import __version__
from ..data import kinds
from ..data.bands import read_pixels
from ..data.image_lists import find_files
from ..data.json_files import write_json
from ..evaluation.evaluator import evaluate, headline
from ..inference.exported import ExportedModel, is_exported
from ..inference.loading import default_device
from ..inference.runtimes import runs_on_cuda
from ..kernels import select
from ..model.canvas import image_sizes_of
from ..model.channels import image_channels
from ..model.design_rules import own_design
from .datasets import add_data_arguments, load_split
from .device import add_device_argument
from .loading import load
from .main import UserError
from .precision import add_dtype_argument

NOISE_SIZE = (480, 640)
# Trained weights differ by about 1e-6. One bit of an attention mask that falls the other way, at a logit of zero to
# within rounding, moved a logit of random weights by 1e-3 of the largest.
TOLERANCE = 2e-3


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder or Hub id")
    parser.add_argument("--images", nargs="+", type=Path, metavar="IMAGE", help="files or folders (default: noise)")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="in units of the largest logit (default: %(default)s)"
    )
    parser.add_argument(
        "--runtime", metavar="DIR", help="folder of an export: compare it with the checkpoint, instead of transformers"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each per image (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report, for the model card, to this file")
    add_dtype_argument(parser, "float32; the other network is float32 always")
    add_device_argument(parser, "cuda if it is there, with --runtime if the export's runtime has it too; else cpu")
    add_data_arguments(parser.add_argument_group("data set, to measure both on"), "data")


def run(arguments: argparse.Namespace) -> int:
    """0 if the logits agree within the tolerance, 1 if not."""
    if not arguments.tolerance >= 0:
        raise UserError(f"--tolerance {arguments.tolerance}: must be 0 or more")
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: must be at least 1")
    _check_data_flags(arguments)
    dataset = None if arguments.data is None else load_split(arguments, "data")
    device = _device(arguments)
    ours, processor = load(arguments.checkpoint, device, "CHECKPOINT", arguments.dtype or "float32")
    if arguments.runtime is None and (own := own_design(ours.config)):
        raise UserError(
            f"{arguments.checkpoint}: transformers' own class has no {', '.join(own)}; compare it with an export "
            "(--runtime)"
        )
    images = read_images(arguments.images, image_channels(processor))
    versions = {"mask2former_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    if arguments.runtime is None:
        other, stock = "transformers", load_stock(arguments.checkpoint, device)
    else:
        stock = load_export(arguments, device, ours)
        runtime = stock.exported.runtime
        other, versions[runtime] = f"the export ({runtime})", import_module(runtime).__version__
    report = {
        "checkpoint": str(arguments.checkpoint),
        **compare(ours, stock, processor, images, arguments.repeats),
        "tolerance": arguments.tolerance,
        "device": torch.cuda.get_device_name(ours.device) if ours.device.type == "cuda" else "cpu",
        "dtype": str(ours.dtype).removeprefix("torch."),
        "kernel": select(ours.device, ours.dtype) or "reference",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if arguments.runtime is not None:
        report["runtime"] = str(arguments.runtime)
    worst = max(report["class_logits_difference"], report["mask_logits_difference"])
    report["equal"] = worst <= arguments.tolerance  # False for nan
    if dataset is not None:
        report["metrics"] = measure(ours, stock, processor, dataset)
    print_report(report, other)
    if arguments.json is not None:
        write_json(arguments.json, report)
    return 0 if report["equal"] else 1


def _device(arguments) -> str:
    """The flag's; by default a GPU if there is one, and if the export's runtime has it: times are of one device."""
    if arguments.device is not None or arguments.runtime is None:
        return arguments.device or default_device()
    return default_device() if runs_on_cuda(Path(arguments.runtime)) else "cpu"


def _check_data_flags(arguments):
    names = (*kinds.SHARED, *(f"data_{name}" for name in kinds.OF_A_SPLIT))
    given = [name for name in names if getattr(arguments, name) is not None]
    if arguments.data is None and given:
        flag = given[0].replace("_", "-")
        raise UserError(f"--{flag} {getattr(arguments, given[0])}: is of a data set; name its kind with --data")


def read_images(paths: list[Path] | None, channels: int | None = None, most: int | None = None) -> list[np.ndarray]:
    """The images, or so many of them, evenly spread; without paths one of noise that is the same every time."""
    if not paths:
        return [np.random.default_rng(0).integers(0, 256, (*NOISE_SIZE, channels or 3), dtype=np.uint8)]
    files, problems = find_files(map(str, paths))
    if problems:
        raise UserError(f"--images {problems[0]}")
    count = len(files) if most is None else min(len(files), most)
    try:
        return [read_pixels(files.paths[n * len(files) // count], channels) for n in range(count)]
    except (OSError, ValueError) as error:
        raise UserError(f"--images {error}") from error


def load_stock(checkpoint: str, device: str) -> torch.nn.Module:
    """transformers' own class, in float32, whatever is registered."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of every backbone but Swin, and of missing buffers
    try:
        model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
            checkpoint, dtype=torch.float32, return_dict=True
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{checkpoint}: stock transformers cannot load it ({str(error).splitlines()[0]})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.eval().to(device)


@torch.inference_mode()
def compare(ours, stock, processor, images, repeats: int) -> dict[str, float | int]:
    """Largest differences of the logits relative to stock's largest, and the median times of interleaved runs."""
    differences = {"class_queries_logits": [], "masks_queries_logits": []}
    times = {"ours": [], "stock": []}
    for image in images:
        pixels = processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"].to(
            ours.device
        )
        outputs = [model(pixel_values=pixels) for model in (ours, stock)]  # also warms up
        for name, values in differences.items():
            here, there = (output[name].double().cpu() for output in outputs)
            values.append(((here - there).abs().max() / there.abs().max()).item())
        for _ in range(repeats):
            for name, model in (("ours", ours), ("stock", stock)):
                times[name].append(seconds(model, pixels))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "images": len(images),
        "class_logits_difference": float(np.max(differences["class_queries_logits"])),  # of nan: nan
        "mask_logits_difference": float(np.max(differences["masks_queries_logits"])),
        "seconds_ours": medians["ours"],
        "seconds_stock": medians["stock"],
        "speed_ratio": medians["stock"] / medians["ours"],
    }


def seconds(model, pixels: torch.Tensor) -> float:
    """Time of one forward pass."""
    start = time.perf_counter()
    model(pixel_values=pixels)
    if pixels.device.type == "cuda":
        torch.cuda.synchronize(pixels.device)
    return time.perf_counter() - start


class Export(torch.nn.Module):
    """An export's logits as a model's output."""

    def __init__(self, exported: ExportedModel, config):
        super().__init__()
        self.exported, self.config = exported, config
        self.device_of = torch.nn.Parameter(torch.zeros(()))  # the evaluation asks a model's parameters

    def forward(self, pixel_values: torch.Tensor):
        classes, masks = (torch.from_numpy(x) for x in self.exported.logits(pixel_values.cpu().numpy()))
        return ModelOutput(class_queries_logits=classes, masks_queries_logits=masks)


def load_export(arguments, device: str, ours) -> Export:
    if not is_exported(arguments.runtime):
        raise UserError(f"--runtime {arguments.runtime}: no folder of an export; mask2former-hf export writes one")
    try:
        exported = ExportedModel(arguments.runtime, device)
    except (ValueError, ImportError) as error:
        raise UserError(f"--runtime {error}") from error
    if exported.config.id2label != ours.config.id2label:
        raise UserError(f"--runtime {arguments.runtime}: its classes are not the checkpoint's; export this checkpoint")
    if any(isinstance(side, int) for side in exported.sides):
        raise UserError(
            f"--runtime {arguments.runtime}: takes one size alone; export without --size to compare images"
        )
    return Export(exported, ours.config)


class StockWithSizes(torch.nn.Module):
    """A network that ignores the mask, with outputs that say what is padding; for batches of one."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor):
        outputs = self.model(pixel_values=pixel_values)
        return ModelOutput(
            class_queries_logits=outputs.class_queries_logits,
            masks_queries_logits=outputs.masks_queries_logits,
            image_sizes=torch.tensor(image_sizes_of(pixel_mask)),
        )


def measure(ours, stock, processor, dataset) -> dict[str, dict[str, float]]:
    """The usual figures of both networks, with this package's image processing around both."""
    metrics = {}
    for name, model in (("ours", ours), ("stock", StockWithSizes(stock))):
        try:
            metrics[name] = headline(evaluate(model, processor, dataset, batch_size=1))
        except ValueError as error:
            raise UserError(f"--data: {error}") from error
    return metrics


def print_report(report: dict, other: str):
    print(
        f"{report['checkpoint']}: {report['images']} image(s), {report['device']}, kernel {report['kernel']}, "
        f"{report['dtype']}\n  largest difference of class logits {report['class_logits_difference']:.1e}, "
        f"of mask logits {report['mask_logits_difference']:.1e} of the largest: "
        f"{'equal' if report['equal'] else 'NOT EQUAL'} within {report['tolerance']:.0e}\n"
        f"  {report['seconds_ours']:.3f} s here, {report['seconds_stock']:.3f} s in {other}: "
        f"here {report['speed_ratio']:.2f} times as fast"
    )
    for name, value in report.get("metrics", {}).get("ours", {}).items():
        print(f"  {name:10}{100 * value:7.2f} here{100 * report['metrics']['stock'][name]:9.2f} in {other}")
