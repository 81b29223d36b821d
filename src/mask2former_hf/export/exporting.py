"""A checkpoint → the folder of an export, checked, complete or not at all."""

import contextlib
import copy
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..inference.exported import MODEL, REPORT, ExportedModel, input_numbers
from ..inference.known_labels import stuff_of, task_of
from ..inference.rules import rules_of
from ..model.channels import check_same_channels
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.result_defaults import MAX_INSTANCES, TASKS
from .card import write_card
from .errors import ExportError, require
from .modules import Network
from .parity import compare_logits, compare_results
from .tracing import OPSETS, joined, save, trace_network, trace_results

DTYPES = ("float32", "float16", "int8")
VERSIONS = ("torch", "transformers", "onnx", "onnxruntime")


def export_model(
    model,
    processor,
    folder: str | os.PathLike,
    *,
    task: str | None = None,
    size: tuple[int, int] | None = None,
    dtype: str = "float32",
    opset: int = 17,
    calibration: Sequence[np.ndarray] = (),
    openvino: bool = False,
    overwrite: bool = False,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict:
    """Write a checkpoint as ONNX graphs that run at any size, and check them against it.

    `Segmenter(folder)` runs the export without torch. The folder has `model.onnx`, the configs of model and processor,
    a card, and what was checked as `export.json`.

    Args:
        model: `Mask2FormerForUniversalSegmentation`; it stays as it is.
        processor: its image processor.
        folder: made, whole or not at all.
        task: "panoptic", "instance" or "semantic" puts the rules of these results into `model.onnx`; None writes
            logits, and the rules of each task as a small graph of its own.
        size: (height, width), multiples of 32, if the graph is to take no other; None for any multiples of 32.
        dtype: "float32", "float16" or "int8" of weights and arithmetic. Inputs and logits are float32.
        opset: of ONNX, 17 to 20.
        calibration: (H, W, 3) uint8 images, or (H, W, C) bands, that int8 measures its ranges on; a few dozen.
        openvino: write OpenVINO's `model.xml` beside it, checked as well.
        overwrite: replace what is at `folder`.
        on_step: told what is done next.

    Returns:
        what `export.json` says: opset, sizes, versions, and the largest difference of the logits for each input tried.

    Raises:
        ExportError: for settings that do not fit, and for a graph that is not the checkpoint.
        ImportError: for a missing package, with the line that installs it.
    """
    _check_settings(task, size, dtype, opset, calibration)
    _check_model(model)
    for name in ("onnx", "onnxruntime"):
        require(name)
    check_same_channels(model.config, processor)
    processor = _processor_for(processor, size)
    config = copy.deepcopy(model.config)
    config.task, config.stuff_label_ids = task_of(model.config), stuff_of(model.config, processor)
    tasks = [task] if task else list(TASKS)
    rules = {name: rules_of(config, name, processor=processor) for name in tasks}
    with complete_or_nothing(Path(folder), overwrite) as staging, torch.no_grad():
        on_step("tracing the network")
        network = Network(model, torch.float16 if dtype == "float16" else torch.float32)
        graph = trace_network(network, size, opset)
        del network
        if dtype == "int8":
            from .quantization import quantized

            on_step(f"measuring the ranges of {len(calibration)} images")
            graph = quantized(graph, processor, calibration)
        on_step(f"adding the rules of {', '.join(tasks)} results")
        graphs = {
            name: trace_results(name, config, MAX_INSTANCES, not own.semantic_only, opset)
            for name, own in rules.items()
        }
        if task:
            graph, graphs = joined(graph, graphs[task], input_numbers(rules[task])), {}
        for name, own in {MODEL: graph, **{f"{name}.onnx": own for name, own in graphs.items()}}.items():
            save(own, staging / name)
        config.save_pretrained(staging)
        processor.save_pretrained(staging)
        report = {
            "task": task,
            "opset": opset,
            "dtype": dtype,
            "size": None if size is None else list(size),
            "versions": {
                "mask2former_hf": __version__,
                **{name: importlib.metadata.version(name) for name in VERSIONS},
            },
        }
        _write_report(staging, report)
        on_step("checking it against the checkpoint")
        exported = ExportedModel(staging)
        reference = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        report["differences"] = compare_logits(reference.eval(), exported, dtype, size)
        for own in rules.values():
            numbers = {} if own.task == "semantic" else {"threshold": 0.0, "overlap_threshold": 0.0}
            lenient = rules_of(config, own.task, processor=processor, **numbers)
            compare_results(exported, lenient, size)
        if openvino:
            from .openvino import convert

            on_step("converting it for OpenVINO")
            report["openvino"] = convert(staging, reference, size, None if dtype == "int8" else dtype)
            report["versions"] = versions("openvino")
        _write_report(staging, report)
        write_card(staging, config, report)
    return report


def versions(*more: str) -> dict[str, str]:
    return {"mask2former_hf": __version__} | {name: importlib.metadata.version(name) for name in (*VERSIONS, *more)}


def _write_report(folder: Path, report: dict):
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _check_settings(task, size, dtype, opset, calibration):
    if task not in (None, *TASKS):
        raise ExportError(f"task={task!r}: must be one of {', '.join(TASKS)}, or None for logits")
    if dtype not in DTYPES:
        raise ExportError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if opset not in OPSETS:
        raise ExportError(f"opset={opset!r}: must be from {OPSETS[0]} to {OPSETS[-1]}")
    if size is not None:
        check_size(size)
    if dtype == "int8" and not len(calibration):
        raise ExportError("dtype='int8' needs calibration: give images like those that the model will see")


def _check_model(model):
    """Refuse models whose results a graph of one image does not give."""
    if isinstance(model, Mask2FormerForVideoSegmentation):
        raise ExportError("a model of clips is not exported: a graph takes images, and objects would lose their ids")
    if model.config.sliding_window is not None:
        raise ExportError(
            "checkpoints with a sliding window are not exported: a graph sees an image once; use Segmenter"
        )


def check_size(size):
    """Refuse a (height, width) that is no pair of multiples of 32."""
    if len(size) != 2 or any(side < 32 or side % 32 for side in size):
        rounded = " ".join(str(max(32, round(side / 32) * 32)) for side in size)
        raise ExportError(f"size={tuple(size)}: height and width must be multiples of 32, such as {rounded}")


def _processor_for(processor, size):
    """A copy of the processor that makes what the graph takes."""
    processor = copy.deepcopy(processor)
    if size is not None:
        height, width = size
        processor.size = {"max_height": height, "max_width": width}
        processor.pad_size = {"height": height, "width": width}
        processor.do_resize, processor.size_divisor = True, 32
    elif (processor.size_divisor or 1) % 32:
        raise ExportError(
            f"size_divisor={processor.size_divisor} of the processor: the graph takes multiples of 32; set it to 32"
        )
    return processor


@contextlib.contextmanager
def complete_or_nothing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the one that is wanted, which takes its place at the end and disappears after an error."""
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ExportError(f"{folder}: would replace the folder that you are in; name a folder of its own")
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (overwrite or empty):
        raise ExportError(f"{folder}: exists already; name another place, or overwrite it")
    staging, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
