"""A tiny config of every backbone of transformers that can serve Mask2Former, and of some of timm's families."""

import pytest
from helpers import BACKBONES, STAGES
from transformers import CONFIG_MAPPING, TimmBackboneConfig
from transformers.utils import is_timm_available

needs_timm = pytest.mark.skipif(not is_timm_available(), reason="timm (extra [timm]) is not there")

_DEPTHS = {"depths": [1, 1, 1, 1], "out_features": STAGES}
_HEADS = {"num_heads": [1, 2, 4, 8]}
_CNN = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64]}
_WIDTHS = {"hidden_sizes": [16, 24, 32, 40]}
_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [1, 2, 3, 4]}
_MLP = {"intermediate_size": 48}

HIERARCHICAL = {  # four maps of their own
    "beit with add_fpn": dict(
        model_type="beit", image_size=64, add_fpn=True, use_relative_position_bias=True, **_VIT, **_MLP
    ),
    "bit": dict(**_CNN, **_DEPTHS, num_groups=4),
    "convnextv2": dict(**_WIDTHS, **_DEPTHS),
    "dinov3_convnext": dict(**_WIDTHS, **_DEPTHS),
    "focalnet": dict(embed_dim=16, hidden_sizes=[16, 32, 64, 128], **_DEPTHS),
    "hgnet_v2": dict(
        stem_channels=[3, 8, 12],
        stage_in_channels=[12, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 24, 32, 40],
        out_features=STAGES,
    ),
    "hiera": dict(embed_dim=16, image_size=[64, 64], **_HEADS, **_DEPTHS),
    "maskformer-swin": dict(embed_dim=16, window_size=4, **_HEADS, **_DEPTHS),
    "pp_lcnet": dict(scale=0.25, out_features=["stage2", "stage3", "stage4", "stage5"]),
    "pvt_v2": dict(
        hidden_sizes=[16, 32, 40, 48],
        num_attention_heads=[1, 2, 4, 8],
        mlp_ratios=[2, 2, 2, 2],
        **_DEPTHS,
    ),
    "rt_detr_resnet": dict(layer_type="basic", **_CNN, **_DEPTHS),
    "swinv2": dict(embed_dim=16, window_size=4, image_size=64, **_HEADS, **_DEPTHS),
    "textnet": dict(
        stem_out_channels=8,
        hidden_sizes=[8, 8, 16, 24, 32],
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
        conv_layer_strides=[[2], [2], [2], [2]],
        out_features=STAGES,
    ),
}
PLAIN = {  # maps of one stride, behind a neck
    "beit": dict(image_size=64, use_relative_position_bias=True, **_VIT, **_MLP),
    "dinov2": dict(image_size=56, **_VIT),
    "dinov2_with_registers": dict(image_size=64, patch_size=14, **_VIT),
    "dinov3_vit": dict(image_size=64, num_register_tokens=4, **_VIT, **_MLP),
    "pixio": dict(image_size=64, **_VIT, **_MLP),
    "sapiens2": dict(image_size=64, head_config={}, **_VIT, **_MLP),
    "vitdet": dict(
        image_size=64,
        pretrain_image_size=64,
        window_block_indices=[0],
        window_size=3,
        use_relative_position_embeddings=True,
        **_VIT,
    ),
}
ONE_MAP = {"tipsv2_vision_model": dict(image_size=56, **_VIT | {"out_indices": [4]}, **_MLP)}  # for the pyramid alone

TIMM = {  # names that timm knows, of its smallest; with maps of their own at these indices
    "timm efficientnet": ("test_efficientnet", [1, 2, 3, 4]),
    "timm tf_efficientnet": ("tf_efficientnet_lite0", [1, 2, 3, 4]),  # padded as TensorFlow does
    "timm mobilenetv3": ("mobilenetv3_small_050", [1, 2, 3, 4]),
    "timm mobilenetv4": ("mobilenetv4_conv_small_035", [1, 2, 3, 4]),
    "timm convnext": ("test_convnext", [0, 1, 2, 3]),
    "timm hgnet_v2": ("hgnetv2_b0", [0, 1, 2, 3]),
    "timm resnet": ("test_resnet", [1, 2, 3, 4]),
}
TIMM_PLAIN = {  # behind a neck
    "timm vit": ("test_vit", [0, 1, 2, 5]),
    "timm eva02": ("eva02_tiny_patch14_224", [2, 5, 8, 11]),  # patches of 14 pixels, rotary positions
}


def backbone_config(name):
    """A new config of one of the backbones above, or of those in `helpers`."""
    if name in BACKBONES:
        return BACKBONES[name]()
    if name in TIMM | TIMM_PLAIN:
        architecture, maps = (TIMM | TIMM_PLAIN)[name]
        return TimmBackboneConfig(backbone=architecture, out_indices=maps)
    fields = dict((HIERARCHICAL | PLAIN | ONE_MAP)[name])
    return CONFIG_MAPPING[fields.pop("model_type", name)](**fields)
