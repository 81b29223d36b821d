"""The necks of plain ViTs give the tensors of detectron2's pyramid and of Meta's adapter."""

import json

import pytest
import torch
from helpers import GOLDEN, needs_golden
from safetensors.torch import load_file

from mask2former_hf.model.plain_vit import whole_patches
from mask2former_hf.model.vit_adapter import DropPath, ViTAdapter, tapped_blocks
from mask2former_hf.model.vit_pyramid import SimpleFeaturePyramid

pytestmark = needs_golden
ADAPTER, PYRAMID = GOLDEN / "vit_adapter", GOLDEN / "simple_feature_pyramid"


def cotangent(x):
    return torch.sin(0.1 * torch.arange(x.numel(), dtype=torch.float32)).view_as(x)


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


def gradients(outputs, inputs):
    return torch.autograd.grad(sum((x * cotangent(x)).sum() for x in outputs), inputs)


@pytest.mark.parametrize("case", ["ln", "even"])
def test_the_pyramid_has_detectron2_s_values_and_gradient(case):
    tensors = load_file(PYRAMID / f"{case}.safetensors")
    features = tensors["features"].requires_grad_()
    B, C, h, w = features.shape
    pyramid = SimpleFeaturePyramid(C, tensors["out.p2"].shape[1])
    pyramid.load_state_dict({name[8:]: x for name, x in tensors.items() if name.startswith("weights.")})
    outputs = pyramid(torch.zeros(B, 3, 16 * h, 16 * w), (features,))
    for level, x in enumerate(outputs, start=2):
        close(x, tensors[f"out.p{level}"])
    close(gradients(outputs, [features])[0], tensors["grad_features"])


def golden_adapter():
    state = load_file(ADAPTER / "model.safetensors")
    adapter = ViTAdapter(64, stem_width=8)
    own = {name.removeprefix("segmentation_model.0."): x for name, x in state.items() if "backbone" not in name}
    adapter.load_state_dict({name: x for name, x in own.items() if not name.startswith("segmentation_model.")})
    return adapter.eval(), load_file(ADAPTER / "inputs.safetensors"), load_file(ADAPTER / "outputs.safetensors")


def vit_maps(tensors, prefix=""):
    return tuple(tensors[f"{prefix}vit.{k}.patches"] for k in range(4))


def test_the_adapter_has_meta_s_values_and_gradient():
    adapter, inputs, expected = golden_adapter()
    queries = []
    for interaction in adapter.interactions:
        interaction.register_forward_hook(lambda module, args, output: queries.append(output))
    outputs = adapter(inputs["a.pixel_values"], vit_maps(expected, "a."))
    for level, x in enumerate(outputs, start=1):
        close(x, expected[f"a.adapter.{level}"])
    for n, x in enumerate(queries):
        close(x, expected[f"a.interaction.{n}.c"])
    norms = json.loads((ADAPTER / "grad_norms.json").read_text())["norms"]
    names = [name for name, _ in adapter.named_parameters()]
    assert set(names) == set(norms)
    for name, gradient in zip(names, gradients(outputs, list(adapter.parameters())), strict=True):
        assert gradient.norm().item() == pytest.approx(norms[name], rel=1e-4), name


def test_the_adapter_has_meta_s_values_on_a_padded_image():
    adapter, inputs, expected = golden_adapter()
    with torch.no_grad():
        outputs = adapter(inputs["b.pixel_values_padded"], vit_maps(expected, "b."))
    close(outputs[0][..., ::2, ::2], expected["b.adapter.1.every_second"])
    for level in (2, 3, 4):
        close(outputs[level - 1], expected[f"b.adapter.{level}"])


def test_the_adapter_trains_with_statistics_of_the_batch():
    adapter, inputs, expected = golden_adapter()
    for module in adapter.train().modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    outputs = adapter(inputs["a.pixel_values"], vit_maps(expected, "a."))
    for level in (3, 4):
        close(outputs[level - 1], expected[f"a.train.adapter.{level}"], 2e-5)
    for name in ("spm.stem.1", "norm4"):
        for part in ("running_mean", "running_var"):
            close(adapter.state_dict()[f"{name}.{part}"], expected[f"a.train.{name}.{part}"])


def test_the_adapter_of_patches_of_14_pixels_has_meta_s_values():
    tensors = load_file(ADAPTER / "patch14.safetensors")
    adapter = ViTAdapter(16, num_heads=4, stem_width=4).eval()
    adapter.load_state_dict({name[8:]: x for name, x in tensors.items() if name.startswith("weights.")})
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (tensors["image"].float() / 255 - mean) / std
    assert whole_patches(pixels, (14, 14)) is pixels
    with torch.no_grad():
        outputs = adapter(pixels, vit_maps(tensors))
    close(outputs[0][..., ::2, ::2], tensors["adapter.1.every_second"])
    for level in (2, 3, 4):
        close(outputs[level - 1], tensors[f"adapter.{level}"])


def test_the_four_maps_are_those_of_meta_s_models():
    assert [tapped_blocks(n) for n in (12, 24, 32, 40)] == [
        [3, 6, 9, 12], [5, 12, 18, 24], [8, 16, 24, 32], [10, 20, 30, 40]
    ]  # fmt: skip


def test_a_dropped_path_is_left_out_for_whole_images_and_keeps_the_mean():
    x = torch.ones(2000, 3)
    torch.manual_seed(0)
    dropped = DropPath(0.3).train()(x)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert (dropped == dropped[:, :1]).all() and dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert DropPath(0.3).eval()(x) is x
