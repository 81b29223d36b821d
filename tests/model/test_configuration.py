"""Configuration: the fields of stock, and errors that say what to do."""

import dataclasses
import logging

import pytest
import torch
import transformers
from helpers import BACKBONES, STAGES, tiny_config, tiny_fields
from transformers import ConvNextConfig, DINOv3ConvNextConfig, ResNetConfig, SwinConfig

from mask2former_hf import Mask2FormerConfig, Mask2FormerModel

OWN_FIELDS = {"freeze_batch_norm", "mask_loss", "focal_alpha", "focal_gamma", "task", "stuff_label_ids"}


def test_fields_and_defaults_are_those_of_stock():
    ours, stock = Mask2FormerConfig().to_dict(), transformers.Mask2FormerConfig().to_dict()
    assert set(ours) - set(stock) == OWN_FIELDS and not set(stock) - set(ours)
    for name in stock:
        if name != "backbone_config":
            assert ours[name] == stock[name] or list(ours[name]) == list(stock[name]), name
    assert ours["backbone_config"] == stock["backbone_config"]
    names = {field.name for field in dataclasses.fields(transformers.Mask2FormerConfig)}
    assert names <= {field.name for field in dataclasses.fields(Mask2FormerConfig)}


def test_stock_and_ours_read_each_others_file(tmp_path):
    tiny_config(task="panoptic", stuff_label_ids=[3, 4], num_queries=7).save_pretrained(tmp_path / "ours")
    stock = transformers.Mask2FormerConfig.from_pretrained(tmp_path / "ours")
    assert stock.num_queries == 7 and stock.backbone_config.model_type == "swin"
    assert stock.num_labels == 5
    stock.save_pretrained(tmp_path / "stock")  # fields of ours survive a round trip through stock
    again = Mask2FormerConfig.from_pretrained(tmp_path / "stock")
    assert again.task == "panoptic" and again.stuff_label_ids == [3, 4]


@pytest.mark.parametrize("field, value", [("num_queries", "7"), ("num_queries", 7.5), ("pre_norm", 3)])
def test_types_are_checked_as_in_stock(field, value):
    with pytest.raises(Exception, match=field):
        transformers.Mask2FormerConfig(**{field: value})
    with pytest.raises(Exception, match=field):
        Mask2FormerConfig(**{field: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"feature_size": 40}, "feature_size=40.*multiple of 32"),
        ({"hidden_dim": 36, "num_attention_heads": 8}, "hidden_dim=36.*multiple of"),
        ({"common_stride": 2}, "common_stride=2.*4 or 8"),
        ({"task": "detection"}, "task='detection'.*semantic, instance, panoptic"),
        ({"stuff_label_ids": [1, 9], "num_labels": 5}, r"stuff_label_ids contains \[9\]"),
        ({"mask_weight": -1}, "mask_weight=-1.*0 or more"),
        ({"importance_sample_ratio": 1.5}, "importance_sample_ratio=1.5.*between 0 and 1"),
        ({"backbone": "some/name"}, "backbone='some/name'.*AutoConfig.from_pretrained"),
        ({"backbone_config": {"depths": [1]}}, "backbone_config.*model_type"),
    ],
)
def test_bad_values_are_refused_with_the_rule(fields, message):
    with pytest.raises(Exception, match=message):
        Mask2FormerConfig(**fields)


def test_weights_may_be_whole_numbers():
    assert Mask2FormerConfig(mask_weight=20).mask_weight == 20


CHANNELS = {
    "swin": [16, 32, 64, 128],
    "resnet": [16, 32, 48, 64],
    "convnext": [16, 24, 32, 40],
    "dinov3_convnext": [16, 24, 32, 40],
}
MORE_BACKBONES = BACKBONES | {
    "dinov3_convnext": lambda: DINOv3ConvNextConfig(
        hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=STAGES
    )
}


@pytest.mark.parametrize("backbone", MORE_BACKBONES)
def test_any_hierarchical_backbone_works_without_a_warning(backbone, caplog):
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            config = Mask2FormerConfig(backbone_config=MORE_BACKBONES[backbone](), **tiny_fields())
            model = Mask2FormerModel(config).eval()
    finally:
        transformers.utils.logging.disable_propagation()
    assert caplog.records == []
    assert model.pixel_level_module.decoder.adapter_1[0].in_channels == CHANNELS[backbone][0]
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96), output_hidden_states=True)
    assert [x.shape[1] for x in output.encoder_hidden_states] == CHANNELS[backbone]
    assert output.masks_queries_logits[-1].shape == (1, 10, 16, 24)


@pytest.mark.parametrize(
    "backbone",
    [
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic"),
        SwinConfig(
            embed_dim=16, patch_size=2, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4, out_features=STAGES
        ),
        ConvNextConfig(hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], out_features=STAGES[1:]),
    ],
    ids=["one map", "strides 2 to 16", "three maps"],
)
def test_a_backbone_without_four_levels_at_strides_4_to_32_is_refused(backbone):
    config = Mask2FormerConfig(backbone_config=backbone, **tiny_fields())
    with pytest.raises(
        ValueError, match="backbone_config is a .*needs four maps at strides 4, 8, 16, 32.*out_features"
    ):
        Mask2FormerModel(config)
