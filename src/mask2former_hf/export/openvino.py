"""The ONNX graph → OpenVINO's own form."""

import math
from collections.abc import Iterator
from pathlib import Path

from ..inference.exported import MODEL, ExportedModel
from ..inference.runtimes import OPENVINO_MODEL
from .errors import require


def convert(folder: Path):
    """Write `model.xml` and `model.bin` beside `model.onnx`; what has a default in the latter is an input to feed."""
    onnx, openvino = require("onnx"), require("openvino", "openvino")
    model = onnx.load(folder / MODEL, load_external_data=False)  # large weights stay where they are
    inputs = {value.name for value in model.graph.input}
    # Of an input with a default OpenVINO makes a constant: thresholds of a result could not be chosen any more.
    weights = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    without_defaults = folder / ".without_defaults.onnx"
    without_defaults.write_bytes(model.SerializeToString())
    converted = openvino.convert_model(without_defaults)
    openvino.save_model(converted, folder / OPENVINO_MODEL, compress_to_fp16=False)
    without_defaults.unlink()


def ways_to_run(folder: Path) -> Iterator[ExportedModel]:
    """The network compiled for all shapes, and one compiled for each shape where such are used; one of them in memory
    at a time."""
    exported = ExportedModel(folder, runtime="openvino")
    has_own = exported.graph.often < math.inf
    yield exported
    if has_own:
        exported = ExportedModel(folder, runtime="openvino")
        exported.graph.often, exported.graph.kept = 0, 1
        yield exported
