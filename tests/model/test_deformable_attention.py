"""The operator in plain PyTorch against the original's float64 tensors."""

import json

import pytest
import torch
from helpers import GOLDEN, needs_golden
from safetensors.torch import load_file

from mask2former_hf.model.deformable_attention import MultiScaleDeformableAttention, multi_scale_deformable_attention


@needs_golden
@pytest.mark.parametrize("case", range(6))
def test_golden_operator_and_its_gradients(case):
    tensors = load_file(GOLDEN / "msda_op" / "msda.safetensors")
    own = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{case}.")}
    inputs = [own[name].requires_grad_() for name in ("value", "sampling_locations", "attention_weights")]
    value, locations, weights = inputs
    shapes = [tuple(shape) for shape in own["spatial_shapes"].tolist()]
    output = multi_scale_deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(output, own["output"], rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(output, inputs, own["grad_output"])
    for name, gradient in zip(("value", "sampling_locations", "attention_weights"), gradients, strict=True):
        torch.testing.assert_close(gradient, own[f"grad_{name}"], rtol=1e-8, atol=1e-10, msg=name)


@needs_golden
def test_golden_module():
    golden = load_file(GOLDEN / "msda_op" / "module.safetensors")
    module = MultiScaleDeformableAttention(32, 4, 3, 4)
    module.load_state_dict({k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")})
    shapes = [tuple(shape) for shape in golden["spatial_shapes"].tolist()]
    points = golden["reference_points"]
    assert torch.equal(points[:, :, :1].expand_as(points), points) and torch.equal(points[0], points[1])
    output = module(golden["query"], golden["input_flatten"], points[0, :, 0], shapes)
    torch.testing.assert_close(output, golden["output"], rtol=1e-5, atol=1e-5)


def test_cases_cover_far_and_out_of_range_locations():
    if not GOLDEN.is_dir():
        pytest.skip("golden tensors of the original (../shared) not found")
    kinds = {case["locations"] for case in json.loads((GOLDEN / "msda_op" / "cases.json").read_text())}
    assert {"in", "out", "border", "far"} <= kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_sampled_in_float32(dtype):
    value = torch.randn(1, 20, 2, 4).to(dtype)
    locations, weights = torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3).to(dtype)
    shapes = [(3, 4), (2, 4)]
    half = multi_scale_deformable_attention(value, shapes, locations, weights)
    exact = multi_scale_deformable_attention(value.float(), shapes, locations, weights.float())
    assert half.dtype == dtype
    torch.testing.assert_close(half, exact.to(dtype))


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="num_heads=5 must divide embed_dim=32"):
        MultiScaleDeformableAttention(32, 5, 3, 4)
