"""The configuration of a checkpoint: what its tensors show, and what only its training configuration says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.design_rules import BACKBONE_MAPS
from .designs import design_of, pixel_decoder_fields, standard_decoder_fields
from .names import CheckpointError
from .original import current_name

_PIXELS = "sem_seg_head.pixel_decoder."
_QUERIES = "sem_seg_head.predictor."
STAGES = ["stage1", "stage2", "stage3", "stage4"]
# blocks per stage by the number of layers (He et al., "Deep Residual Learning", CVPR 2016, table 1)
RESNET_DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
SAMPLES = 3 * 4  # levels times points of the pixel decoder's attention, fixed in the original


@dataclass
class Architecture:
    """What the tensors of a checkpoint show.

    Args:
        config: fields of `Mask2FormerConfig` that shapes and names fix.
        backbone: fields of the backbone's config that they fix, with "model_type".
        assumed: fields of `Mask2FormerConfig` that they do not show, with the value every recipe of the original has.
        assumed_backbone: likewise for the backbone.
    """

    config: dict
    backbone: dict
    assumed: dict
    assumed_backbone: dict


@dataclass
class Settings:
    """What a training configuration says about a checkpoint; only fields that it names.

    Args:
        name: for messages.
        config: fields of `Mask2FormerConfig`.
        backbone: fields of the backbone's config, with "model_type".
        processor: fields of `Mask2FormerImageProcessor`.
        class_set: name of the class set, as `mask2former_hf.data.classes.ClassTable.load` takes it.
        notes: what the user should know.
        video: trained on clips; their models have the same tensors.
    """

    name: str
    config: dict
    backbone: dict
    processor: dict = field(default_factory=dict)
    class_set: str | None = None
    notes: list[str] = field(default_factory=list)
    video: bool = False


def infer_architecture(state: Mapping[str, Tensor], vit: dict | None = None) -> Architecture:
    """Read the architecture off the tensors of a checkpoint with the original's names, of any version.

    Args:
        vit: fields of the backbone's config, if it is a ViT that was read from a file of its own.

    Raises:
        CheckpointError: if a tensor that decides is not there, or has another number of dimensions.
    """
    shapes = {current_name(name): tuple(tensor.shape) for name, tensor in state.items()}

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(
                f"{name} is missing: this is no Mask2Former, and none of the designs that it is compared with (a "
                "backbone's weights alone, or another model?)"
            )
        if len(shapes[name]) != dimensions or 0 in shapes[name]:
            raise CheckpointError(f"{name} has shape {shapes[name]}: it must have {dimensions} dimensions, none empty")
        return shapes[name]

    if vit is not None:
        backbone, assumed_backbone = vit, {}
    elif "backbone.patch_embed.proj.weight" in shapes:
        backbone, assumed_backbone = _swin(shapes, shape)
    elif "backbone.stem.conv1.weight" in shapes:
        backbone, assumed_backbone = _resnet(shapes, shape)
    else:
        raise CheckpointError("the backbone is neither the original's Swin nor its ResNet; no other is converted")
    types = design_of(shapes)
    config = types | pixel_decoder_fields(types, shape, lambda template: _count(shapes, template))
    assumed = {"pre_norm": False, "dropout": 0.0}
    if types["pixel_decoder_type"] == "deformable":
        layer = _PIXELS + "transformer.encoder.layers.0.self_attn.attention_weights.weight"
        config["num_attention_heads"] = shape(layer, 2)[0] // SAMPLES
        config["common_stride"] = 4 if _PIXELS + "adapter_1.weight" in shapes else 8
    else:
        assumed["num_attention_heads"] = 8
    if any(name.endswith("transformer.encoder.norm.weight") for name in shapes):
        config["pre_norm"] = True
    config |= _queries(types, shapes, shape, config, backbone, assumed)
    if vit is not None:
        config["vit_neck"] = "adapter"
    if backbone["model_type"] == "resnet":
        # SyncBN counts its updates, FrozenBN does not
        assumed["freeze_batch_norm"] = "backbone.stem.conv1.norm.num_batches_tracked" not in shapes
    if "criterion.empty_weight" in state:
        shape("criterion.empty_weight", 1)
        config["no_object_weight"] = round(state["criterion.empty_weight"][-1].item(), 6)
    return Architecture(config, backbone, assumed, assumed_backbone)


def _queries(types: dict, shapes: Mapping, shape, config: dict, backbone: dict, assumed: dict) -> dict:
    """Fields of the transformer decoder and of the classes; what is not visible goes to `assumed`."""
    if types["head_type"] == "per_pixel":
        classes = shape(_QUERIES + "weight", 4)[0]
        return {"num_labels": classes, "num_queries": classes}
    if types["decoder_type"] == "standard":
        stages = backbone.get("hidden_sizes") or [backbone["embed_dim"] * 2**n for n in range(4)]
        channels = dict(zip(BACKBONE_MAPS, stages, strict=True)) | {"pixel_embedding": config["mask_feature_size"]}
        if types["pixel_decoder_type"] != "fpn":
            channels["transformer_encoder"] = config["feature_size"]
        fields, guess = standard_decoder_fields(shapes, shape, lambda template: _count(shapes, template), channels)
        assumed |= guess
        of_pixels = types["head_type"] == "per_pixel_plus"
        classes = fields["num_queries"] if of_pixels else shape(_QUERIES + "class_embed.weight", 2)[0] - 1
        return {"num_labels": classes, **fields}
    queries, hidden = shape(_QUERIES + "query_feat.weight", 2)
    fields = {
        "num_labels": shape(_QUERIES + "class_embed.weight", 2)[0] - 1,
        "num_queries": queries,
        "hidden_dim": hidden,
        "decoder_layers": _count(shapes, _QUERIES + "transformer_ffn_layers.{}.") + 1,
        "dim_feedforward": shape(_QUERIES + "transformer_ffn_layers.0.linear1.weight", 2)[0],
    }
    if hidden == config["feature_size"]:
        fields["enforce_input_projection"] = _QUERIES + "input_proj.0.weight" in shapes
    return fields


def _count(shapes: Mapping, template: str) -> int:
    """How many different numbers the names have at {}."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def _swin(shapes: Mapping, shape) -> tuple[dict, dict]:
    embed_dim, channels, patch, _ = shape("backbone.patch_embed.proj.weight", 4)
    stages = range(_count(shapes, "backbone.layers.{}."))
    first = "backbone.layers.0.blocks.0."
    tables = [shape(f"backbone.layers.{i}.blocks.0.attn.relative_position_bias_table", 2) for i in stages]
    widened, width = shape(first + "mlp.fc1.weight", 2)
    window = (round(tables[0][0] ** 0.5) + 1) // 2
    fields = {
        "model_type": "swin",
        "embed_dim": embed_dim,
        "num_channels": channels,
        "patch_size": patch,
        "depths": [_count(shapes, f"backbone.layers.{i}.blocks.{{}}.") for i in stages],
        "num_heads": [heads for _, heads in tables],
        "window_size": window,
        "mlp_ratio": widened / width,
        "qkv_bias": first + "attn.qkv.bias" in shapes,
        "use_absolute_embeddings": "backbone.absolute_pos_embed" in shapes,
    }
    if fields["use_absolute_embeddings"]:
        fields["image_size"] = shape("backbone.absolute_pos_embed", 4)[-1] * patch
    return fields, {"drop_path_rate": 0.3, "image_size": 384 if window == 12 else 224}


def _resnet(shapes: Mapping, shape) -> tuple[dict, dict]:
    bottleneck = "backbone.res2.0.conv3.weight" in shapes
    last = "conv3" if bottleneck else "conv2"
    fields = {
        "model_type": "resnet",
        "embedding_size": shape("backbone.stem.conv1.weight", 4)[0],
        "hidden_sizes": [shape(f"backbone.res{n}.0.{last}.weight", 4)[0] for n in range(2, 6)],
        "depths": [_count(shapes, f"backbone.res{n}.{{}}.") for n in range(2, 6)],
        "layer_type": "bottleneck" if bottleneck else "basic",
    }
    return fields, {"downsample_in_bottleneck": False}


def make_config(
    architecture: Architecture,
    settings: Settings | None = None,
    labels: Mapping[int, str] | None = None,
    stuff: list[int] | None = None,
) -> Mask2FormerConfig:
    """The configuration of a checkpoint; what `settings` say is checked against what the tensors show.

    Args:
        architecture: from `infer_architecture`.
        settings: from the yaml or a recipe.
        labels: names of the classes, one per label.
        stuff: labels that are stuff.

    Raises:
        CheckpointError: listing every field in which settings or labels contradict the tensors.
    """
    settings = settings or Settings("nothing", {}, {})
    conflicts = [
        f"{name} is {said!r} there and {seen[name]!r} in the tensors"
        for said_fields, seen in ((settings.config, architecture.config), (settings.backbone, architecture.backbone))
        for name, said in said_fields.items()
        if name in seen and seen[name] != said
    ]
    if conflicts:
        raise CheckpointError(f"{settings.name} is not this checkpoint's configuration: {'; '.join(conflicts)}")
    fields = architecture.assumed | settings.config | architecture.config
    backbone = {"out_features": STAGES} | architecture.assumed_backbone | settings.backbone | architecture.backbone
    count = fields.pop("num_labels")
    if labels is not None and len(labels) != count:
        raise CheckpointError(f"{len(labels)} names for {count} classes: give one name per class")
    labels = dict(labels or {index: f"LABEL_{index}" for index in range(count)})
    try:
        return Mask2FormerConfig(
            backbone_config=backbone,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            stuff_label_ids=stuff,
            **fields,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"no model has the configuration of this checkpoint: {error}") from error
