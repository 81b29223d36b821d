"""Parameter names of mmdetection's Mask2Former (`panoptic_head`), versions 2 and 3, to those of the original.

Sources: open-mmlab/mmdetection, in `models/`: `dense_heads/mask2former_head.py`, `layers/transformer/`,
`layers/msdeformattn_pixel_decoder.py`, `backbones/swin.py` and `resnet.py`; open-mmlab/mmcv, in `cnn/bricks/`:
`transformer.py` (FFN, attention). The layers of version 3 have `self_attn`, `cross_attn` and `ffn`, those of version 2
numbered lists.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .names import CheckpointError, NameTable, check_shape, listed

_HEAD = "panoptic_head."
_ENCODER_LAYER = _HEAD + "pixel_decoder.encoder.layers.{i}."
_DECODER_LAYER = _HEAD + "transformer_decoder.layers.{i}."
_BLOCK = "backbone.stages.{i}.blocks.{j}."
_THEIR_PIXELS = "sem_seg_head.pixel_decoder."
_THEIR_QUERIES = "sem_seg_head.predictor."
_THEIR_ENCODER_LAYER = _THEIR_PIXELS + "transformer.encoder.layers.{i}."
_THEIR_BLOCK = "backbone.layers.{i}.blocks.{j}."
_ATTENTION_PARTS = ("in_proj_weight", "in_proj_bias", "out_proj.{p}")

_RESNET = [
    row
    for stage in range(4)
    for row in (
        *((f"backbone.layer{stage + 1}.{{i}}.conv{n}.weight", f"backbone.res{stage + 2}.{{i}}.conv{n}.weight")
          for n in (1, 2, 3)),
        *((f"backbone.layer{stage + 1}.{{i}}.bn{n}.{{s}}", f"backbone.res{stage + 2}.{{i}}.conv{n}.norm.{{s}}")
          for n in (1, 2, 3)),
        (f"backbone.layer{stage + 1}.{{i}}.downsample.0.weight", f"backbone.res{stage + 2}.{{i}}.shortcut.weight"),
        (f"backbone.layer{stage + 1}.{{i}}.downsample.1.{{s}}", f"backbone.res{stage + 2}.{{i}}.shortcut.norm.{{s}}"),
    )
]  # fmt: skip

TABLE = NameTable([
    # Swin
    ("backbone.patch_embed.projection.{p}", "backbone.patch_embed.proj.{p}"),
    ("backbone.patch_embed.norm.{p}", "backbone.patch_embed.norm.{p}"),
    ("backbone.absolute_pos_embed", "backbone.absolute_pos_embed"),
    (_BLOCK + "attn.w_msa.relative_position_index", None),
    (_BLOCK + "attn.w_msa.relative_position_bias_table", _THEIR_BLOCK + "attn.relative_position_bias_table"),
    (_BLOCK + "attn.w_msa.qkv.{p}", _THEIR_BLOCK + "attn.qkv.{p}"),
    (_BLOCK + "attn.w_msa.proj.{p}", _THEIR_BLOCK + "attn.proj.{p}"),
    (_BLOCK + "norm1.{p}", _THEIR_BLOCK + "norm1.{p}"),
    (_BLOCK + "norm2.{p}", _THEIR_BLOCK + "norm2.{p}"),
    (_BLOCK + "ffn.layers.0.0.{p}", _THEIR_BLOCK + "mlp.fc1.{p}"),
    (_BLOCK + "ffn.layers.1.{p}", _THEIR_BLOCK + "mlp.fc2.{p}"),
    ("backbone.stages.{i}.downsample.norm.{p}", "backbone.layers.{i}.downsample.norm.{p}"),
    ("backbone.stages.{i}.downsample.reduction.{p}", "backbone.layers.{i}.downsample.reduction.{p}"),
    *((f"backbone.norm{n}.{{p}}", f"backbone.norm{n}.{{p}}") for n in range(4)),
    # ResNet
    ("backbone.conv1.weight", "backbone.stem.conv1.weight"),
    ("backbone.bn1.{s}", "backbone.stem.conv1.norm.{s}"),
    *_RESNET,
    # Pixel decoder
    (_HEAD + "pixel_decoder.input_convs.{i}.conv.{p}", _THEIR_PIXELS + "input_proj.{i}.0.{p}"),
    (_HEAD + "pixel_decoder.input_convs.{i}.gn.{p}", _THEIR_PIXELS + "input_proj.{i}.1.{p}"),
    (_HEAD + "pixel_decoder.level_encoding.weight", _THEIR_PIXELS + "transformer.level_embed"),
    (_ENCODER_LAYER + "self_attn.{a}.{p}", _THEIR_ENCODER_LAYER + "self_attn.{a}.{p}"),
    (_ENCODER_LAYER + "attentions.0.{a}.{p}", _THEIR_ENCODER_LAYER + "self_attn.{a}.{p}"),
    *((f"{_ENCODER_LAYER}{ffn}.layers.0.0.{{p}}", _THEIR_ENCODER_LAYER + "linear1.{p}") for ffn in ("ffn", "ffns.0")),
    *((f"{_ENCODER_LAYER}{ffn}.layers.1.{{p}}", _THEIR_ENCODER_LAYER + "linear2.{p}") for ffn in ("ffn", "ffns.0")),
    (_ENCODER_LAYER + "norms.0.{p}", _THEIR_ENCODER_LAYER + "norm1.{p}"),
    (_ENCODER_LAYER + "norms.1.{p}", _THEIR_ENCODER_LAYER + "norm2.{p}"),
    (_HEAD + "pixel_decoder.lateral_convs.0.conv.weight", _THEIR_PIXELS + "adapter_1.weight"),
    (_HEAD + "pixel_decoder.lateral_convs.0.gn.{p}", _THEIR_PIXELS + "adapter_1.norm.{p}"),
    (_HEAD + "pixel_decoder.output_convs.0.conv.weight", _THEIR_PIXELS + "layer_1.weight"),
    (_HEAD + "pixel_decoder.output_convs.0.gn.{p}", _THEIR_PIXELS + "layer_1.norm.{p}"),
    (_HEAD + "pixel_decoder.mask_feature.{p}", _THEIR_PIXELS + "mask_features.{p}"),
    # Transformer decoder: masked attention comes first, so it has the first norm and in version 2 the first number
    (_HEAD + "query_feat.weight", _THEIR_QUERIES + "query_feat.weight"),
    (_HEAD + "query_embed.weight", _THEIR_QUERIES + "query_embed.weight"),
    (_HEAD + "level_embed.weight", _THEIR_QUERIES + "level_embed.weight"),
    (_HEAD + "decoder_input_projs.{i}.{p}", _THEIR_QUERIES + "input_proj.{i}.{p}"),
    *((f"{_DECODER_LAYER}{block}.attn.{part}",
       f"{_THEIR_QUERIES}transformer_cross_attention_layers.{{i}}.multihead_attn.{part}")
      for block in ("cross_attn", "attentions.0") for part in _ATTENTION_PARTS),
    (_DECODER_LAYER + "norms.0.{p}", _THEIR_QUERIES + "transformer_cross_attention_layers.{i}.norm.{p}"),
    *((f"{_DECODER_LAYER}{block}.attn.{part}",
       f"{_THEIR_QUERIES}transformer_self_attention_layers.{{i}}.self_attn.{part}")
      for block in ("self_attn", "attentions.1") for part in _ATTENTION_PARTS),
    (_DECODER_LAYER + "norms.1.{p}", _THEIR_QUERIES + "transformer_self_attention_layers.{i}.norm.{p}"),
    *((f"{_DECODER_LAYER}{ffn}.layers.0.0.{{p}}", _THEIR_QUERIES + "transformer_ffn_layers.{i}.linear1.{p}")
      for ffn in ("ffn", "ffns.0")),
    *((f"{_DECODER_LAYER}{ffn}.layers.1.{{p}}", _THEIR_QUERIES + "transformer_ffn_layers.{i}.linear2.{p}")
      for ffn in ("ffn", "ffns.0")),
    (_DECODER_LAYER + "norms.2.{p}", _THEIR_QUERIES + "transformer_ffn_layers.{i}.norm.{p}"),
    (_HEAD + "transformer_decoder.post_norm.{p}", _THEIR_QUERIES + "decoder_norm.{p}"),
    *((f"{_HEAD}mask_embed.{2 * n}.{{p}}", f"{_THEIR_QUERIES}mask_embed.layers.{n}.{{p}}") for n in range(3)),
    (_HEAD + "cls_embed.{p}", _THEIR_QUERIES + "class_embed.{p}"),
], source="mmdetection's Mask2Former")  # fmt: skip


def merge_order(tensor: Tensor) -> Tensor:
    """Put the 4 C inputs of a patch merging (last dimension) into the original's order.

    mmdetection collects the four neighbours with `nn.Unfold`: channel by channel, the neighbours in reading order
    (`PatchMerging` in `models/layers/transformer/utils.py`). The original concatenates whole maps, column by column.
    """
    by_channel = tensor.unflatten(-1, (-1, 4))  # (..., C, 4), neighbours (row, column): 00, 01, 10, 11
    return by_channel[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)  # 00, 10, 01, 11, C each


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under mmdetection's names -> tensors under the names of facebookresearch/Mask2Former.

    Raises:
        CheckpointError: listing the names that are not in the table; nothing is dropped silently.
    """
    converted, unknown = {}, []
    for name, tensor in state.items():
        try:
            (target,) = TABLE.to_ours(name)
        except KeyError:
            unknown.append(name)
            continue
        if target is None:
            continue
        if ".downsample." in target and target.startswith("backbone.layers."):
            check_shape(name, tensor, tensor.ndim and tensor.shape[-1] % 4 == 0, "(..., 4 C)")
            tensor = merge_order(tensor)
        elif target == "backbone.absolute_pos_embed" and tensor.ndim == 3:  # (1, H * W, C), there (1, C, H, W)
            side = round(tensor.shape[1] ** 0.5)
            check_shape(name, tensor, tensor.shape[1] == side**2, "(1, H * H, C)")
            tensor = tensor.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        converted[target] = tensor
    if unknown:
        raise CheckpointError(
            f"no translation for {len(unknown)} tensors: {listed(unknown)}. The table knows {TABLE.source} with "
            "SwinTransformer or ResNet and MSDeformAttnPixelDecoder"
        )
    classifier = converted.get(_THEIR_QUERIES + "class_embed.bias")
    if classifier is not None and classifier.ndim == 1 and len(classifier):
        # class_weight of loss_cls in mmdetection's configs; a list there, not a tensor of the file
        converted["criterion.empty_weight"] = torch.ones_like(classifier).index_fill_(
            0, torch.tensor(len(classifier) - 1), 0.1
        )
    return converted
