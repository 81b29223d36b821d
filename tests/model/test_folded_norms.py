"""ResNet at inference on CPUs: norms inside the convolutions, with what training and float64 give."""

import copy
import pickle

import pytest
import torch
from helpers import pack_weights
from torch import nn
from transformers import ResNetConfig

from mask2former_hf.kernels import cpu
from mask2former_hf.model import folded_norms
from mask2former_hf.model.backbone import make_backbone

STAGES = ["stage1", "stage2", "stage3", "stage4"]
needs_operator = pytest.mark.skipif(
    not folded_norms.one_operator_works(torch.float32), reason="this build of torch has no such operator of oneDNN"
)


def backbone_of(kind, freeze_batch_norm=False):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[2, 1, 1, 1], layer_type=kind, out_features=STAGES
    )
    backbone = make_backbone(config, (4, 8, 16, 32), freeze_batch_norm)[0].eval()
    with torch.no_grad():
        for norm in (module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)):
            for tensor, low in ((norm.weight, -1), (norm.bias, -1), (norm.running_mean, -1), (norm.running_var, 0.5)):
                tensor.uniform_(low, 1.5)
    return backbone


def maps_of(backbone, x):
    with torch.no_grad():
        return backbone(x.to(backbone.dtype)).feature_maps


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    made, original = [], folded_norms.one_operator
    monkeypatch.setattr(folded_norms, "one_operator", lambda *x: made.append(x[0].dtype) or original(*x))
    return made


@needs_operator
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("freeze_batch_norm", [False, True])
def test_maps_equal_those_in_float64(kind, freeze_batch_norm, x, calls):
    backbone = backbone_of(kind, freeze_batch_norm)
    kept = x.clone()
    found = maps_of(backbone, x)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in backbone.modules())
    assert len(calls) == convolutions and torch.equal(x, kept)
    for a, b in zip(found, maps_of(copy.deepcopy(backbone).double(), x), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
        assert a.is_contiguous(memory_format=torch.channels_last)
    assert len(calls) == convolutions, "float64 has no such operator"


@needs_operator
@pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="no AVX-512 BF16, or no compiled kernel")
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@torch.no_grad()
def test_a_norm_and_its_relu_are_in_a_convolution_of_fewer_multiplications(dtype, digits, calls):
    torch.manual_seed(0)
    part = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    part(torch.randn(2, 32, 16, 24))  # statistics
    part, x = part.eval().to(dtype), torch.randn(2, 32, 16, 24, dtype=dtype).to(memory_format=torch.channels_last)
    found = folded_norms.folded(x, part[0], part[1], rectify=True)
    exact = copy.deepcopy(part).double()(x.double())
    assert not calls and (found - exact).abs().max() < digits * exact.max()


@pytest.mark.skipif(not folded_norms.one_operator_works(torch.bfloat16), reason="no such operator for bfloat16")
def test_bfloat16_is_as_near_as_torch_s_own(x, calls):
    backbone = backbone_of("bottleneck")
    exact, half = maps_of(backbone, x), copy.deepcopy(backbone).bfloat16()
    plain = half(x.bfloat16()).feature_maps  # with a graph
    assert torch.bfloat16 not in calls
    for ours, torch_s, value in zip(maps_of(half, x), plain, exact, strict=True):
        errors = [(y.float() - value).abs().mean() for y in (ours, torch_s)]
        assert errors[0] < 1.3 * errors[1] and errors[0] < 0.01 * value.abs().mean()
    assert torch.bfloat16 in calls


@needs_operator
def test_parameters_changed_behind_autograd_s_back_count_at_once(x):
    backbone = backbone_of("bottleneck")
    maps_of(backbone, x)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(0.5)
    for a, b in zip(maps_of(backbone, x), maps_of(copy.deepcopy(backbone).double(), x), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@needs_operator
def test_training_hooks_and_autocast_run_torch_s_parts(x, calls):
    backbone = backbone_of("bottleneck")
    backbone(x)
    with torch.autocast("cpu", torch.bfloat16):
        maps_of(backbone, x)
    maps_of(backbone.train(), x)
    assert calls == []
    backbone = backbone_of("bottleneck")
    seen, norm = [], backbone.encoder.stages[0].layers[0].layer[2].normalization
    norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    maps_of(backbone, x)
    assert len(seen) == 1 and len(calls) > 10


@needs_operator
@pytest.mark.parametrize("part", [nn.Conv2d, nn.BatchNorm2d])
def test_weights_of_another_class_run_torch_s_parts(part, x, calls):
    backbone = backbone_of("basic")
    expected = maps_of(backbone, x)
    calls.clear()
    for a, b in zip(maps_of(pack_weights(backbone, part), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls == []


@needs_operator
def test_a_backbone_that_has_run_can_be_copied_pickled_saved_and_exported(x, calls):
    backbone = backbone_of("basic")
    expected = maps_of(backbone, x)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert all(torch.equal(a, b) for a, b in zip(maps_of(other, x), expected, strict=True))
    assert set(backbone.state_dict()) == set(backbone_of("basic").state_dict())
    calls.clear()
    with torch.no_grad():
        program = torch.export.export(backbone, (x,)).module()
    for a, b in zip(program(x).feature_maps, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls == []


@needs_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_of_one_pixel_has_maps(dtype):
    backbone = backbone_of("bottleneck").to(dtype)
    maps = maps_of(backbone, torch.randn(1, 3, 1, 1))
    assert [x.shape[-2:] for x in maps] == [(1, 1)] * 4 and all(x.isfinite().all() for x in maps)
