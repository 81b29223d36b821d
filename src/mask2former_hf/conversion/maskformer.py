"""Checkpoints of transformers' own MaskFormer (`facebook/maskformer-*`): the design of FPN and standard decoder."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import MaskFormerForInstanceSegmentation, PreTrainedConfig
from transformers.utils import logging

from .architecture import STAGES, Architecture
from .checkpoint_files import Checkpoint
from .designs import MASKFORMER
from .names import CheckpointError, NameTable, listed

_ENCODER = "model.pixel_level_module.encoder."
_PIXELS = "model.pixel_level_module.decoder."
_LAYER = "model.transformer_module.decoder.layers.{i}."
_BLOCK = "encoder.layers.{i}.blocks.{j}."
_PARTS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
MARK = _PIXELS + "fpn."  # what names of a MaskFormer's tensors begin with

# Theirs in memory, ours in a file, where Swin has the names of its first version
TABLE = NameTable([
    (_ENCODER + "model.embeddings.patch_embeddings.projection.{p}",
     _ENCODER + "embeddings.patch_embeddings.projection.{p}"),
    (_ENCODER + "model.embeddings.norm.{p}", _ENCODER + "embeddings.norm.{p}"),
    (_ENCODER + "model.embeddings.position_embeddings", _ENCODER + "embeddings.position_embeddings"),
    *((f"{_ENCODER}model.{_BLOCK}{part}.{{p}}", f"{_ENCODER}{_BLOCK}{part}.{{p}}")
      for part in (*_PARTS, "layernorm_before", "layernorm_after", "intermediate.dense", "output.dense")),
    (f"{_ENCODER}model.{_BLOCK}attention.self.relative_position_bias_table",
     f"{_ENCODER}{_BLOCK}attention.self.relative_position_bias_table"),
    (f"{_ENCODER}model.{_BLOCK}attention.self.relative_position_index", None),
    *((f"{_ENCODER}model.encoder.layers.{{i}}.downsample.{part}.{{p}}",
       f"{_ENCODER}encoder.layers.{{i}}.downsample.{part}.{{p}}") for part in ("norm", "reduction")),
    (_ENCODER + "model.layernorm.{p}", None),  # not used there either
    *((f"{_ENCODER}hidden_states_norms.{n}.{{p}}", f"{_ENCODER}hidden_states_norms.stage{n + 1}.{{p}}")
      for n in range(4)),
    *((f"{_ENCODER}{name}", f"{_ENCODER}{name}") for name in (
        "embedder.embedder.convolution.weight", "embedder.embedder.normalization.{s}",
        *(f"encoder.stages.{{i}}.layers.{{j}}.{part}.{kind}"
          for part in ("shortcut", *(f"layer.{n}" for n in range(3)))
          for kind in ("convolution.weight", "normalization.{s}")))),
    (_PIXELS + "fpn.stem.{i}.{p}", _PIXELS + "layer_4.{i}.{p}"),
    *((f"{_PIXELS}fpn.layers.{n}.{theirs}.{{i}}.{{p}}", f"{_PIXELS}{ours}_{3 - n}.{{i}}.{{p}}")
      for n in range(3) for theirs, ours in (("proj", "adapter"), ("block", "layer"))),
    (_PIXELS + "mask_projection.{p}", _PIXELS + "mask_projection.{p}"),
    ("model.transformer_module.queries_embedder.weight", "model.transformer_module.queries_embedder.weight"),
    ("model.transformer_module.input_projection.{p}", "model.transformer_module.input_projection.{p}"),
    *((f"{_LAYER}self_attn.{part}_proj.{{p}}", f"{_LAYER}self_attn.{part}_proj.{{p}}") for part in "qkv"),
    (_LAYER + "self_attn.o_proj.{p}", _LAYER + "self_attn.out_proj.{p}"),
    (_LAYER + "encoder_attn.o_proj.{p}", _LAYER + "cross_attn.out_proj.{p}"),
    (_LAYER + "encoder_attn_layer_norm.{p}", _LAYER + "cross_attn_layer_norm.{p}"),
    *((f"{_LAYER}{part}.{{p}}", f"{_LAYER}{part}.{{p}}") for part in ("self_attn_layer_norm", "final_layer_norm")),
    *((f"{_LAYER}mlp.{part}.{{p}}", f"{_LAYER}{part}.{{p}}") for part in ("fc1", "fc2")),
    ("model.transformer_module.decoder.layernorm.{p}", "model.transformer_module.decoder.layernorm.{p}"),
    ("mask_embedder.{i}.0.{p}", "model.transformer_module.decoder.mask_predictor.mask_embedder.{i}.0.{p}"),
    ("class_predictor.{p}", "class_predictor.{p}"),
    ("criterion.empty_weight", "criterion.empty_weight"),
], source="transformers' MaskFormer")  # fmt: skip


def is_maskformer(place: str | os.PathLike) -> bool:
    """Whether a folder or Hub id has the config.json of a MaskFormer of transformers."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(str(place))
    except (OSError, ValueError):
        return False
    return fields.get("model_type") == "maskformer"


def read_maskformer(place: str | os.PathLike) -> Checkpoint:
    """The tensors of a folder or Hub id as transformers' own class loads them, with its config and processor.

    Raises:
        CheckpointError: if that class cannot load it, or misses tensors.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        from transformers import MaskFormerImageProcessor  # here, as its import warns where torchvision is missing

        model, report = MaskFormerForInstanceSegmentation.from_pretrained(str(place), output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{place} cannot be loaded as transformers' MaskFormer: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = [name for name in report["missing_keys"] if "relative_position_index" not in name]
    if missing:
        raise CheckpointError(f"{place} lacks {len(missing)} tensors of its MaskFormer: {listed(missing)}")
    try:
        processor = MaskFormerImageProcessor.from_pretrained(str(place)).to_dict()
    except OSError:
        processor = {}
    names = [model.config.id2label[label] for label in sorted(model.config.id2label)]
    rest = {"meta": {"CLASSES": names}, "config": model.config, "processor": processor, "place": str(place)}
    return Checkpoint(model.state_dict(), rest)


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names → tensors as our class reads them from a file.

    Raises:
        CheckpointError: listing the names that are not in the table.
    """
    converted, joint, unknown = {}, {}, []
    for name, tensor in state.items():
        base, _, kind = name.rpartition(".")
        if ".encoder_attn." in name and base[-len("q_proj") :] in ("q_proj", "k_proj", "v_proj"):
            target = f"{base[: -len('q_proj')].replace('encoder_attn', 'cross_attn')}in_proj_{kind}"
            joint.setdefault(target, {})[base[-len("q_proj") :][0]] = tensor
            continue
        try:
            (target,) = TABLE.to_ours(name)
        except KeyError:
            unknown.append(name)
            continue
        if target is not None:
            converted[target] = tensor
    if unknown:
        raise CheckpointError(f"no translation for {len(unknown)} tensors of MaskFormer: {listed(unknown)}")
    return converted | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in joint.items()}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """What a MaskFormer's config says; its loss is the one of whole masks, with the weights that the config has."""
    decoder, backbone = config.decoder_config, config.backbone_config
    fields = backbone.to_diff_dict() | {"model_type": backbone.model_type.removeprefix("maskformer-")}
    fields = {name: value for name, value in fields.items() if name not in ("out_indices", "architectures")}
    ours = MASKFORMER | {
        "pixel_decoder_type": "fpn",
        "feature_size": config.fpn_feature_size,
        "mask_feature_size": config.mask_feature_size,
        "hidden_dim": decoder.d_model,
        "num_queries": decoder.num_queries,
        "decoder_layers": decoder.decoder_layers,
        "num_attention_heads": decoder.decoder_attention_heads,
        "dim_feedforward": decoder.decoder_ffn_dim,
        "activation_function": decoder.activation_function,
        "dropout": decoder.dropout,
        "num_labels": config.num_labels,
        "no_object_weight": config.no_object_weight,
        "class_weight": config.cross_entropy_weight,
        "mask_weight": config.mask_weight,
        "dice_weight": config.dice_weight,
        "use_auxiliary_loss": config.use_auxiliary_loss,
    }
    return Architecture(ours, fields | {"out_features": STAGES}, {}, {})


def processor_fields(processor: Mapping) -> dict:
    """Those of `Mask2FormerImageProcessor` that the other processor has with the same meaning."""
    size = processor.get("size") or {}
    known = {name: processor[name] for name in ("image_mean", "image_std", "do_reduce_labels") if name in processor}
    edges = {name: size[name] for name in ("shortest_edge", "longest_edge") if size.get(name)}
    return known | ({"size": edges} if len(edges) == 2 else {})
