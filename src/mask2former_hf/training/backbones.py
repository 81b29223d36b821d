"""Backbones by name, and a new model on one of them."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
)
from transformers.utils import logging

from ..conversion.architecture import RESNET_DEPTHS, STAGES
from ..conversion.dinov3 import LICENCE as DINOV3_LICENCE
from ..data.classes import ClassTable
from ..model.channels import model_channels
from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from .inflation import MEAN, set_channels, with_channels
from .recipes import Recipe
from .timm_backbones import is_timm, timm_config, timm_normalisation, timm_weights
from .vit_backbones import NORMALISATION, VITS, normalisation, with_maps


class Backbone(NamedTuple):
    """What a short name stands for: its config, and where the Hub has its weights of ImageNet (None: nowhere)."""

    config: Callable[[], PreTrainedConfig]
    weights: str | None


def _swin(embed_dim: int, depths: list[int], heads: list[int], window: int) -> Callable[[], SwinConfig]:
    """Liu et al., "Swin Transformer", ICCV 2021, section 3.3; pretrained at 224 pixels (window 7) or 384 (12)."""
    return partial(
        SwinConfig,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=heads,
        window_size=window,
        image_size=32 * window,
        drop_path_rate=0.3,
        out_features=STAGES,
    )


_BASE = _swin(128, [2, 2, 18, 2], [4, 8, 16, 32], 12)
_LARGE = _swin(192, [2, 2, 18, 2], [6, 12, 24, 48], 12)
TINY = "tiny"
BACKBONES = {  # the names that recipes end in are among them; "in21k" is the larger ImageNet, "in22k" on the Hub
    TINY: Backbone(
        partial(
            ResNetConfig,
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=STAGES,
        ),
        None,
    ),
    "r50": Backbone(partial(ResNetConfig, depths=RESNET_DEPTHS[50], out_features=STAGES), "microsoft/resnet-50"),
    "r101": Backbone(partial(ResNetConfig, depths=RESNET_DEPTHS[101], out_features=STAGES), "microsoft/resnet-101"),
    "swin-t": Backbone(_swin(96, [2, 2, 6, 2], [3, 6, 12, 24], 7), "microsoft/swin-tiny-patch4-window7-224"),
    "swin-s": Backbone(_swin(96, [2, 2, 18, 2], [3, 6, 12, 24], 7), "microsoft/swin-small-patch4-window7-224"),
    "swin-b": Backbone(_BASE, "microsoft/swin-base-patch4-window12-384"),
    "swin-b-in21k": Backbone(_BASE, "microsoft/swin-base-patch4-window12-384-in22k"),
    "swin-l": Backbone(_LARGE, "microsoft/swin-large-patch4-window12-384-in22k"),
    "swin-l-in21k": Backbone(_LARGE, "microsoft/swin-large-patch4-window12-384-in22k"),
    **{name: Backbone(*entry) for name, entry in VITS.items()},
}
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


def queries_for(segments: int) -> int:
    """Queries for images of up to so many segments: a tenth more, because of what was not looked at, in tens."""
    return -(-11 * segments // 100) * 10


def new_model(
    backbone: str | Recipe,
    classes: ClassTable,
    task: str,
    random_weights: bool = False,
    channels: int | None = None,
    inflate: str = MEAN,
    **fields,
) -> Mask2FormerForUniversalSegmentation:
    """A model for these classes: a backbone with its published weights, and a random head.

    Args:
        backbone: a short name (one of `BACKBONES`) or a recipe, whose weights are there under its backbone's name; or
            the folder or Hub id of a pretrained backbone, with four stages or a plain ViT, "timm/NAME" included.
            "tiny" is a model of 1.4 M parameters for a CPU, of which no weights are published: they are random.
        random_weights: of the backbone, too; then nothing is loaded.
        channels: of the images, 1 to 16; None for what the backbone takes, mostly 3.
        inflate: what trained weights are for further channels (`inflation.with_channels`).
        fields: of `Mask2FormerConfig`.

    Raises:
        ValueError: if the weights cannot be loaded, or are not those of the architecture.
    """
    name = backbone.backbone_name if isinstance(backbone, Recipe) else backbone
    if fields.get("head_type", "masks") != "masks":
        fields = {"num_queries": len(classes)} | fields
    if isinstance(backbone, Recipe):
        described = backbone.backbone_fields()
        config = CONFIG_MAPPING[described.pop("model_type")](**described, out_features=STAGES)
    elif backbone in BACKBONES:
        config = with_maps(BACKBONES[backbone].config(), fields.get("vit_neck"))
        fields = (TINY_FIELDS if backbone == TINY else {}) | fields
    elif is_timm(backbone):
        config = timm_config(backbone, fields.get("vit_neck"))
    else:
        config = with_maps(AutoConfig.from_pretrained(backbone), fields.get("vit_neck"))
    source = BACKBONES[name].weights if name in BACKBONES else name
    weights = None if source is None or random_weights else _weights(name, source, config)
    if weights is None and channels is not None:
        set_channels(config, channels)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=config, task=task, **classes.config_fields(), **fields)
    )
    if weights is not None:
        model.model.pixel_level_module.encoder.load_state_dict(weights)
        if config.model_type.startswith("dinov3"):
            model.config.weights_license = DINOV3_LICENCE
    return model if channels in (None, model_channels(model.config)) else with_channels(model, channels, inflate)


def normalisation_of(
    source: str | Recipe, random_weights: bool = False, names: Sequence[str] = NORMALISATION
) -> dict[str, list[float]]:
    """`image_mean` and `image_std` for images as those that the weights of a backbone or a checkpoint were trained on;
    or other fields of its processor.

    Empty for a source without a processor, and for one of the Hub that is not on this machine where it cannot be
    reached, or nothing of it is loaded.
    """
    name = source.backbone_name if isinstance(source, Recipe) else source
    if name == TINY:
        return {}
    source = BACKBONES[name].weights if name in BACKBONES else name
    if is_timm(source):
        return {name: value for name, value in timm_normalisation(source).items() if name in names}
    return normalisation(source, os.path.isdir(source) or random_weights or not _hub_answers(), names)


def _weights(name: str, source: str, config) -> dict:
    """Tensors of a published backbone, none of them random but the norms of its maps, which classifiers lack."""
    reachable = os.path.isdir(source) or _hub_answers()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of the classifier's tensors, which have no place here
    try:
        if is_timm(source):
            return timm_weights(source, config)
        backbone = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone takes folders for names of timm
        options = {"output_loading_info": True, "local_files_only": not reachable}
        loaded, report = backbone.from_pretrained(source, config=config, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = reason if reachable else "the Hub cannot be reached, and they are not in its cache"
        raise ValueError(
            f"backbone={name}: its weights, {source} as a folder or on the Hub, cannot be loaded ({reason}). Give a "
            "folder that has them, or random_weights=True to start from random ones, which takes much longer to learn"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in report["missing_keys"] if "hidden_states_norms" not in key)
    if missing:
        raise ValueError(
            f"backbone={name}: {source} lacks {len(missing)} of its tensors, such as {missing[0]}: they are not "
            "weights of this architecture"
        )
    return loaded.state_dict()


def _hub_answers() -> bool:
    """Asked once and briefly: the Hub's client tries each file five times, minutes where there is no network."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of whatever library the client sends with
        return False
    return True
