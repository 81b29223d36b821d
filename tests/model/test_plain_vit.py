"""What plain ViTs, Hiera and FocalNet are given beyond transformers' own, and what cannot serve."""

import json

import pytest
import torch
from helpers import random_targets, randomise, tiny_fields, tiny_model
from tiny_backbones import backbone_config
from transformers import CONFIG_MAPPING, AutoBackbone, HieraModel

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerModel
from mask2former_hf.model.backbone import make_backbone
from mask2former_hf.model.rotary_positions import ExactRotaryAttention, ExactRotaryPositions


def vit_model(name="dinov3_vit", neck=None, **backbone_fields):
    config = backbone_config(name)
    for field, value in backbone_fields.items():
        setattr(config, field, value)
    config = Mask2FormerConfig(backbone_config=config, vit_neck=neck, **tiny_fields())
    return randomise(Mask2FormerForUniversalSegmentation(config))


def pair_of_backbones(name):
    """transformers' class and ours with the same random weights."""
    stock = randomise(AutoBackbone.from_config(backbone_config(name))).eval()
    ours = make_backbone(backbone_config(name), (4, 8, 16, 32), False)[0].eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@torch.no_grad()
def test_hiera_has_the_maps_of_transformers_model_which_its_backbone_scrambles():
    stock, ours = pair_of_backbones("hiera")
    for size in ((64, 64), (96, 128)):
        config = backbone_config("hiera")
        config.image_size = list(size)  # the only one that transformers' model takes
        whole = HieraModel(config, add_pooling_layer=False).eval()
        positions = {"embeddings.position_embeddings": ours.positions((size[0] // 4, size[1] // 4))}
        whole.load_state_dict(stock.state_dict() | positions, strict=False)
        pixels = torch.randn(2, 3, *size)
        states = whole(pixels, output_hidden_states=True).reshaped_hidden_states[1:]
        maps = ours(pixels).feature_maps
        for name, state, x in zip(stock.out_features, states, maps, strict=True):
            expected = stock.hidden_states_norms[name](state).permute(0, 3, 1, 2)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    pixels = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(stock(pixels).feature_maps[0], ours(pixels).feature_maps[0], atol=0.1)


@torch.no_grad()
def test_focalnet_has_each_stage_s_map_from_before_the_merging_that_transformers_returns():
    stock, ours = pair_of_backbones("focalnet")
    pixels = torch.randn(1, 3, 64, 96)
    merged, maps = stock(pixels).feature_maps, ours(pixels).feature_maps
    assert [x.shape[1:] for x in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    for n, stage in enumerate(ours.focalnet.encoder.stages[:3]):
        tokens, _ = stage.downsample(maps[n])
        torch.testing.assert_close(tokens.transpose(1, 2).view_as(merged[n]), merged[n])


@torch.no_grad()
def test_rotary_positions_stay_float32_in_a_bfloat16_model():
    stock, ours = pair_of_backbones("dinov3_vit")
    pixels = torch.randn(1, 3, 96, 128)
    for a, b in zip(stock(pixels).feature_maps, ours(pixels).feature_maps, strict=True):
        torch.testing.assert_close(a, b)
    sines = {}
    for name, backbone in (("stock", stock), ("ours", ours)):
        exact = backbone.rope_embeddings(pixels)
        rounded = backbone.bfloat16().rope_embeddings(pixels.bfloat16())
        sines[name] = [(x.dtype, (x - y).abs().max().item()) for x, y in zip(rounded, exact, strict=True)]
    assert sines["ours"] == [(torch.float32, 0.0)] * 2
    assert all(dtype == torch.bfloat16 and error > 1e-3 for dtype, error in sines["stock"])
    assert ours(pixels).feature_maps[-1].dtype == torch.bfloat16
    kinds = {type(module) for module in ours.modules()}
    assert {ExactRotaryPositions, ExactRotaryAttention} <= kinds


def train_once(model, seed=0):
    masks, labels = random_targets([3, 2], (64, 64))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return model.train()(pixels, mask_labels=masks, class_labels=labels, output_hidden_states=True)


def test_a_frozen_vit_stays_in_evaluation_mode_and_runs_without_gradient():
    """Of which the random scale of DINOv3's positions in training would change the maps from step to step."""
    model = vit_model("dinov3_vit", "adapter", drop_path_rate=0.5)
    maps = []
    level = model.model.pixel_level_module
    level.neck.register_forward_pre_hook(lambda module, args: maps.append(args[1]))
    train_once(model)
    train_once(model)
    assert level.encoder.training and not torch.equal(maps[0][0], maps[1][0])
    level.encoder.requires_grad_(False)
    for _ in range(2):
        output = train_once(model)
    assert not any(module.training for module in level.encoder.modules()) and level.neck.training
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(maps[2], maps[3], strict=True))
    output.loss.backward()
    assert all(parameter.grad is None for parameter in level.encoder.parameters())
    assert all(parameter.grad is not None for parameter in level.neck.parameters())
    level.encoder.requires_grad_(True)
    assert model.train() and level.encoder.training


@torch.no_grad()
def test_a_vit_of_patches_of_14_pixels_sees_the_last_pixel_of_an_image_that_is_no_multiple():
    model = vit_model("dinov2").eval()
    pixels = torch.randn(1, 3, 96, 64)
    other = pixels.clone()
    other[..., -1] += 1
    first, second = (model.model.pixel_level_module(x)[0][0] for x in (pixels, other))
    assert first.shape[-2:] == (24, 16) and not torch.allclose(first[..., -1], second[..., -1])


def test_the_neck_is_in_the_file_only_where_it_was_chosen(tmp_path):
    for neck in (None, "adapter"):
        vit_model("dinov3_vit", neck).config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()).get("vit_neck") == neck
    assert Mask2FormerConfig.from_pretrained(tmp_path).vit_neck == "adapter"
    tiny_model("resnet").config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not {"vit_neck", "sliding_window", "weights_license"} & set(stored)


VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.mark.parametrize(
    "kind, fields, neck, message",
    [
        ("swin", {"out_features": ["stage1", "stage2", "stage3", "stage4"]}, "pyramid", "has four maps .* of its own"),
        ("dinov3_vit", VIT, "adapter", r"1 feature maps, and the adapter takes 4.*out_indices=\[1, 2, 3, 4\]"),
        (
            "dinov3_vit",
            VIT | {"hidden_size": 48, "out_indices": [1, 2, 3, 4]},
            "adapter",
            "48 channels.*multiple of 32",
        ),
        ("dinov3_vit", VIT, "both", "vit_neck='both': must be one of pyramid, adapter"),
        ("dinov2", VIT | {"reshape_hidden_states": False}, None, "are not maps.*reshape_hidden_states=True"),
        ("vitpose_backbone", VIT, None, "does not take an image of 96 x 128.*any size"),
        ("rf_detr_dinov2", VIT | {"image_size": 56}, None, "does not take an image of 96 x 128"),
        ("lw_detr_vit", VIT | {"image_size": 64}, None, "does not take an image of 96 x 128"),
        ("pp_lcnet_v4", {}, None, r"have strides \[\(16.0, 4.0\)\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_serve_is_refused_with_what_is_needed(kind, fields, neck, message):
    with pytest.raises(ValueError, match=message):
        Mask2FormerModel(
            Mask2FormerConfig(backbone_config=CONFIG_MAPPING[kind](**fields), vit_neck=neck, **tiny_fields())
        )
