"""Backbones by name, and a new model on one of them."""

from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, ResNetConfig, SwinConfig

from .. import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from ..conversion.architecture import RESNET_DEPTHS, STAGES
from ..data.classes import ClassTable
from .recipes import Recipe

SWIN = {  # embed_dim, depths, heads (Liu et al., "Swin Transformer", ICCV 2021, section 3.3)
    "swin-t": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin-s": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin-b": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "swin-l": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
RESNET = {"r50": RESNET_DEPTHS[50], "r101": RESNET_DEPTHS[101]}
TINY = "tiny"
BACKBONES = (TINY, *RESNET, *SWIN)
TINY_FIELDS = {
    "feature_size": 64,
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 256,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "dim_feedforward": 512,
    "num_queries": 20,
    "train_num_points": 512,
}


def backbone_config(name: str):
    """Config of a backbone by its short name, one of `BACKBONES`; weights are random."""
    if name == TINY:
        return ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=STAGES,
        )
    if name in RESNET:
        return ResNetConfig(depths=RESNET[name], out_features=STAGES)
    if name in SWIN:
        embed_dim, depths, heads = SWIN[name]
        window = 7 if embed_dim == 96 else 12
        return SwinConfig(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=heads,
            window_size=window,
            image_size=224 if window == 7 else 384,
            drop_path_rate=0.3,
            out_features=STAGES,
        )
    raise ValueError(f"backbone={name!r}: must be one of {', '.join(BACKBONES)}, or a checkpoint's folder or Hub id")


def new_model(backbone: str | Recipe, classes: ClassTable, task: str, **fields) -> Mask2FormerForUniversalSegmentation:
    """A model for these classes with a random head.

    Args:
        backbone: a short name or a recipe (random weights; "tiny" is a model of 1.4 M parameters for a CPU), or the
            folder or Hub id of a pretrained backbone with four stages, whose weights are loaded.
        fields: of `Mask2FormerConfig`.
    """
    pretrained = None
    if isinstance(backbone, Recipe):
        described = backbone.backbone_fields()
        config = CONFIG_MAPPING[described.pop("model_type")](**described, out_features=STAGES)
    elif backbone in BACKBONES:
        config = backbone_config(backbone)
        fields = (TINY_FIELDS if backbone == TINY else {}) | fields
    else:
        config = AutoConfig.from_pretrained(backbone, out_features=STAGES)
        pretrained = AutoBackbone.from_pretrained(backbone, out_features=STAGES)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=config, task=task, **classes.config_fields(), **fields)
    )
    if pretrained is not None:
        model.model.pixel_level_module.encoder.load_state_dict(pretrained.state_dict())
    return model
