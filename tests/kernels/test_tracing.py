"""Ways out of PyTorch, which know no operators of ours, and ways that stay inside, which keep one node of them."""

import warnings

import pytest
import torch
from helpers import tiny_model

from mask2former_hf.kernels import cpu

needs_cpp = pytest.mark.skipif(
    cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="without the kernel there is only the formula"
)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        output = self.model(pixels)
        return output.class_queries_logits, output.masks_queries_logits


@pytest.fixture(scope="module")
def traced():
    """A module, its input and its output by the kernel."""
    module = Logits(tiny_model("resnet", encoder_layers=1, decoder_layers=2)).eval()
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants of the trace, as they should
        yield module, pixels, module(pixels)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-4, atol=1e-4)


@needs_cpp
def test_a_trace_holds_the_formula_and_gives_the_kernel_s_result(traced):
    module, pixels, expected = traced
    trace = torch.jit.trace(module, pixels, check_trace=False)
    graph = str(trace.inlined_graph)
    assert "aten::grid_sampler" in graph and "mask2former_hf::" not in graph
    assert_equal(trace(pixels), expected)


@needs_cpp
@pytest.mark.parametrize("dynamo", [False, True], ids=["by trace", "by torch.export"])
def test_onnx_holds_the_formula_and_gives_the_kernel_s_result(traced, dynamo, tmp_path):
    for package in ("onnx", "onnxruntime", *(["onnxscript"] if dynamo else [])):
        pytest.importorskip(package, reason=f"{package} is not installed (pip install onnx onnxscript onnxruntime)")
    import onnxruntime

    module, pixels, expected = traced
    torch.onnx.export(module, (pixels,), tmp_path / "model.onnx", dynamo=dynamo, opset_version=18 if dynamo else 17)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert_equal(session.run(None, {session.get_inputs()[0].name: pixels.numpy()}), expected)


@needs_cpp
def test_torch_export_keeps_the_operator_as_one_node_a_layer(traced):
    module, pixels, expected = traced
    program = torch.export.export(module, (pixels,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("mask2former_hf.deformable_attention.default") == 1
    assert not any("grid_sampler" in target for target in targets)
    assert_equal(program.module()(pixels), expected)
