"""Parameter names of facebookresearch/Mask2Former and of transformers' checkpoint files, both ways.

One table per transformer decoder. `None` drops a tensor on purpose: on the right a constant that our module computes
itself, on the left what the original does not have.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .names import CheckpointError, NameTable, Row, check_shape, listed

_ENCODER = "model.pixel_level_module.encoder."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_THEIR_PIXELS = "sem_seg_head.pixel_decoder."
_THEIR_QUERIES = "sem_seg_head.predictor."
_THEIR_BLOCK = "backbone.layers.{i}.blocks.{j}."
_BLOCK = _ENCODER + "encoder.layers.{i}.blocks.{j}."
_THEIR_ENCODER_LAYER = _THEIR_PIXELS + "transformer.encoder.layers.{i}."
_ENCODER_LAYER = _PIXELS + "encoder.layers.{i}."
_DECODER_LAYER = _QUERIES + "decoder.layers.{i}."
_POSITION_MAP = "backbone.absolute_pos_embed"
_BIAS_TABLE = "attn.relative_position_bias_table"

# ResNet: stages are res2 .. res5 there and 0 .. 3 here, convolutions conv1 .. conv3 there and 0 .. 2 here
_RESNET = [
    (f"backbone.res{stage + 2}.{{i}}.{theirs}.{kind}",
     f"{_ENCODER}encoder.stages.{stage}.layers.{{i}}.{ours}.{target}")
    for stage in range(4)
    for theirs, ours in
    {"conv1": "layer.0", "conv2": "layer.1", "conv3": "layer.2", "shortcut": "shortcut"}.items()
    for kind, target in {"weight": "convolution.weight", "norm.{s}": "normalization.{s}"}.items()
]  # fmt: skip


def _detr_attention(theirs: str, ours: str) -> list[Row]:
    """Self-attention of a layer, one matrix of queries, keys and values there and three here."""
    return [
        *((f"{theirs}self_attn.in_proj_{kind}", tuple(f"{ours}self_attn.{part}_proj.{kind}" for part in "qkv"))
          for kind in ("weight", "bias")),
        (theirs + "self_attn.out_proj.{p}", ours + "self_attn.out_proj.{p}"),
    ]  # fmt: skip


_SHARED = [
    # Swin
    ("backbone.patch_embed.proj.{p}", _ENCODER + "embeddings.patch_embeddings.projection.{p}"),
    ("backbone.patch_embed.norm.{p}", _ENCODER + "embeddings.norm.{p}"),
    (_POSITION_MAP, _ENCODER + "embeddings.position_embeddings"),
    (_THEIR_BLOCK + "attn.relative_position_index", None),
    (_THEIR_BLOCK + _BIAS_TABLE, _BLOCK + "attention.self.relative_position_bias_table"),
    (_THEIR_BLOCK + "attn.qkv.{p}",
     tuple(f"{_BLOCK}attention.self.{part}.{{p}}" for part in ("query", "key", "value"))),
    (_THEIR_BLOCK + "attn.proj.{p}", _BLOCK + "attention.output.dense.{p}"),
    (_THEIR_BLOCK + "norm1.{p}", _BLOCK + "layernorm_before.{p}"),
    (_THEIR_BLOCK + "norm2.{p}", _BLOCK + "layernorm_after.{p}"),
    (_THEIR_BLOCK + "mlp.fc1.{p}", _BLOCK + "intermediate.dense.{p}"),
    (_THEIR_BLOCK + "mlp.fc2.{p}", _BLOCK + "output.dense.{p}"),
    ("backbone.layers.{i}.downsample.norm.{p}", _ENCODER + "encoder.layers.{i}.downsample.norm.{p}"),
    ("backbone.layers.{i}.downsample.reduction.{p}", _ENCODER + "encoder.layers.{i}.downsample.reduction.{p}"),
    *((f"backbone.norm{n}.{{p}}", f"{_ENCODER}hidden_states_norms.stage{n + 1}.{{p}}") for n in range(4)),
    (None, _ENCODER + "swin.layernorm.{p}"),  # transformers' SwinBackbone has it and does not use it
    # ResNet
    ("backbone.stem.conv1.weight", _ENCODER + "embedder.embedder.convolution.weight"),
    ("backbone.stem.conv1.norm.{s}", _ENCODER + "embedder.embedder.normalization.{s}"),
    *_RESNET,
    # Pixel decoders
    (_THEIR_PIXELS + "input_proj.{i}.{j}.{p}", _PIXELS + "input_projections.{i}.{j}.{p}"),
    (_THEIR_PIXELS + "transformer.level_embed", _PIXELS + "level_embed"),
    (_THEIR_ENCODER_LAYER + "self_attn.{a}.{p}", _ENCODER_LAYER + "self_attn.{a}.{p}"),
    (_THEIR_ENCODER_LAYER + "norm1.{p}", _ENCODER_LAYER + "self_attn_layer_norm.{p}"),
    (_THEIR_ENCODER_LAYER + "norm2.{p}", _ENCODER_LAYER + "final_layer_norm.{p}"),
    (_THEIR_ENCODER_LAYER + "linear1.{p}", _ENCODER_LAYER + "fc1.{p}"),
    (_THEIR_ENCODER_LAYER + "linear2.{p}", _ENCODER_LAYER + "fc2.{p}"),
    *((f"{_THEIR_PIXELS}{part}_{{i}}.weight", f"{_PIXELS}{part}_{{i}}.0.weight") for part in ("adapter", "layer")),
    *((f"{_THEIR_PIXELS}{part}_{{i}}.norm.{{p}}", f"{_PIXELS}{part}_{{i}}.1.{{p}}") for part in ("adapter", "layer")),
    (_THEIR_PIXELS + "mask_features.{p}", _PIXELS + "mask_projection.{p}"),
    (_THEIR_PIXELS + "input_proj.{p}", _PIXELS + "input_projection.{p}"),
    *_detr_attention(_THEIR_ENCODER_LAYER, _ENCODER_LAYER),
    (_THEIR_PIXELS + "transformer.encoder.norm.{p}", _PIXELS + "encoder.layernorm.{p}"),
    # Both transformer decoders
    (_THEIR_QUERIES + "query_embed.weight", _QUERIES + "queries_embedder.weight"),
    (_THEIR_QUERIES + "mask_embed.layers.{i}.{p}", _QUERIES + "decoder.mask_predictor.mask_embedder.{i}.0.{p}"),
    (_THEIR_QUERIES + "class_embed.{p}", "class_predictor.{p}"),
    ("criterion.empty_weight", "criterion.empty_weight"),
]  # fmt: skip
_MASKED_DECODER = [
    (_THEIR_QUERIES + "query_feat.weight", _QUERIES + "queries_features.weight"),
    (_THEIR_QUERIES + "level_embed.weight", _QUERIES + "level_embed.weight"),
    (_THEIR_QUERIES + "input_proj.{i}.{p}", _QUERIES + "input_projections.{i}.{p}"),
    *((f"{_THEIR_QUERIES}transformer_cross_attention_layers.{{i}}.multihead_attn.{part}",
       f"{_DECODER_LAYER}cross_attn.{part}") for part in ("in_proj_weight", "in_proj_bias", "out_proj.{p}")),
    (_THEIR_QUERIES + "transformer_cross_attention_layers.{i}.norm.{p}",
     _DECODER_LAYER + "cross_attn_layer_norm.{p}"),
    *((f"{_THEIR_QUERIES}transformer_self_attention_layers.{{i}}.self_attn.in_proj_{kind}",
       tuple(f"{_DECODER_LAYER}self_attn.{part}_proj.{kind}" for part in "qkv")) for kind in ("weight", "bias")),
    (_THEIR_QUERIES + "transformer_self_attention_layers.{i}.self_attn.out_proj.{p}",
     _DECODER_LAYER + "self_attn.out_proj.{p}"),
    (_THEIR_QUERIES + "transformer_self_attention_layers.{i}.norm.{p}",
     _DECODER_LAYER + "self_attn_layer_norm.{p}"),
    (_THEIR_QUERIES + "transformer_ffn_layers.{i}.linear1.{p}", _DECODER_LAYER + "fc1.{p}"),
    (_THEIR_QUERIES + "transformer_ffn_layers.{i}.linear2.{p}", _DECODER_LAYER + "fc2.{p}"),
    (_THEIR_QUERIES + "transformer_ffn_layers.{i}.norm.{p}", _DECODER_LAYER + "final_layer_norm.{p}"),
    (_THEIR_QUERIES + "decoder_norm.{p}", _QUERIES + "decoder.layernorm.{p}"),
]  # fmt: skip
_THEIR_STANDARD_LAYER = _THEIR_QUERIES + "transformer.decoder.layers.{i}."
_THEIR_MEMORY_LAYER = _THEIR_QUERIES + "transformer.encoder.layers.{i}."
_MEMORY_LAYER = _QUERIES + "memory_encoder.layers.{i}."
_STANDARD_DECODER = [  # MaskFormer's, and what classifies pixels
    (_THEIR_QUERIES + "input_proj.{p}", _QUERIES + "input_projection.{p}"),
    *_detr_attention(_THEIR_MEMORY_LAYER, _MEMORY_LAYER),
    (_THEIR_MEMORY_LAYER + "norm1.{p}", _MEMORY_LAYER + "self_attn_layer_norm.{p}"),
    (_THEIR_MEMORY_LAYER + "norm2.{p}", _MEMORY_LAYER + "final_layer_norm.{p}"),
    *((f"{_THEIR_MEMORY_LAYER}linear{n}.{{p}}", f"{_MEMORY_LAYER}fc{n}.{{p}}") for n in (1, 2)),
    (_THEIR_QUERIES + "transformer.encoder.norm.{p}", _QUERIES + "memory_encoder.layernorm.{p}"),
    *_detr_attention(_THEIR_STANDARD_LAYER, _DECODER_LAYER),
    *((f"{_THEIR_STANDARD_LAYER}multihead_attn.{part}", f"{_DECODER_LAYER}cross_attn.{part}")
      for part in ("in_proj_weight", "in_proj_bias", "out_proj.{p}")),
    (_THEIR_STANDARD_LAYER + "norm1.{p}", _DECODER_LAYER + "self_attn_layer_norm.{p}"),
    (_THEIR_STANDARD_LAYER + "norm2.{p}", _DECODER_LAYER + "cross_attn_layer_norm.{p}"),
    (_THEIR_STANDARD_LAYER + "norm3.{p}", _DECODER_LAYER + "final_layer_norm.{p}"),
    *((f"{_THEIR_STANDARD_LAYER}linear{n}.{{p}}", f"{_DECODER_LAYER}fc{n}.{{p}}") for n in (1, 2)),
    (_THEIR_QUERIES + "transformer.decoder.norm.{p}", _QUERIES + "decoder.layernorm.{p}"),
    ("sem_seg_head.predictor.{p}", _QUERIES + "classifier.{p}"),
]  # fmt: skip
_SOURCE = "facebookresearch/Mask2Former"
TABLE = NameTable([*_SHARED, *_MASKED_DECODER], _SOURCE)
# A table of its own: a layer of either decoder has the same names here, and others there.
STANDARD_TABLE = NameTable([*_SHARED, *_STANDARD_DECODER], _SOURCE)


_OF_MASKED = (_THEIR_QUERIES + "query_feat.", _THEIR_QUERIES + "transformer_")


def current_name(name: str) -> str:
    """A name of an early checkpoint -> the name that the original's last version has; others unchanged.

    The original renames while it loads (`_load_from_state_dict` of its head and of its decoder): the pixel decoder's
    tensors had no `pixel_decoder.` in their names, and `query_feat` was `static_query`.
    """
    if name == "sem_seg_head.criterion.empty_weight":
        return "criterion.empty_weight"
    if name.startswith("sem_seg_head.") and not name.startswith((_THEIR_QUERIES, _THEIR_PIXELS)):
        return _THEIR_PIXELS + name.removeprefix("sem_seg_head.")
    return name.replace(_THEIR_QUERIES + "static_query", _THEIR_QUERIES + "query_feat")


def translate(name: str) -> str | tuple[str, ...] | None:
    """Name of the original -> name in transformers' files, three names for a joint matrix, or None if dropped.

    Raises:
        KeyError: for a name that is not in the table.
    """
    targets = TABLE.to_ours(current_name(name))
    return targets if len(targets) > 1 else targets[0]


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the original's names -> tensors as `from_pretrained` reads them from a file.

    Raises:
        CheckpointError: listing the names that are not in the table; nothing is dropped silently.
    """
    table = TABLE if any(name.startswith(_OF_MASKED) for name in map(current_name, state)) else STANDARD_TABLE
    converted, unknown = {}, []
    for name, tensor in state.items():
        try:
            targets = table.to_ours(current_name(name))
        except KeyError:
            unknown.append(name)
            continue
        if len(targets) > 1:  # query, key and value in one
            check_shape(name, tensor, tensor.ndim and len(tensor) % 3 == 0, "(3 C, ...)")
            converted |= dict(zip(targets, (part.contiguous() for part in tensor.chunk(3)), strict=True))
        elif name == _POSITION_MAP:  # (1, C, H, W) there, (1, H * W, C) here
            check_shape(name, tensor, tensor.ndim == 4, "(1, C, H, W)")
            converted[targets[0]] = tensor.flatten(2).transpose(1, 2).contiguous()
        elif targets[0] is not None:
            converted[targets[0]] = tensor
    if unknown:
        raise CheckpointError(
            f"no translation for {len(unknown)} tensors: {listed(unknown)}. The table knows {TABLE.source} with Swin "
            "or ResNet, its pixel decoders and its transformer decoders"
        )
    for name in [name for name in converted if name.endswith("normalization.running_var")]:
        # Counts how often batch statistics were updated; the original's frozen batch norm does not keep it.
        converted.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return converted


def restore_state_dict(state: Mapping[str, Tensor], frozen_batch_norm: bool) -> dict[str, Tensor]:
    """The way back: tensors under the names in transformers' files -> tensors under the original's names.

    Args:
        state: as in a checkpoint file.
        frozen_batch_norm: write the buffers of detectron2's FrozenBatchNorm2d, which has no `num_batches_tracked`.

    Raises:
        CheckpointError: listing the names that the original has no counterpart for (another backbone, for example).
    """
    table = TABLE if any(name.startswith(_QUERIES + "queries_features.") for name in state) else STANDARD_TABLE
    restored, parts, unknown = {}, {}, []
    for name, tensor in state.items():
        try:
            target, part, count = table.to_theirs(name)
        except KeyError:
            unknown.append(name)
            continue
        if target is None or (frozen_batch_norm and target.endswith("num_batches_tracked")):
            continue
        if count > 1:
            parts.setdefault(target, [None] * count)[part] = tensor
        elif target == _POSITION_MAP:
            side = round(tensor.shape[1] ** 0.5)
            restored[target] = tensor.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        else:
            restored[target] = tensor
        if target.endswith(_BIAS_TABLE):
            index = target.replace("bias_table", "index")
            restored[index] = relative_position_index((round(tensor.shape[0] ** 0.5) + 1) // 2)
    if unknown:
        raise CheckpointError(
            f"{TABLE.source} has no counterpart for {len(unknown)} tensors: {listed(unknown)}. Its backbones are Swin "
            "and ResNet"
        )
    return restored | {name: torch.cat(tensors) for name, tensors in parts.items()}


def relative_position_index(window: int) -> Tensor:
    """(window^2, window^2) int64: row of the bias table for query and key, the constant that Swin's files contain."""
    cell = torch.arange(window * window)
    rows, columns = cell // window, cell % window
    row_steps = rows[:, None] - rows[None, :] + window - 1  # 0 .. 2 * window - 2
    return row_steps * (2 * window - 1) + columns[:, None] - columns[None, :] + window - 1
