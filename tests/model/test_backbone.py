"""What the backbones are given beyond transformers' own: frozen norms, stochastic depth, memory that is used again."""

import copy

import pytest
import torch
import transformers
from helpers import BACKBONES, STAGES, random_targets, tiny_config, tiny_fields, tiny_model
from transformers import AutoBackbone, ResNetConfig

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.model.backbone import FrozenBatchNorm, RectifiedConvolution, RectifiedSum, make_backbone


def test_frozen_batch_norm_keeps_statistics_and_affine_parameters():
    model = tiny_model("resnet", freeze_batch_norm=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".normalization." in name}
    masks, labels = random_targets([3, 2], (64, 64))
    model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    assert before and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        training = model(pixels).class_queries_logits
        assert torch.equal(training, model.eval()(pixels).class_queries_logits)


def test_frozen_batch_norm_has_torch_s_values_and_gradient_and_keeps_no_input():
    torch.manual_seed(0)
    plain = torch.nn.BatchNorm2d(3).double().eval().requires_grad_(False)
    for tensor in (plain.weight, plain.bias, plain.running_mean, plain.running_var):
        tensor.data.copy_(torch.rand(3) + 0.1)
    frozen = copy.deepcopy(plain)
    frozen.__class__ = FrozenBatchNorm
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(frozen.train()(x), plain(x)) and torch.equal(frozen(x.detach()), plain(x))
    torch.autograd.gradcheck(frozen, x)
    expected, found = (torch.autograd.grad((norm(x) ** 3).sum(), x)[0] for norm in (plain, frozen))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        frozen(x)
    assert kept and max(kept) == 3
    half = x.detach().bfloat16().requires_grad_()
    frozen.float()(half).sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_parameter_of_a_frozen_batch_norm_can_be_trained(name):
    frozen = torch.nn.BatchNorm2d(3).eval().requires_grad_(False)
    frozen.__class__ = FrozenBatchNorm
    frozen.get_parameter(name).requires_grad_()
    frozen(torch.ones(2, 3, 4, 5, requires_grad=True)).sum().backward()
    torch.testing.assert_close(frozen.get_parameter(name).grad, torch.full((3,), 40.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        *("layer", "layer.0.normalization", "layer.1.normalization"),
        *("activation", "layer.0.activation", "layer.1.activation"),
    ],
)
def test_what_a_hook_has_kept_of_a_resnet_s_parts_stays_as_it_was(name, recorded):
    block, kept = tiny_model("resnet").model.pixel_level_module.encoder.encoder.stages[0].layers[0], []
    x = torch.randn(1, 16, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(recorded):
        expected = block(x)
        block.get_submodule(name).register_forward_hook(lambda _, args, output: kept.append((output, output.clone())))
        torch.testing.assert_close(block(x), expected)
    assert len(kept) == 1 and torch.equal(*kept[0])


def test_swin_drops_both_branches_of_a_block():
    """With a drop path of nearly 1 a block is the identity; stock's still adds the MLP."""
    backbone = tiny_config("swin").backbone_config
    backbone.drop_path_rate = 0.999999
    ours = copy.deepcopy(
        Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **tiny_fields()))
    )
    stock = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=backbone, **tiny_fields())
    )
    blocks = [
        model.model.pixel_level_module.encoder.train().swin.encoder.layers[-1].blocks[-1] for model in (ours, stock)
    ]
    x = torch.randn(1, 16, 128)
    ours, stock = ((block(x, (4, 4))[0] - x).abs().max().item() for block in blocks)
    assert ours == 0 and stock > 0.01
    assert (blocks[0].eval()(x, (4, 4))[0] - x).abs().max() > 0.01


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_resnet_that_overwrites_its_own_results_equals_transformers(kind, activation):
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 2, 1, 1],
        layer_type=kind,
        hidden_act=activation,
        out_features=STAGES,
    )
    plain = AutoBackbone.from_config(config).double()
    ours = make_backbone(config, (4, 8, 16, 32), freeze_batch_norm=False)[0].double()
    ours.load_state_dict(plain.state_dict())
    rectified = [module for module in ours.modules() if isinstance(module, RectifiedConvolution | RectifiedSum)]
    assert bool(rectified) == (activation == "relu")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        maps = [backbone.train(mode)(x).feature_maps for backbone in (plain, ours)]
        for a, b in zip(*maps, strict=True):
            torch.testing.assert_close(a, b)
        gradients = [
            torch.autograd.grad(sum((y**2).sum() for y in found), list(backbone.parameters()))
            for found, backbone in zip(maps, (plain, ours), strict=True)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_a_block_leaves_its_input_as_it_is():
    backbone, *_ = make_backbone(BACKBONES["resnet"](), (4, 8, 16, 32), freeze_batch_norm=True)
    for block in (module for module in backbone.modules() if isinstance(module, RectifiedConvolution | RectifiedSum)):
        channels = next(block.parameters()).shape[1]
        x = torch.randn(1, channels, 8, 8)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)
