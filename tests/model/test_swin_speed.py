"""Swin's blocks with fewer copies: the network of transformers' blocks, to rounding."""

import copy

import pytest
import torch
from helpers import pack_weights
from torch import nn
from transformers import AutoBackbone, SwinConfig

from mask2former_hf.kernels import use_kernel
from mask2former_hf.model import cpu_layout, onednn, swin_speed
from mask2former_hf.model.backbone import feature_maps

SIZES = [(2, 96, 130), (1, 56, 56), (3, 40, 8)]  # padded, whole windows, less than a window


@pytest.fixture(scope="module")
def backbones():
    """transformers' Swin and the same with our blocks, both with biases that matter."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = SwinConfig(embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=4, out_features=stages)
    stock = AutoBackbone.from_config(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = copy.deepcopy(stock)
    swin_speed.gather_windows(ours)
    return stock, ours


@pytest.fixture
def attended(monkeypatch):
    """Counts the blocks that gather their windows, in inference and in training."""
    calls, block = [], swin_speed.GatheredSwinLayer
    for name in ("attend", "_train"):
        own = getattr(block, name)
        monkeypatch.setattr(block, name, lambda self, *args, own=own: calls.append(self) or own(self, *args))
    return calls


@pytest.fixture
def torch_s_parts(monkeypatch):
    """Neither oneDNN's products nor the compiled attention, which round otherwise: the next test."""
    monkeypatch.setattr(onednn, "products_are_faster", lambda dtype: False)
    with use_kernel("reference"):
        yield


def assert_near(found, expected):
    for here, there in zip(found, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6 * there.abs().max().item())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_and_gradients_are_those_of_transformers(backbones, size, attended, torch_s_parts):
    pixels, gradients = torch.randn(size[0], 3, *size[1:]), []
    maps = [backbone(pixels).feature_maps for backbone in backbones]
    assert len(attended) == 8
    assert_near(maps[1], maps[0])
    with torch.inference_mode():
        assert_near(*(backbone(pixels).feature_maps for backbone in reversed(backbones)))
        innermost = feature_maps(backbones[1], None, pixels)
        assert_near(innermost, backbones[0](pixels).feature_maps)
        assert all(x.permute(0, 2, 3, 1).is_contiguous() for x in innermost)
    for backbone, own in zip(backbones, maps, strict=True):
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in own)
        gradients.append(torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True))
    for (name, _), found, expected in zip(backbones[0].named_parameters(), gradients[1], gradients[0], strict=True):
        assert (found is None) == (expected is None)
        if found is not None and "k_proj.bias" not in name:  # whose gradient is zero to rounding
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("part", ["products", "attention"])
def test_own_products_and_attention_are_as_near_to_float64_as_torch_s(backbones, part, monkeypatch):
    if part == "products" and not onednn.is_x86_with_onednn():
        pytest.skip("not an x86 CPU with oneDNN")
    pixels, errors = torch.randn(1, 3, 96, 130), []
    with torch.inference_mode():
        exact = copy.deepcopy(backbones[1]).double()(pixels.double()).feature_maps
        for faster in (True, False):
            products = faster and part == "products"
            monkeypatch.setattr(onednn, "products_are_faster", lambda dtype, products=products: products)
            with use_kernel("auto" if faster and part == "attention" else "reference"):
                maps = backbones[1](pixels).feature_maps
            errors.append([(x - y).abs().mean() / y.abs().mean() for x, y in zip(maps, exact, strict=True)])
    assert all(ours < 2 * torch_s + 1e-7 for ours, torch_s in zip(*errors, strict=True)), errors


def test_checkpointed_blocks_have_the_same_gradients(backbones, attended):
    ours, pixels = copy.deepcopy(backbones[1]).train(), torch.randn(1, 3, 40, 40)
    for block in (block for stage in ours.swin.encoder.layers for block in stage.blocks):
        block.drop_path = nn.Identity()
    weight = ours.swin.encoder.layers[1].blocks[1].attention.v_proj.weight
    gradients = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable()
        loss = sum(x.square().sum() for x in ours(pixels).feature_maps)
        gradients += torch.autograd.grad(loss, weight)
    assert len(attended) > 16  # those of the second backward pass again
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_names_and_tensors_stay(backbones):
    stock, ours = (backbone.state_dict() for backbone in backbones)
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


def test_a_traced_model_runs_transformers_blocks(backbones, attended):
    ours, pixels = copy.deepcopy(backbones[1]).requires_grad_(False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: tuple(ours(x).feature_maps), pixels, check_trace=False)
        assert not attended
        assert_near(traced(pixels), backbones[0](pixels).feature_maps)


def test_a_projection_that_was_exchanged_is_called(backbones, attended, torch_s_parts):
    ours = copy.deepcopy(backbones[1])
    attention = ours.swin.encoder.layers[0].blocks[0].attention
    attention.q_proj = nn.Sequential(attention.q_proj)  # as an adapter wraps it
    ours.swin.encoder.layers[0].blocks[1].attention.k_proj.register_forward_hook(lambda module, args, output: output)
    pixels = torch.randn(1, 3, 64, 64)
    assert_near(ours(pixels).feature_maps, backbones[0](pixels).feature_maps)
    assert len(attended) == 6


def test_windows_kept_from_inference_serve_training(backbones):
    swin_speed.windows_of.cache_clear()
    pixels = torch.randn(1, 3, 72, 72)
    with torch.inference_mode():
        backbones[1](pixels)
    backbones[1](pixels).feature_maps[0].sum().backward()
    backbones[1].zero_grad()


def test_half_precision_is_near_float32(backbones, attended):
    pixels = torch.randn(1, 3, 96, 96)
    half = copy.deepcopy(backbones[1]).bfloat16()
    with torch.inference_mode():
        found, expected = half(pixels.bfloat16()).feature_maps, backbones[0](pixels).feature_maps
        with torch.autocast("cpu", torch.bfloat16):
            mixed = backbones[1](pixels).feature_maps
    assert len(attended) == 16
    for here, there, reference in zip(found, mixed, expected, strict=True):
        assert (here.float() - reference).abs().mean() < 0.03 * reference.abs().mean()
        assert (there.float() - reference).abs().mean() < 0.03 * reference.abs().mean()


def test_weights_of_another_class_are_multiplied_by_torch_s_modules(backbones, attended):
    stock, ours = (pack_weights(copy.deepcopy(backbone), nn.Linear) for backbone in backbones)
    pixels = torch.randn(1, 3, 40, 24)
    with torch.no_grad(), use_kernel("reference"):  # whose norms round as torch's
        assert_near(ours(pixels).feature_maps, stock(pixels).feature_maps)
    assert attended == []


@pytest.mark.parametrize("size", [(9, 13), (8, 12)], ids=["padded", "whole windows"])
def test_a_block_that_is_exported_always_crops_and_gives_the_same(backbones, size, monkeypatch):
    """A trace of whole windows has to crop other sizes; transformers' asks of the size that it sees."""
    block = backbones[1].swin.encoder.layers[0].blocks[1]
    x = torch.randn(2, size[0] * size[1], 16)
    with torch.no_grad():
        expected = block(x, size, always_partition=True)[0]
        for name in ("is_exporting", "is_compiling"):
            monkeypatch.setattr(torch.compiler, name, lambda: True)
        padded, crops = block.maybe_pad(x.view(2, *size, 16), *size)
        assert padded.shape[1:3] == tuple(-(-side // 4) * 4 for side in size) and crops[3] > 0 and crops[5] > 0
        torch.testing.assert_close(block(x, size, always_partition=True)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_hook_in_the_mlp_sees_all_rows_at_once(backbones, monkeypatch):
    monkeypatch.setattr(cpu_layout, "chunk_length", lambda width, device: 8)
    mlp, x, seen = copy.deepcopy(backbones[1].swin.encoder.layers[0].blocks[0].mlp), torch.randn(2, 12, 16), []
    with torch.no_grad():
        expected = mlp(x)
        for layer in (mlp.fc1, mlp.fc2):
            layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[:-1]))
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == [(2, 12)] * 2
