"""Parameter names of facebookresearch/Mask2Former and of transformers' checkpoint files.

One table, read top to bottom; the first pattern that matches a name decides. `None` drops a tensor on purpose: it is a
constant that the module computes itself.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_ENCODER = "model.pixel_level_module.encoder."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_THEIR_PIXELS = r"sem_seg_head\.pixel_decoder\."
_THEIR_QUERIES = r"sem_seg_head\.predictor\."
_BLOCK = rf"{_ENCODER}encoder.layers.\1.blocks.\2."
_ENCODER_LAYER = rf"{_PIXELS}encoder.layers.\1."
_DECODER_LAYER = rf"{_QUERIES}decoder.layers.\1."

_BOTTLENECK = {"conv1": "layer.0", "conv2": "layer.1", "conv3": "layer.2", "shortcut": "shortcut"}

# Original name (a regular expression for the whole name) -> name in transformers' files. A tuple of three names splits
# a joint query, key and value matrix along its rows.
TABLE = [
    # Swin
    (r"backbone\.patch_embed\.proj\.(.+)", rf"{_ENCODER}embeddings.patch_embeddings.projection.\1"),
    (r"backbone\.patch_embed\.norm\.(.+)", rf"{_ENCODER}embeddings.norm.\1"),
    (r"backbone\.absolute_pos_embed", rf"{_ENCODER}embeddings.position_embeddings"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_index", None),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table",
     rf"{_BLOCK}attention.self.relative_position_bias_table"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.(.+)",
     tuple(rf"{_BLOCK}attention.self.{part}.\3" for part in ("query", "key", "value"))),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.(.+)", rf"{_BLOCK}attention.output.dense.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.norm1\.(.+)", rf"{_BLOCK}layernorm_before.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.norm2\.(.+)", rf"{_BLOCK}layernorm_after.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.(.+)", rf"{_BLOCK}intermediate.dense.\3"),
    (r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.(.+)", rf"{_BLOCK}output.dense.\3"),
    (r"backbone\.layers\.(\d+)\.downsample\.(.+)", rf"{_ENCODER}encoder.layers.\1.downsample.\2"),
    (r"backbone\.norm0\.(.+)", rf"{_ENCODER}hidden_states_norms.stage1.\1"),
    (r"backbone\.norm1\.(.+)", rf"{_ENCODER}hidden_states_norms.stage2.\1"),
    (r"backbone\.norm2\.(.+)", rf"{_ENCODER}hidden_states_norms.stage3.\1"),
    (r"backbone\.norm3\.(.+)", rf"{_ENCODER}hidden_states_norms.stage4.\1"),
    # ResNet: stages are res2 .. res5 there and 0 .. 3 here, convolutions conv1 .. conv3 there and 0 .. 2 here
    (r"backbone\.stem\.conv1\.weight", rf"{_ENCODER}embedder.embedder.convolution.weight"),
    (r"backbone\.stem\.conv1\.norm\.(.+)", rf"{_ENCODER}embedder.embedder.normalization.\1"),
    *(
        (rf"backbone\.res{stage + 2}\.(\d+)\.{theirs}\.{kind}",
         rf"{_ENCODER}encoder.stages.{stage}.layers.\1.{ours}.{target}")
        for stage in range(4)
        for theirs, ours in _BOTTLENECK.items()
        for kind, target in (("weight", "convolution.weight"), (r"norm\.(.+)", r"normalization.\2"))
    ),
    # Pixel decoder
    (rf"{_THEIR_PIXELS}input_proj\.(\d)\.(.+)", rf"{_PIXELS}input_projections.\1.\2"),
    (rf"{_THEIR_PIXELS}transformer\.level_embed", rf"{_PIXELS}level_embed"),
    (rf"{_THEIR_PIXELS}transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)",
     rf"{_ENCODER_LAYER}self_attn.\2"),
    (rf"{_THEIR_PIXELS}transformer\.encoder\.layers\.(\d+)\.norm1\.(.+)",
     rf"{_ENCODER_LAYER}self_attn_layer_norm.\2"),
    (rf"{_THEIR_PIXELS}transformer\.encoder\.layers\.(\d+)\.norm2\.(.+)",
     rf"{_ENCODER_LAYER}final_layer_norm.\2"),
    (rf"{_THEIR_PIXELS}transformer\.encoder\.layers\.(\d+)\.linear(\d)\.(.+)", rf"{_ENCODER_LAYER}fc\2.\3"),
    (rf"{_THEIR_PIXELS}(adapter_1|layer_1)\.weight", rf"{_PIXELS}\1.0.weight"),
    (rf"{_THEIR_PIXELS}(adapter_1|layer_1)\.norm\.(.+)", rf"{_PIXELS}\1.1.\2"),
    (rf"{_THEIR_PIXELS}mask_features\.(.+)", rf"{_PIXELS}mask_projection.\1"),
    # Transformer decoder; static_query is query_feat in early checkpoints
    (rf"{_THEIR_QUERIES}(?:query_feat|static_query)\.weight", rf"{_QUERIES}queries_features.weight"),
    (rf"{_THEIR_QUERIES}query_embed\.weight", rf"{_QUERIES}queries_embedder.weight"),
    (rf"{_THEIR_QUERIES}level_embed\.weight", rf"{_QUERIES}level_embed.weight"),
    (rf"{_THEIR_QUERIES}input_proj\.(\d)\.(.+)", rf"{_QUERIES}input_projections.\1.\2"),
    (rf"{_THEIR_QUERIES}transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
     rf"{_DECODER_LAYER}cross_attn.\2"),
    (rf"{_THEIR_QUERIES}transformer_cross_attention_layers\.(\d+)\.norm\.(.+)",
     rf"{_DECODER_LAYER}cross_attn_layer_norm.\2"),
    (rf"{_THEIR_QUERIES}transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_(weight|bias)",
     tuple(rf"{_DECODER_LAYER}self_attn.{part}_proj.\2" for part in "qkv")),
    (rf"{_THEIR_QUERIES}transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.(.+)",
     rf"{_DECODER_LAYER}self_attn.out_proj.\2"),
    (rf"{_THEIR_QUERIES}transformer_self_attention_layers\.(\d+)\.norm\.(.+)",
     rf"{_DECODER_LAYER}self_attn_layer_norm.\2"),
    (rf"{_THEIR_QUERIES}transformer_ffn_layers\.(\d+)\.linear(\d)\.(.+)", rf"{_DECODER_LAYER}fc\2.\3"),
    (rf"{_THEIR_QUERIES}transformer_ffn_layers\.(\d+)\.norm\.(.+)", rf"{_DECODER_LAYER}final_layer_norm.\2"),
    (rf"{_THEIR_QUERIES}decoder_norm\.(.+)", rf"{_QUERIES}decoder.layernorm.\1"),
    (rf"{_THEIR_QUERIES}mask_embed\.layers\.(\d)\.(.+)",
     rf"{_QUERIES}decoder.mask_predictor.mask_embedder.\1.0.\2"),
    (rf"{_THEIR_QUERIES}class_embed\.(.+)", r"class_predictor.\1"),
    (r"(?:sem_seg_head\.)?criterion\.empty_weight", r"criterion.empty_weight"),
]  # fmt: skip


def translate(name: str) -> str | tuple[str, str, str] | None:
    """Name of the original -> name in transformers' files, three names for a joint matrix, or None if dropped.

    Raises:
        KeyError: for a name that is not in the table.
    """
    for pattern, target in TABLE:
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        if isinstance(target, tuple):
            return tuple(match.expand(part) for part in target)
        return None if target is None else match.expand(target)
    raise KeyError(f"{name!r} is not a parameter of facebookresearch/Mask2Former that this table knows")


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the original's names -> tensors as `from_pretrained` reads them from a file.

    Raises:
        KeyError: listing the names that are not in the table; nothing is dropped silently.
    """
    converted, unknown = {}, []
    for name, tensor in state.items():
        try:
            target = translate(name)
        except KeyError:
            unknown.append(name)
            continue
        if isinstance(target, tuple):
            converted |= dict(zip(target, (part.contiguous() for part in tensor.chunk(3)), strict=True))
        elif target is not None:
            is_position_map = name == "backbone.absolute_pos_embed"  # (1, C, H, W) there, (1, H * W, C) here
            converted[target] = tensor.flatten(2).transpose(1, 2).contiguous() if is_position_map else tensor
    if unknown:
        raise KeyError(f"No translation for {unknown}: is this a checkpoint of facebookresearch/Mask2Former?")
    for name in [name for name in converted if name.endswith("normalization.running_var")]:
        # Counts how often batch statistics were updated; the original's frozen batch norm does not keep it.
        converted.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return converted
