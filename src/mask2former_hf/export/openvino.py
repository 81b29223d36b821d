"""The ONNX graph → OpenVINO's own form."""

from pathlib import Path

from ..inference.exported import MODEL
from ..inference.runtimes import OPENVINO_MODEL
from .errors import require
from .openvino_forms import join_weighted_rows
from .tracing import WEIGHTS, save
from .winograd import replace_wide_convolutions


def convert(folder: Path, graph=None):
    """Write `model.xml` and `model.bin` beside `model.onnx`; what has a default in the latter is an input to feed.

    Args:
        graph: an `onnx.ModelProto` of `OPENVINO_FORMS`; None for what `model.onnx` has.
    """
    onnx, openvino = require("onnx"), require("openvino", "openvino")
    if graph is None:
        graph = onnx.load(folder / MODEL, load_external_data=False)  # large weights stay where they are
    inputs = {value.name for value in graph.graph.input}
    # Of an input with a default OpenVINO makes a constant: thresholds of a result could not be chosen any more.
    weights = [tensor for tensor in graph.graph.initializer if tensor.name not in inputs]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(weights)
    source = folder / ".openvino.onnx"
    save(graph, source)
    converted = openvino.convert_model(source)
    join_weighted_rows(converted)
    replace_wide_convolutions(converted)
    openvino.save_model(converted, folder / OPENVINO_MODEL, compress_to_fp16=False)
    for path in (source, source.with_name(source.name + WEIGHTS)):
        path.unlink(missing_ok=True)
