"""Modules → ONNX graphs, by PyTorch's tracer.

Not by its newer exporter, which reasons about every size as a formula: a tiny model takes 30 s of it and 2 s here, it
converts no graph to opset 17, and results whose sizes depend on values do not pass it. What the tracer cannot see,
conditions in Python, is mended in `modules.py`, and every export is compared with the checkpoint at other sizes.
"""

import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch
from torch.onnx.errors import OnnxExporterError

from ..inference.exported import LOGITS
from ..model.channels import model_channels
from .errors import ExportError, require
from .modules import RESULTS, Network

TRACED_SIZE = (96, 160)  # a multiple of 32 that is no square and not one of whole windows of Swin
OPSETS = (17, 18, 19, 20)
LARGEST_FILE = 2**31 - 2**20  # bytes of weights: protobuf reads no file above 2 GiB
WEIGHTS = ".data"  # behind a graph's name: the file of its weights, where it is too large for one


def trace_network(network: Network, size: tuple[int, int] | None, opset: int):
    """An `onnx.ModelProto` from pixels to logits; any batch, and any multiple of 32 unless `size` fixes it."""
    channels = model_channels(network.model.config)
    pixels = torch.randn(2, channels, *(size or TRACED_SIZE), generator=torch.Generator().manual_seed(0))
    height, width = ("height", "width") if size is None else (None, None)
    axes = {
        "pixel_values": {0: "batch", 2: height, 3: width},
        LOGITS[0]: {0: "batch"},
        LOGITS[1]: {0: "batch", 2: height and "height / 4", 3: width and "width / 4"},
    }
    axes = {name: {axis: text for axis, text in own.items() if text} for name, own in axes.items()}
    return trace(network, (pixels,), ["pixel_values"], list(LOGITS), axes, opset)


def trace_results(task: str, config, top_k: int, resize_masks_first: bool, opset: int):
    """An `onnx.ModelProto` from one image's logits to its result."""
    Q, K = config.num_queries, config.num_labels
    module = RESULTS[task](config.common_stride, min(top_k, Q * K), resize_masks_first).eval()
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, Q, K + 1, generator=generator) * 5, torch.randn(1, Q, 24, 40, generator=generator))
    sizes = (torch.tensor([90, 150]), torch.tensor([61, 83]))
    numbers = {"stuff": torch.arange(K) >= K - 1, "threshold": torch.tensor(0.1), "mask_threshold": torch.tensor(0.5)}
    numbers["overlap_threshold"] = torch.tensor(0.0, dtype=torch.float64)
    inputs = [*LOGITS, "image_size", "target_size", *module.inputs]
    axes = {LOGITS[1]: {2: "height / 4", 3: "width / 4"}, "segmentation": {0: "target height", 1: "target width"}}
    if task == "panoptic":
        axes |= {name: {0: "segments"} for name in module.outputs[1:]}
    elif task == "instance":
        axes |= {name: {0: "instances"} for name in module.outputs[1:]}
        axes["masks"] = {0: "instances", 1: "target height", 2: "target width"}
    given = (*logits, *sizes, *(numbers[name] for name in module.inputs))
    return trace(module, given, inputs, list(module.outputs), axes, opset)


def trace(module, given: tuple, inputs: list[str], outputs: list[str], axes: dict, opset: int):
    """An `onnx.ModelProto` of a module.

    Args:
        given: tensors for the module's arguments.
        inputs, outputs: names.
        axes: input or output -> axis -> name, of axes that may have any length.
    """
    onnx = require("onnx")
    # After an error torch prints the graph, thousands of lines.
    quiet = mock.patch.object(torch._C, "_jit_onnx_log", lambda *parts: None, create=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad(), quiet:
        warnings.simplefilter("ignore")  # that the tracer is the older one, and of every condition on a size
        path = Path(folder) / "graph.onnx"
        try:
            torch.onnx.export(
                module,
                given,
                str(path),  # beside which large weights are written; a Path has no place for them
                input_names=inputs,
                output_names=outputs,
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
        except OnnxExporterError as error:
            reason = str(error).splitlines()[0]
            raise ExportError(f"the model has an operator that is not written as ONNX: {reason}") from error
        return onnx.load(path)


def joined(network, results, defaults: dict):
    """Network and results in one graph, whose inputs of `defaults` need not be given.

    Args:
        defaults: name → NumPy array.
    """
    onnx = require("onnx")
    results = onnx.compose.add_prefix(results, "results/", rename_inputs=False, rename_outputs=False)
    outputs = [value.name for value in results.graph.output]
    # Not by `merge_models`, which checks the whole in memory, where it may have no more than 2 GB.
    io_map = [(name, name) for name in LOGITS]
    graph = onnx.compose.merge_graphs(network.graph, results.graph, io_map, outputs=outputs)
    merged = onnx.helper.make_model(graph, opset_imports=network.opset_import, ir_version=network.ir_version)
    merged.graph.output.extend(network.graph.output)
    for name, array in defaults.items():
        if name in {value.name for value in merged.graph.input}:
            merged.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return merged


def is_large(graph) -> bool:
    """Whether one file cannot hold the weights."""
    return sum(len(tensor.raw_data) for tensor in graph.graph.initializer) > LARGEST_FILE


def save(graph, path: Path):
    """Write a graph; its weights beside it where one file cannot hold them."""
    onnx = require("onnx")
    external = {"save_as_external_data": True, "location": path.name + WEIGHTS} if is_large(graph) else {}
    onnx.save(graph, path, **external)
    onnx.checker.check_model(str(path))
