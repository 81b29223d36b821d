"""Configuration of Mask2Former: transformers' fields, defaults and file format, for any backbone of `AutoBackbone`."""

import copy
import dataclasses
import math
import re
import reprlib
from collections.abc import Callable

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .design_rules import BUILT_IN_DESIGN, DESIGN_RULES, check_design
from .result_defaults import TASKS

MASK_LOSSES = ("bce", "focal")
VIT_NECKS = ("pyramid", "adapter")

# Fields that become modules, as those of the backbone's config do: a model that is made cannot follow their change.
# All others act when they are changed.
BUILT_IN_FIELDS = (
    "feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim",
    "activation_function", "encoder_layers", "decoder_layers", "num_attention_heads", "dropout", "dim_feedforward",
    "pre_norm", "enforce_input_projection", "common_stride", "num_queries", "feature_strides", "freeze_batch_norm",
    "vit_neck", *BUILT_IN_DESIGN,
)  # fmt: skip

WIDEST = 2**16  # channels of a layer, queries, labels: far beyond any use; more is a mistake that fills the memory
DEEPEST = 1000  # layers


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(least: int, most: int) -> tuple[Callable, str]:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"


def _number(least: int, most: int) -> tuple[Callable, str]:
    return lambda value: _is_number(value) and least <= value <= most, f"between {least} and {most}"


def _all_whole(value, least: int) -> bool:
    return isinstance(value, list | tuple) and all(type(number) is int and number >= least for number in value)


def _is_window(value) -> bool:
    """Windows side by side or overlapping: with a longer stride pixels between them would be seen by none."""
    whole = isinstance(value, dict) and set(value) == {"side", "stride"} and _all_whole(list(value.values()), 1)
    return whole and value["stride"] <= value["side"] <= 2**15


def _has_labels(value) -> bool:
    return isinstance(value, dict) and 1 <= len(value) <= WIDEST


_WIDTH, _SHARE = _whole(1, WIDEST), _number(0, 1)
_WEIGHT = (_number(0, 10**9)[0], "0 or more, and at most 1e9")

_RULES = {  # what a field must be whatever the others are
    "feature_size": (lambda value: _WIDTH[0](value) and value % 32 == 0, "a multiple of 32 (groups of its norm)"),
    "mask_feature_size": _WIDTH,
    "hidden_dim": _WIDTH,
    "encoder_feedforward_dim": _WIDTH,
    "activation_function": (lambda value: value in ACT2FN, "an activation that transformers knows"),
    "encoder_layers": _whole(0, DEEPEST),
    "decoder_layers": _whole(1, DEEPEST),  # 1 for the learned queries alone
    "num_attention_heads": _WIDTH,
    "dropout": _SHARE,
    "dim_feedforward": _WIDTH,
    "common_stride": (lambda value: value in (4, 8), "4 or 8"),
    "ignore_value": _whole(-(2**31), 2**31 - 1),
    "num_queries": _WIDTH,
    "num_labels": _WIDTH,
    "id2label": (lambda value: value is None or _has_labels(value), f"a map of 1 to {WIDEST} labels to names"),
    "label2id": (lambda value: value is None or isinstance(value, dict), "a map of names to labels"),
    "no_object_weight": _WEIGHT,
    "class_weight": _WEIGHT,
    "mask_weight": _WEIGHT,
    "dice_weight": _WEIGHT,
    "train_num_points": _whole(1, 2**24),
    "oversample_ratio": _number(1, 1000),
    "importance_sample_ratio": _SHARE,
    "init_std": _WEIGHT,
    "init_xavier_std": _WEIGHT,
    "feature_strides": (lambda value: _all_whole(value, 1) and len(value) == 4, "four whole numbers above 0"),
    "vit_neck": (
        lambda value: value is None or value in VIT_NECKS,
        f"one of {', '.join(VIT_NECKS)}, or None for what the backbone needs",
    ),
    "mask_loss": (lambda value: value in MASK_LOSSES, f"one of {', '.join(MASK_LOSSES)}"),
    "focal_alpha": _SHARE,
    "focal_gamma": _WEIGHT,
    "task": (lambda value: value is None or value in TASKS, f"one of {', '.join(TASKS)}, or None"),
    "stuff_label_ids": (lambda value: value is None or _all_whole(value, 0), "a list of labels, or None"),
    "sliding_window": (
        lambda value: value is None or _is_window(value),
        "{'side': pixels, 'stride': pixels, at most the side}, or None",
    ),
    "weights_license": (
        lambda value: value is None or (isinstance(value, str) and re.fullmatch(r"[\w.-]{1,96}", value)),
        "a name of letters, digits, '.', '_' and '-', or None",
    ),
    **DESIGN_RULES,
}
_ONLY_WHERE_USED = ("vit_neck", "sliding_window", "weights_license", *DESIGN_RULES)  # not in files where usual
_BACKBONE = "backbone_config."
_GENERAL_FIELDS = {field.name for field in dataclasses.fields(PreTrainedConfig)}


def built_in_values(config: PreTrainedConfig) -> dict:
    """The fields of a config that a model's modules are made from; those of the backbone's begin with `_BACKBONE`."""
    values = {name: getattr(config, name) for name in BUILT_IN_FIELDS}
    for name, value in vars(config.backbone_config).items():
        if name == "_out_features" or not (name in _GENERAL_FIELDS or name.startswith("_")):
            values[_BACKBONE + name] = copy.copy(value)
    return values


def check_built_in(config: PreTrainedConfig, values: dict):
    """Refuse a config that differs from `values`, which a model's modules were made from.

    Raises:
        ValueError: naming the field.
    """
    for path, value in values.items():
        owner = config.backbone_config if path.startswith(_BACKBONE) else config
        now = getattr(owner, path.removeprefix(_BACKBONE))
        if now != value:
            raise ValueError(
                f"config.{path} was changed from {value!r} to {now!r} after the model was made, whose modules cannot "
                "follow: make or load a model with it; for other labels or another number of queries of a trained "
                "model see training.label_surgery"
            )


@strict
class Mask2FormerConfig(PreTrainedConfig):
    r"""Architecture, loss weights and label meaning of a Mask2Former (Cheng et al., CVPR 2022).

    Names, defaults and meaning are those of `transformers.Mask2FormerConfig`, and either class reads the other's
    `config.json`. `freeze_batch_norm`, `task`, `stuff_label_ids`, the fields of the mask loss and of compared designs,
    `vit_neck`, `sliding_window` and `weights_license` are additional and optional. Once a model is made, the fields
    that became modules (`BUILT_IN_FIELDS` and the backbone's config) must stay as they are; the others act whenever
    they are changed.

    Args:
        backbone_config: config (or its dict) of a backbone that `AutoBackbone` knows, with four feature maps at
            strides 4, 8, 16 and 32, or of a plain ViT. `None` is Swin-S. Channels are read off the backbone.
        feature_size: channels of the pixel decoder; a multiple of 32 (group norm with 32 groups).
        mask_feature_size: channels of the mask features and of the mask embeddings.
        hidden_dim: channels of the transformer decoder.
        encoder_feedforward_dim: width of the feed-forward blocks in the pixel decoder.
        activation_function: activation of the feed-forward blocks in the transformer decoder.
        encoder_layers: deformable attention layers in the pixel decoder.
        decoder_layers: supervised predictions, one more than there are decoder layers: the learned queries are
            supervised before the first layer.
        num_attention_heads: heads of every attention in pixel decoder and transformer decoder.
        dropout: dropout probability in pixel decoder and transformer decoder. (Stock transformers also skips whole
            decoder layers with this probability; here dropout is dropout only.)
        dim_feedforward: width of the feed-forward blocks in the transformer decoder.
        pre_norm: layer norm before each block of the transformer decoder instead of after it.
        enforce_input_projection: 1x1 convolution between pixel decoder and transformer decoder even if
            `feature_size == hidden_dim`.
        common_stride: stride of the mask features, 4 or 8.
        ignore_value: label that means "no label"; for data pipelines, the model does not read it.
        num_queries: segments that can be predicted in an image.
        no_object_weight: weight of the "no object" class in the classification loss.
        class_weight, mask_weight, dice_weight: weights of the three terms in matching cost and loss; of a head that
            classifies pixels the first alone (the original has 1 there).
        train_num_points: points per mask at which matching cost and mask losses are evaluated.
        oversample_ratio: candidates per point that importance sampling chooses from.
        importance_sample_ratio: share of the points chosen for their uncertainty; the rest is uniform.
        init_std: kept for compatibility of files; initialisation follows the original code, which has no such number.
        init_xavier_std: gain of the Xavier initialisation in the transformer decoder.
        use_auxiliary_loss: supervise every decoder layer, not only the last.
        feature_strides: strides of the backbone's feature maps, used only if they cannot be read off the backbone.
        output_auxiliary_logits: return the predictions of all layers.
        freeze_batch_norm: batch norms of the backbone keep their statistics and affine parameters in training: the
            original's FrozenBN, its default for ResNets. For backbones with trained statistics.
        vit_neck: what makes four maps of a plain ViT: `"pyramid"`, ViTDet's simple feature pyramid, from its last map,
            or `"adapter"`, DINOv3's, from the maps of four blocks and the image. `None` is the pyramid, and nothing
            for a backbone that has four maps of its own.
        mask_loss: the mask term of matching cost and loss: `"bce"` (cross-entropy, the original's) or `"focal"`, which
            is several times smaller, as `mask_weight` can balance.
        focal_alpha: weight of the pixels of a segment in the focal loss; those outside weigh `1 - focal_alpha`.
        focal_gamma: how strongly the focal loss turns away from pixels that are right already; 0 for not at all.
        pixel_decoder_type: `"deformable"` (the paper's), or compared with it `"fpn"`, MaskFormer's, or
            `"transformer_fpn"`, behind a DETR encoder of `encoder_layers` over the coarsest map.
        decoder_type: `"masked"` (the paper's), or `"standard"`, MaskFormer's: DETR's decoder of `decoder_layers` over
            one map.
        head_type: `"masks"` (the paper's); `"per_pixel"`, a class for every pixel by a 1x1 convolution; or
            `"per_pixel_plus"`, the same by the standard decoder, whose query k is class k. Both are semantic.
        transformer_in_feature: the standard decoder's map: `"res2"` to `"res5"` of the backbone, `"pixel_embedding"`
            (mask features), or `"transformer_encoder"` (the pixel decoder's encoder at stride 32).
        memory_encoder_layers: DETR encoder layers over that map, before the standard decoder.
        masked_attention: `False` for cross-attention to the whole map.
        attended_stride: 32, 16 or 8, the only map that the masked decoder attends to; `None` for all three in turn.
        self_attention_first: queries see each other before they see the map.
        learned_query_features: `False` for queries that start as zeros, and differ by their positions alone.
        matching_on, loss_on: `"points"` (the paper's, `train_num_points`), or `"masks"`: every cell of mask logits,
            for matching cost and loss.
        encoder_exits: in training a step runs only the first few of the `encoder_layers` now and then, so that the
            trained model can answer with fewer of them (`inference.effort`). Outside of training it changes nothing.
        task: what the checkpoint was trained for: `"semantic"`, `"instance"` or `"panoptic"`.
        stuff_label_ids: labels that are stuff (one segment per image), for panoptic results.
        sliding_window: `{"side", "stride"}` in pixels of the resized image, for a checkpoint whose semantic scores are
            the mean over windows, as DINOv3's segmentor's. `None` is the whole image at once.
        weights_license: of weights that the checkpoint was made of, where it binds what is made of them, such as
            `"dinov3-license"`; the model card says it.
    """

    model_type = "mask2former"
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {"hidden_size": "hidden_dim", "num_hidden_layers": "decoder_layers"}
    keys_to_ignore_at_inference = [
        "loss_dict",
        "auxiliary_logits",
        "encoder_last_hidden_state",
        "pixel_decoder_last_hidden_state",
        "transformer_decoder_last_hidden_state",
        "encoder_hidden_states",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
        "attentions",
        "cross_attentions",
    ]

    backbone_config: dict | PreTrainedConfig | None = None
    feature_size: int = 256
    mask_feature_size: int = 256
    hidden_dim: int = 256
    encoder_feedforward_dim: int = 1024
    activation_function: str = "relu"
    encoder_layers: int = 6
    decoder_layers: int = 10
    num_attention_heads: int = 8
    dropout: float | int = 0.0
    dim_feedforward: int = 2048
    pre_norm: bool = False
    enforce_input_projection: bool = False
    common_stride: int = 4
    ignore_value: int = 255
    num_queries: int = 100
    no_object_weight: float | int = 0.1
    class_weight: float | int = 2.0
    mask_weight: float | int = 5.0
    dice_weight: float | int = 5.0
    train_num_points: int = 12544
    oversample_ratio: float | int = 3.0
    importance_sample_ratio: float | int = 0.75
    init_std: float | int = 0.02
    init_xavier_std: float | int = 1.0
    use_auxiliary_loss: bool = True
    feature_strides: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    output_auxiliary_logits: bool | None = None
    freeze_batch_norm: bool = False
    vit_neck: str | None = None
    mask_loss: str = "bce"
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    pixel_decoder_type: str = "deformable"
    decoder_type: str = "masked"
    head_type: str = "masks"
    transformer_in_feature: str = "res5"
    memory_encoder_layers: int = 0
    masked_attention: bool = True
    attended_stride: int | None = None
    self_attention_first: bool = False
    learned_query_features: bool = True
    matching_on: str = "points"
    loss_on: str = "points"
    encoder_exits: bool = False
    task: str | None = None
    stuff_label_ids: list[int] | tuple[int, ...] | None = None
    sliding_window: dict | None = None
    weights_license: str | None = None

    def __setattr__(self, name: str, value):
        name = self.attribute_map.get(name, name)
        if name in _RULES:
            holds, rule = _RULES[name]
            if not holds(value):
                raise ValueError(f"{name}={reprlib.repr(value)}: must be {rule}")
        if name == "id2label" and value is not None:
            value = _with_integer_keys(value)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        backbone = kwargs.pop("backbone", None)
        for legacy in ("use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs"):
            kwargs.pop(legacy, None)
        if self.backbone_config is None:
            if backbone is not None:
                raise ValueError(
                    f"backbone={backbone!r}: a backbone is given by its config, not by a name. Pass backbone_config="
                    f"AutoConfig.from_pretrained({backbone!r}, out_features=['stage1', 'stage2', 'stage3', 'stage4'])"
                )
            self.backbone_config = AutoConfig.for_model(
                "swin", depths=[2, 2, 18, 2], drop_path_rate=0.3, out_features=["stage1", "stage2", "stage3", "stage4"]
            )
        elif isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            if "model_type" not in fields:
                raise ValueError(
                    f"backbone_config has the keys {sorted(fields)}: it must name its 'model_type' (such as 'swin' or "
                    "'resnet'), or be a config object of transformers"
                )
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """As it is written to files: without fields of ours that say nothing but the usual."""
        fields, usual = super().to_dict(), type(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in _ONLY_WHERE_USED or value != getattr(usual, name)
        }

    def validate_architecture(self):
        super().validate_architecture()
        rules = {
            "hidden_dim": (
                self.hidden_dim % 4 == 0 and self.hidden_dim % max(1, self.num_attention_heads) == 0,
                f"a multiple of 4 and of num_attention_heads={self.num_attention_heads}",
            ),
            "num_attention_heads": (
                self.num_attention_heads > 0 and self.feature_size % self.num_attention_heads == 0,
                f"a divisor of feature_size={self.feature_size}",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {rule}")
        check_design(self)
        unknown = [label for label in self.stuff_label_ids or () if not 0 <= label < self.num_labels]
        if unknown:
            raise ValueError(
                f"stuff_label_ids contains {unknown}: every id must be a label, 0 to num_labels - 1 = "
                f"{self.num_labels - 1}; give id2label first or remove these ids"
            )


def _with_integer_keys(id2label: dict) -> dict[int, str]:
    """As they are needed; json has strings."""
    try:
        return {int(label): name for label, name in id2label.items()}
    except ValueError:
        raise ValueError(
            f"id2label has the keys {list(id2label)}: they must be label ids, 0 to num_labels - 1"
        ) from None


def no_object_weight_of(checkpoint, kwargs: dict) -> float:
    """What a checkpoint's own config.json says, whatever arguments to `from_pretrained` have made of it."""
    if checkpoint is None:
        return math.nan
    hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    options = {name: kwargs[name] for name in hub if name in kwargs}
    try:
        fields, _ = Mask2FormerConfig.get_config_dict(checkpoint, **options)
    except OSError:  # there is none
        return math.nan
    return fields.get("no_object_weight", Mask2FormerConfig.no_object_weight)


__all__ = ["Mask2FormerConfig"]
