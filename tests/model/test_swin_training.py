"""Swin's blocks in training: transformers' values and gradients at every seed, from half of what autograd keeps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoBackbone, SwinConfig

from mask2former_hf.kernels import cpu, use_kernel
from mask2former_hf.model import swin_speed, swin_training
from mask2former_hf.model.feed_forward import FeedForward

SIDE, WIDTH = 32, 16  # of the tokens' map, and of a token, in the first stage
SIZES = [(2, 96, 130), (1, 56, 56), (3, 40, 8)]  # padded, whole windows, less than a window


@pytest.fixture(scope="module")
def backbones():
    """transformers' Swin and ours, both with biases that matter and stochastic depth on both branches; float64."""
    torch.manual_seed(0)
    config = SwinConfig(
        embed_dim=WIDTH,
        depths=[2, 2, 2, 2],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    stock = AutoBackbone.from_config(config).double().train()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ours = copy.deepcopy(stock)
    swin_speed.gather_windows(ours)
    for backbone in (stock, ours):
        swin_speed.drop_paths_of_both_branches(backbone)
    return stock, ours


@pytest.fixture
def trained(monkeypatch):
    """Counts the blocks that run as two steps of autograd."""
    calls, train = [], swin_speed.GatheredSwinLayer._train
    monkeypatch.setattr(
        swin_speed.GatheredSwinLayer, "_train", lambda self, *args: calls.append(self) or train(self, *args)
    )
    return calls


def maps_and_gradients(backbone, pixels, seed=0, autocast=False):
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        maps = backbone(pixels).feature_maps
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in maps)
    names, parameters = zip(*backbone.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return maps, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])  # of which images' paths are dropped: some, all or none of a batch
def test_maps_and_gradients_are_those_of_transformers_at_the_same_seed(backbones, size, seed, trained):
    pixels = torch.randn(size[0], 3, *size[1:], dtype=torch.float64)
    (maps, gradients), (own_maps, own) = (maps_and_gradients(backbone, pixels, seed) for backbone in backbones)
    assert len(trained) == 8
    for found, expected in zip(own_maps, maps, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())
    for name, expected in gradients.items():
        assert (own[name] is None) == (expected is None), name
        if expected is not None and "k_proj.bias" not in name:  # whose gradient is zero to rounding
            limit = 1e-11 * expected.abs().max().item()
            torch.testing.assert_close(own[name], expected, rtol=1e-8, atol=limit, msg=name)


def test_single_precision_is_as_near_to_double_as_transformers(backbones):
    pixels = torch.randn(2, 3, 96, 130, dtype=torch.float64)
    backbones = [copy.deepcopy(backbone).eval() for backbone in backbones]  # random numbers differ by dtype
    exact, _ = maps_and_gradients(backbones[0], pixels)
    stock, own = (maps_and_gradients(backbone.float(), pixels.float())[0] for backbone in backbones)
    for there, here, truth in zip(stock, own, exact, strict=True):
        assert (here - truth).abs().mean() < 1.5 * (there - truth).abs().mean() < 1e-5 * truth.abs().mean()


def test_mixed_precision_is_as_near_to_double_as_transformers(backbones, trained):
    backbones = [copy.deepcopy(backbone).float().eval() for backbone in backbones]  # random numbers differ by dtype
    pixels = torch.randn(2, 3, 64, 72)
    _, exact = maps_and_gradients(backbones[0], pixels)
    errors = [[], []]
    for backbone, into in zip(backbones, errors, strict=True):
        _, gradients = maps_and_gradients(backbone, pixels, autocast=True)
        for name, truth in exact.items():
            if truth is not None and "k_proj.bias" not in name:
                assert gradients[name].dtype == torch.float32
                into.append(((gradients[name] - truth).norm() / truth.norm()).item())
    assert len(trained) == 8
    stock, own = (sum(into) / len(into) for into in errors)
    assert own < 1.1 * stock < 0.2


@pytest.mark.skipif(cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="no compiled kernel")
def test_a_backward_pass_uses_the_kernel_of_its_forward_pass(backbones, monkeypatch):
    backbone, pixels = copy.deepcopy(backbones[1]).float().eval(), torch.randn(1, 3, 32, 32)
    calls, gradients = [], swin_training.attend_in_windows_backward
    monkeypatch.setattr(
        swin_training, "attend_in_windows_backward", lambda *given: calls.append(gradients(*given)) or calls[-1]
    )
    for before, after, computed in (("reference", "auto", 0), ("auto", "reference", 8)):
        with use_kernel(before):
            loss = sum(x.sum() for x in backbone(pixels).feature_maps)
        with use_kernel(after):
            loss.backward()
        assert sum(made is not None for made in calls) == computed


@pytest.mark.parametrize("little_work, widths", [(WIDTH, 6), (WIDTH - 1, 10)])
def test_a_block_keeps_so_many_widths_of_its_tokens(backbones, little_work, widths, monkeypatch):
    monkeypatch.setattr(swin_training, "LITTLE_WORK", little_work)
    block = copy.deepcopy(backbones[1]).float().swin.encoder.layers[0].blocks[0]
    kept, weights = {}, {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(torch.randn(1, SIDE**2, WIDTH, requires_grad=True), (SIDE, SIDE), always_partition=True)
    tokens = 4 * SIDE**2 * WIDTH  # bytes
    assert widths <= sum(size for size, _ in kept.values()) / tokens < widths + 0.5


@pytest.mark.parametrize("name", ["mlp.fc1", "attention.o_proj", "layernorm_after", "mlp", "dropout"])
def test_a_hook_on_a_part_is_called(backbones, name, trained):
    ours, seen = copy.deepcopy(backbones[1]).float(), []
    block = ours.swin.encoder.layers[0].blocks[0]
    block.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(module))
    ours(torch.randn(1, 3, 32, 32)).feature_maps[0].sum().backward()
    assert seen and len(trained) == 7


def test_what_is_frozen_has_no_gradient_and_the_rest_has_the_same(backbones):
    pixels, ours = torch.randn(1, 3, 40, 40, dtype=torch.float64), copy.deepcopy(backbones[1])
    _, whole = maps_and_gradients(ours, pixels)
    for name in ("fc1", "q_proj", "k_proj", "v_proj", "layernorm_before"):
        ours.get_submodule("swin.encoder.layers.0.blocks.1").get_submodule(
            f"mlp.{name}" if name == "fc1" else name if "norm" in name else f"attention.{name}"
        ).requires_grad_(False)
    torch.manual_seed(0)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in ours(pixels).feature_maps)
    loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad or parameter.grad is None
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", ["bias", "weight"])
def test_biases_train_without_their_weights_and_weights_without_their_biases(backbones, kind):
    pixels, found = torch.randn(2, 3, 40, 24, dtype=torch.float64), []
    for backbone in map(copy.deepcopy, backbones):
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.endswith(kind))
        torch.manual_seed(0)
        sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in backbone(pixels).feature_maps).backward()
        found.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    for name, expected in found[0].items():
        assert (found[1][name] is None) == (expected is None), name
        if expected is not None and "k_proj.bias" not in name:  # whose gradient is zero to rounding
            limit = 1e-11 * expected.abs().max().item()
            torch.testing.assert_close(found[1][name], expected, rtol=1e-8, atol=limit, msg=name)


def test_a_second_derivative_is_refused_in_words(backbones):
    block = backbones[1].swin.encoder.layers[0].blocks[0]
    x = torch.randn(1, 64, WIDTH, dtype=torch.float64, requires_grad=True)
    output, _ = block(x, (8, 8), always_partition=True)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [5, 0])
def test_a_feed_forward_block_has_the_gradient_of_its_formula(activation, keep, rows):
    torch.manual_seed(0)
    norm, first, second = (part.double() for part in (nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)))
    inputs = [torch.randn(rows, 6, dtype=torch.float64), *norm.parameters(), *first.parameters(), *second.parameters()]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    options = (activation, norm.eps, 0.5, keep)
    x, weight, bias, *layers = inputs
    hidden = getattr(F, activation)(F.linear(F.layer_norm(x, (6,), weight, bias, norm.eps), *layers[:2]))
    expected = x + 0.5 * F.linear(hidden, *layers[2:])
    torch.testing.assert_close(FeedForward.apply(*inputs, options), expected)
    assert torch.autograd.gradcheck(lambda *given: FeedForward.apply(*given, options), inputs)
