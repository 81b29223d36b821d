"""The ONNX graph → OpenVINO's own form, checked against the checkpoint."""

import tempfile
from pathlib import Path

import numpy as np
from torch import nn

from ..inference.exported import LOGITS, MODEL
from .errors import require
from .openvino_forms import join_weighted_rows
from .parity import compare_logits
from .tracing import save
from .winograd import replace_wide_convolutions

KEPT_SHAPES = 4  # compiled networks, each with weights of its own


class OpenVinoModel:
    """The network's logits by OpenVINO on the CPU, as `ExportedModel.logits` gives them.

    It is compiled for each shape of pixels that comes, the latest few are kept. A network for all shapes is slower:
    ResNet-50 at 640 x 640, 2 threads, 1.44 s against 1.27 s, as chains of products and sums are not fused in it. A
    compilation takes 1.2 s.
    """

    def __init__(self, folder: Path, threads: int | None = None):
        self.core = require("openvino", "openvino").Core()
        self.network = self.core.read_model(folder / "model.xml")
        self.inputs = {name for port in self.network.inputs for name in port.names}
        # float32 as the file has it: on processors with bfloat16 the CPU plugin takes that by itself.
        self.options = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._compiled = {}  # by shape, the latest last

    def logits(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        feed = {"pixel_values": pixel_values, "image_size": np.ones(2, int), "target_size": np.ones(2, int)}
        feed = {name: value for name, value in feed.items() if name in self.inputs}
        outputs = self.compiled(pixel_values.shape)(feed)
        return [outputs[name] for name in LOGITS]

    def compiled(self, shape: tuple[int, ...]):
        """The network for pixels of a shape."""
        compiled = self._compiled.pop(shape, None)
        if compiled is None:
            network = self.network.clone()
            network.reshape({"pixel_values": shape})
            compiled = self.core.compile_model(network, "CPU", self.options)
            while len(self._compiled) >= KEPT_SHAPES:
                del self._compiled[next(iter(self._compiled))]
        self._compiled[shape] = compiled
        return compiled


def convert(folder: Path, graph, model: nn.Module, size, dtype: str) -> list[dict]:
    """Write `model.xml` and `model.bin` beside `model.onnx`.

    Args:
        graph: an `onnx.ModelProto` of `OPENVINO_FORMS`; None for what `model.onnx` has.

    Returns:
        The differences to the checkpoint, as `compare_logits`.
    """
    openvino = require("openvino", "openvino")
    with tempfile.TemporaryDirectory() as temporary:
        source = folder / MODEL
        if graph is not None:
            source = Path(temporary) / MODEL
            save(graph, source)
        converted = openvino.convert_model(source)
        join_weighted_rows(converted)
        replace_wide_convolutions(converted)
        openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    return compare_logits(model, OpenVinoModel(folder), dtype, size)
