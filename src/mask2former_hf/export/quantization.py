"""A network's graph with weights and activations of 8 bits, by ONNX Runtime's quantisation after training."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..inference.exported import ArrayProcessor
from .errors import require
from .tracing import is_large, save

# Convolutions and products by weights take the time of a network. What the results hang on stays in float32: the
# positions that deformable attention samples, and the heads, whose logits decide pixels.
QUANTIZED = ("Conv", "MatMul", "Gemm")
IN_FLOAT32 = ("sampling_offsets", "attention_weights", "class_predictor", "mask_embedder", "mask_projection")


def quantized(graph, processor, images: Sequence[np.ndarray]):
    """The graph in QDQ form: 8 bit weights by channel, activations by the ranges that the images have.

    Args:
        graph: `onnx.ModelProto` from pixels to logits.
        processor: that of the export.
        images: (H, W, 3) uint8 RGB, or bands.
    """
    onnx = require("onnx")
    tools = require("onnxruntime.quantization")
    shapes = require("onnxruntime.quantization.shape_inference")

    class Images(tools.CalibrationDataReader):
        def __init__(self):
            self.images, self.processor = iter(images), ArrayProcessor(processor.to_dict())

        def get_next(self):
            image = next(self.images, None)
            return None if image is None else {"pixel_values": self.processor(image)[0]}

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, written = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "quantized.onnx"))
        large = is_large(graph)
        save(graph, plain)
        shapes.quant_pre_process(plain, prepared, skip_symbolic_shape=True, save_as_external_data=large)
        nodes = onnx.load(prepared).graph
        constants = {tensor.name for tensor in nodes.initializer}
        kept = [node.name for node in nodes.node if _stays(node, constants)]
        tools.quantize_static(
            prepared,
            written,
            Images(),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            nodes_to_exclude=kept,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            use_external_data_format=large,
        )
        return onnx.load(written)


def _stays(node, constants: set[str]) -> bool:
    """Whether a node stays in float32: besides those by name, products of activations, which are attention's."""
    of_activations = node.op_type == "MatMul" and not any(name in constants for name in node.input)
    return of_activations or any(part in node.name for part in IN_FLOAT32)
