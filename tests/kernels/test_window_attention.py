"""Attention over shifted windows in Triton against transformers' way of it in float64: pad, shift, cut, attend, undo.

On a machine with a GPU the tests run there. Without one they run in Triton's interpreter, which must be chosen before
Triton is imported: the first test starts this file again in a process of its own, and that of the norms with it.
"""

from pathlib import Path

import pytest
import torch
from helpers import relative_difference, tiny_model
from torch.nn import functional as F
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer
from triton_runs import (
    DEVICE,
    INTERPRETED,
    compiled_ahead,
    in_the_first_process,
    needs_kernel,
    passed_in_the_interpreter,
)

from mask2former_hf.kernels import use_kernel, windows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@in_the_first_process
def test_everything_below_and_the_norms_hold_in_tritons_interpreter():
    assert passed_in_the_interpreter(__file__, str(Path(__file__).with_name("test_norms_on_gpu.py"))) >= 28


def transformers_way(projected, fill, position_bias, side, shift, scale):
    """What SwinLayer and SwinAttention do with tokens that are projected already, padding to `fill`."""
    (B, H, W, width), h = projected.shape, len(position_bias)
    layer = SwinLayer(
        SwinConfig(embed_dim=h, num_heads=[h], window_size=side), h, (64, 64), h, shift_size=shift
    )  # for its mask alone
    padded = F.pad(projected - fill, (0, 0, 0, -W % side, 0, -H % side)) + fill
    down, across = padded.shape[1] // side, padded.shape[2] // side
    rolled = torch.roll(padded, (-shift, -shift), (1, 2))
    cut = rolled.view(B, down, side, across, side, 3, h, width // 3 // h).permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = cut.reshape(3, B * down * across, h, side**2, -1)
    scores = query @ key.transpose(-1, -2) * scale + position_bias
    if shift:
        mask = layer.get_attn_mask(down * side, across * side, projected.dtype, projected.device)
        scores = scores + mask.squeeze(1).repeat(B, 1, 1)[:, None]
    attended = scores.softmax(-1) @ value  # (windows, h, n, D)
    attended = attended.view(B, down, across, h, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)
    attended = torch.roll(attended.reshape(B, down * side, across * side, width // 3), (shift, shift), (1, 2))
    return attended[:, :H, :W]


CASES = [
    # B, H, W, h, D, side, shift, dtype
    pytest.param(2, 8, 12, 2, 16, 4, 0, torch.float32, id="whole windows"),
    pytest.param(2, 8, 12, 2, 16, 4, 2, torch.float32, id="shifted"),
    pytest.param(1, 9, 7, 3, 8, 4, 2, torch.float32, id="shifted and padded"),
    pytest.param(1, 3, 2, 1, 24, 7, 3, torch.float32, id="smaller than a window"),
    pytest.param(1, 15, 13, 1, 32, 12, 6, torch.float32, id="windows of 144"),
    pytest.param(2, 9, 15, 3, 32, 7, 3, torch.bfloat16, id="bfloat16"),
    pytest.param(1, 14, 13, 1, 32, 12, 6, torch.float16, id="windows of 144 in float16"),
]


@needs_kernel
@pytest.mark.parametrize("B, H, W, h, D, side, shift, dtype", CASES)
def test_values_and_gradients_are_those_of_transformers_way(B, H, W, h, D, side, shift, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter takes the bits of bfloat16 for integers in products")
    generator, kinds = torch.Generator().manual_seed(0), (dtype, dtype, torch.float32)
    shapes = (B, H, W, 3 * h * D), (3 * h * D,), (h, side**2, side**2)
    ours = [
        torch.randn(shape, generator=generator).to(DEVICE, kind) for shape, kind in zip(shapes, kinds, strict=True)
    ]
    exact = [x.double().requires_grad_() for x in ours]
    incoming = torch.randn(B, H, W, h * D, generator=generator).to(DEVICE, dtype)
    scale, tolerance = D**-0.5, TOLERANCE[dtype]
    with use_kernel("triton"):
        found = windows.forward(*[x.requires_grad_() for x in ours], side, shift, scale)[0]
    expected = transformers_way(*exact, side, shift, scale)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(found, ours, incoming)
    expected = torch.autograd.grad(expected, exact, incoming.double())
    for a, b, like in zip(found, expected, ours, strict=True):
        assert a.dtype == like.dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5 * tolerance * b.abs().max().item())


@needs_kernel
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_a_backbone_gives_the_same_maps_with_every_kernel_of_triton(backbone):
    encoder = tiny_model(backbone).model.pixel_level_module.encoder.to(DEVICE)
    pixels = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    maps = {}
    for name in ("reference", "triton"):
        with torch.inference_mode(), use_kernel(name):
            maps[name] = encoder(pixels).feature_maps
    for found, expected in zip(maps["triton"], maps["reference"], strict=True):
        assert relative_difference(found, expected) < 1e-5


@needs_kernel
def test_a_block_in_training_gives_the_same_gradients_by_the_kernel():
    encoder = tiny_model("swin").model.pixel_level_module.encoder.to(DEVICE).train()
    pixels = torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradients = {}
    for name in ("reference", "triton"):
        encoder.zero_grad()
        with use_kernel(name):
            sum(x.square().mean() for x in encoder(pixels).feature_maps).backward()
        gradients[name] = {key: p.grad.clone() for key, p in encoder.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in gradients["reference"].values())
    assert gradients["triton"].keys() == gradients["reference"].keys()
    for key, gradient in gradients["reference"].items():
        assert (gradients["triton"][key] - gradient).abs().max() < 1e-4 * largest, key


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(name):
    from mask2former_hf.kernels import windows_triton

    constants = {"D": 16, "SIDE": 4, "BLOCK_D": 16, "ROWS": 16, "COLUMNS": 16, "PRECISION": "ieee"}
    halves = ("projected", "fill", "output", "gradient", "projected_gradient")
    types = dict.fromkeys(halves, "*bf16") | {"scale": "fp32"}
    types |= dict.fromkeys(("H", "W", "shift", "h", "windows", "groups"), "i32")
    assert compiled_ahead(getattr(windows_triton, name), constants, types)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "name", ["batch_norm_kernel", "layer_norm_kernel", "moments_kernel", "moments_to_scale_kernel", "scale_kernel"]
)
def test_the_norms_compile_for_a_gpu_that_is_not_there(name):
    from mask2former_hf.kernels import norms_triton

    constants = {"ROWS": 4, "PLUS": True, "RECTIFY": True, "TOTAL": True, "GROUPS": 8}
    constants |= {"BLOCK_C": 64} if name in ("batch_norm_kernel", "layer_norm_kernel") else {"C": 64}
    types = dict.fromkeys(("x", "plus", "update", "total", "normed"), "*bf16") | {"eps": "fp32"}
    types |= dict.fromkeys(("rows", "steps", "parts", "C"), "i32")
    assert compiled_ahead(getattr(norms_triton, name), constants, types)
