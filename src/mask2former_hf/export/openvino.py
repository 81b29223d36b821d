"""The ONNX graph → OpenVINO's own form, checked against the checkpoint."""

from pathlib import Path

import numpy as np
from torch import nn

from ..inference.exported import LOGITS, MODEL
from .errors import require
from .parity import compare_logits


class OpenVinoModel:
    """The network's logits by OpenVINO on the CPU, as `ExportedModel.logits` gives them."""

    def __init__(self, folder: Path, threads: int | None = None):
        core = require("openvino", "openvino").Core()
        # float32 as the file has it: on processors with bfloat16 the CPU plugin takes that by itself.
        options = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self.network = core.compile_model(folder / "model.xml", "CPU", options)
        self.inputs = {name for port in self.network.inputs for name in port.names}

    def logits(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        feed = {"pixel_values": pixel_values, "image_size": np.ones(2, int), "target_size": np.ones(2, int)}
        outputs = self.network({name: value for name, value in feed.items() if name in self.inputs})
        return [outputs[name] for name in LOGITS]


def convert(folder: Path, model: nn.Module, size, dtype: str) -> list[dict]:
    """Write `model.xml` and `model.bin` beside `model.onnx`.

    Returns:
        The differences to the checkpoint, as `compare_logits`.
    """
    openvino = require("openvino", "openvino")
    converted = openvino.convert_model(folder / MODEL)
    openvino.save_model(converted, folder / "model.xml", compress_to_fp16=False)
    return compare_logits(model, OpenVinoModel(folder), dtype, size)
