"""A checkpoint → the folder of an export, checked, complete or not at all."""

import copy
import importlib.metadata
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..inference.export_files import REPORT
from ..inference.exported import MODEL, ExportedModel, input_numbers
from ..inference.known_labels import stuff_of, task_of, window_of
from ..inference.rules import Rules, rules_of
from ..model.channels import check_same_channels
from ..model.design_rules import classifies_pixels
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.result_defaults import MAX_INSTANCES, TASKS
from .card import write_card
from .errors import ExportError, require
from .folders import complete_or_nothing
from .modules import Network
from .openvino import convert
from .openvino_forms import OPENVINO_FORMS
from .parity import compare_logits, compare_results, reference_of
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

    `Segmenter(folder)` runs it without torch. The folder has `model.onnx`, both configs, a card, and `export.json`.

    Args:
        model, processor: `Mask2FormerForUniversalSegmentation` and its image processor; they stay as they are.
        folder: made, whole or not at all.
        task: "panoptic", "instance" or "semantic" puts the rules of these results into `model.onnx`; None writes
            logits, and the rules of each task as a small graph of its own.
        size: (height, width), multiples of 32, if the graph is to take no other; None for any multiples of 32.
        dtype: "float32", "float16" or "int8" of weights and arithmetic. Inputs and logits are float32.
        opset: of ONNX, 17 to 20.
        calibration: (H, W, 3) uint8 images, or (H, W, C) bands, that int8 measures its ranges on; a few dozen.
        openvino: write OpenVINO's `model.xml` beside it, checked as well.
        overwrite: replace an earlier export at `folder`.
        on_step: told what is done next.

    Returns:
        what `export.json` says: opset, sizes, versions, and the largest difference of the logits for each input tried.

    Raises:
        ExportError: for settings that do not fit, and for a graph that is not the checkpoint.
        ImportError: for a missing package, with the line that installs it.
    """
    _check_settings(task, size, dtype, opset, calibration)
    check_model(model, processor)
    packages = [*VERSIONS, *["openvino"] * openvino]
    for name in packages:
        require(name, "openvino" if openvino else "onnx")
    processor = fitted_processor(processor, size)
    config, rules = _config_and_rules(model, processor, task)
    report = {"task": task, "opset": opset, "dtype": dtype, "size": None if size is None else list(size)}
    with complete_or_nothing(Path(folder), overwrite) as staging, torch.no_grad():
        _write(staging, model, config, processor, rules, report, calibration, on_step)
        on_step("checking it against the checkpoint")
        settings = reference_of(model), config, processor, rules, dtype, size
        report["differences"] = _checked(ExportedModel(staging, runtime="onnxruntime"), *settings)
        if openvino:
            on_step("converting it for OpenVINO")
            convert(staging, _openvino_graph(model, config, rules, report) if dtype == "float32" else None)
            exported = ExportedModel(staging, runtime="openvino")
            exported.graph.kept = 1  # for large models
            report["openvino"] = _checked(exported, *settings)
        report["versions"] = versions(*packages)
        write_report(staging, REPORT, report)
        write_card(staging, config, report)
    return report


def _config_and_rules(model, processor, task: str | None) -> tuple:
    """A config that says what the model is for, and by name the rules of the task's results, or of each task's."""
    config = copy.deepcopy(model.config)
    config.task, config.stuff_label_ids = task_of(model.config), stuff_of(model.config, processor)
    tasks = [task] if task else ["semantic"] if classifies_pixels(config) else TASKS
    try:
        return config, {name: rules_of(config, name, processor=processor) for name in tasks}
    except ValueError as error:
        raise ExportError(str(error)) from error


def _graphs(model, config, processor, rules, report, calibration, on_step) -> dict:
    """Graphs by file name: one with the results of the task, or the network and the results of each task."""
    task, size, dtype, opset = (report[name] for name in ("task", "size", "dtype", "opset"))
    network = _network_graph(model, processor, size, dtype, opset, calibration, on_step)
    on_step(f"adding the rules of {', '.join(rules)} results")
    return _with_results(network, config, rules, task, opset)


def _network_graph(model, processor, size, dtype, opset, calibration, on_step):
    on_step("tracing the network")
    graph = trace_network(Network(model, torch.float16 if dtype == "float16" else torch.float32), size, opset)
    if dtype != "int8":
        return graph
    from .quantization import quantized

    on_step(f"measuring the ranges of {len(calibration)} images")
    return quantized(graph, processor, calibration)


def _openvino_graph(model, config, rules: dict[str, Rules], report: dict):
    """As `model.onnx`, of float32, in the forms that are fastest in OpenVINO."""
    task, size, opset = (report[name] for name in ("task", "size", "opset"))
    graph = trace_network(Network(model, forms=OPENVINO_FORMS), size, opset)
    return _with_results(graph, config, rules, task, opset)[MODEL] if task else graph


def _with_results(network, config, rules: dict[str, Rules], task: str | None, opset: int) -> dict:
    """Graphs by file name: one with the results of the task, or the network and the results of each task."""
    graphs = {
        name: trace_results(name, config, MAX_INSTANCES, not own.semantic_only, opset) for name, own in rules.items()
    }
    if task:
        return {MODEL: joined(network, graphs[task], input_numbers(rules[task]))}
    return {MODEL: network} | {f"{name}.onnx": graph for name, graph in graphs.items()}


def _write(folder: Path, model, config, processor, rules: dict[str, Rules], report: dict, calibration, on_step):
    for name, graph in _graphs(model, config, processor, rules, report, calibration, on_step).items():
        save(graph, folder / name)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_report(folder, REPORT, report)


def _checked(
    exported: ExportedModel, reference, config, processor, rules: dict[str, Rules], dtype: str, size
) -> list[dict]:
    """The differences of logits, after results were compared too; see `parity`."""
    rows = compare_logits(reference, exported, dtype, size)
    for own in rules.values():
        numbers = {} if own.task == "semantic" else {"threshold": 0.0, "overlap_threshold": 0.0}
        compare_results(exported, rules_of(config, own.task, processor=processor, **numbers), size)
    return rows


def versions(*packages: str) -> dict[str, str]:
    return {"mask2former_hf": __version__} | {name: importlib.metadata.version(name) for name in packages}


def write_report(folder: Path, name: str, report: dict):
    (folder / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


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


def check_model(model, processor):
    """Refuse models whose results a graph of one image does not give, and a processor of other channels."""
    if isinstance(model, Mask2FormerForVideoSegmentation):
        raise ExportError("a model of clips is not exported: a graph takes images, and objects would lose their ids")
    if window_of(model.config) is not None:
        raise ExportError(
            "checkpoints with a sliding window are not exported: a graph sees an image once; use Segmenter"
        )
    try:
        check_same_channels(model.config, processor)
    except ValueError as error:
        raise ExportError(str(error)) from error


def check_size(size):
    """Refuse a (height, width) that is no pair of multiples of 32."""
    if len(size) != 2 or any(side < 32 or side % 32 for side in size):
        rounded = " ".join(str(max(32, round(side / 32) * 32)) for side in size)
        raise ExportError(f"size={tuple(size)}: height and width must be multiples of 32, such as {rounded}")


def fitted_processor(processor, size):
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
