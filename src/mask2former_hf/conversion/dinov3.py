"""Meta's DINOv3 segmentor: a frozen ViT, an adapter and a wider Mask2Former head, from two files.

The head's file (`dinov3_vit7b16_ade20k_m2f_head-….pth`) has the adapter and the head; the ViT comes from a file of its
own, Meta's or transformers'. Names are those of facebookresearch/dinov3 at 6876159; none of its code is here.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import DINOv3ViTBackbone, DINOv3ViTConfig
from transformers.core_model_loading import revert_weight_conversion

from ..model.vit_adapter import NUM_MAPS, tapped_blocks
from .checkpoint_files import read_checkpoint
from .names import CheckpointError, NameTable, check_shape, listed

LICENCE = "dinov3-license"  # of Meta's weights and what is made of them; `hub.model_card` has its address
SLIDING_WINDOW = {"side": 896, "stride": 596}  # how the released head is tested, in pixels of the resized image
TEST_SIZE = {"shortest_edge": 896, "longest_edge": 2**15}  # the longer side has no bound there
_ADAPTER = "segmentation_model.0."
_HEAD = "segmentation_model.1."
_NECK = "model.pixel_level_module.neck."
_ENCODER = "model.pixel_level_module.encoder."

HEAD_PREFIXES = {  # Meta's name of a part of the head -> the original Mask2Former's; the others are equal
    "pixel_decoder.input_convs.": "pixel_decoder.input_proj.",
    "pixel_decoder.encoder.level_encoding": "pixel_decoder.transformer.level_embed",
    "pixel_decoder.encoder.encoder.": "pixel_decoder.transformer.encoder.",
    "pixel_decoder.lateral_convs.0.": "pixel_decoder.adapter_1.",
    "pixel_decoder.output_convs.0.": "pixel_decoder.layer_1.",
    "pixel_decoder.mask_feature.": "pixel_decoder.mask_features.",
    "predictor.post_norm.": "predictor.decoder_norm.",
}


def _kept(names: list[str]) -> list[tuple[str, str]]:
    return [(_ADAPTER + name, _NECK + name) for name in names]


def _extractor(place: str) -> list[str]:
    parts = ("query_norm", "feat_norm", "ffn_norm", "ffn.fc1", "ffn.dwconv.dwconv", "ffn.fc2")
    return [*(f"{place}.{part}.{{p}}" for part in parts), f"{place}.attn.{{a}}.{{p}}"]


ADAPTER = NameTable(
    _kept([
        *(f"spm.{part}.{{i}}.{{s}}" for part in ("stem", "conv2", "conv3", "conv4")),
        *(f"spm.fc{level}.{{p}}" for level in range(1, 5)),
        "level_embed",
        *_extractor("interactions.{i}.extractor"),
        *_extractor("interactions.{i}.extra_extractors.{j}"),
        "up.{p}",
        *(f"norm{level}.{{s}}" for level in range(1, 5)),
    ]),
    source="facebookresearch/dinov3",
)  # fmt: skip

_BLOCK, _LAYER = "blocks.{i}.", "layer.{i}."
VIT = NameTable([  # the ViT's own file -> transformers' file of a DINOv3ViTBackbone
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.{p}", "embeddings.patch_embeddings.{p}"),
    ("norm.{p}", "norm.{p}"),
    (_BLOCK + "norm1.{p}", _LAYER + "norm1.{p}"),
    (_BLOCK + "norm2.{p}", _LAYER + "norm2.{p}"),
    (_BLOCK + "attn.qkv.weight", tuple(f"{_LAYER}attention.{part}_proj.weight" for part in "qkv")),
    (_BLOCK + "attn.qkv.bias", (_LAYER + "attention.q_proj.bias", None, _LAYER + "attention.v_proj.bias")),
    (_BLOCK + "attn.qkv.bias_mask", None),  # zero for keys, whose bias changes no attention
    (_BLOCK + "attn.proj.{p}", _LAYER + "attention.o_proj.{p}"),
    (_BLOCK + "ls1.gamma", _LAYER + "layer_scale1.lambda1"),
    (_BLOCK + "ls2.gamma", _LAYER + "layer_scale2.lambda1"),
    (_BLOCK + "mlp.fc1.{p}", _LAYER + "mlp.up_proj.{p}"),
    (_BLOCK + "mlp.fc2.{p}", _LAYER + "mlp.down_proj.{p}"),
    (_BLOCK + "mlp.w1.{p}", _LAYER + "mlp.gate_proj.{p}"),
    (_BLOCK + "mlp.w2.{p}", _LAYER + "mlp.up_proj.{p}"),
    (_BLOCK + "mlp.w3.{p}", _LAYER + "mlp.down_proj.{p}"),
    ("rope_embed.periods", None),  # computed from the config
    ("local_cls_norm.{p}", None),  # of pre-training
], source="facebookresearch/dinov3")  # fmt: skip


def is_segmentor(names: list[str]) -> bool:
    return any(name.startswith(_HEAD) for name in names) and any(name.startswith(_ADAPTER) for name in names)


def head_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors under the names of the original Mask2Former."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(_HEAD):
            name = name.removeprefix(_HEAD)
            theirs = next((prefix for prefix in HEAD_PREFIXES if name.startswith(prefix)), "")
            state["sem_seg_head." + HEAD_PREFIXES.get(theirs, "") + name.removeprefix(theirs)] = tensor
    return state


def adapter_to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors under our names.

    Raises:
        CheckpointError: for names that the table does not have.
    """
    return _translated(ADAPTER, {name: x for name, x in tensors.items() if name.startswith(_ADAPTER)})


def read_vit(source: str | os.PathLike) -> tuple[DINOv3ViTConfig, dict[str, Tensor]]:
    """Config and tensors, under our names, of a DINOv3 ViT.

    Args:
        source: folder or Hub id of transformers', or Meta's file. A folder's four maps are kept if it names four;
            otherwise they are those of Meta's segmentors.

    Raises:
        CheckpointError: for something else, or a ViT with tensors missing or too many.
    """
    if Path(source).is_file():
        tensors = {name.removeprefix(_ADAPTER + "backbone."): x for name, x in read_checkpoint(source).tensors.items()}
        config = infer_vit(tensors)
        state = _translated(
            VIT, {name: x for name, x in tensors.items() if not name.startswith("segmentation_model.")}
        )
        state["embeddings.mask_token"] = state["embeddings.mask_token"].reshape(1, 1, -1)
    else:
        try:
            backbone, report = DINOv3ViTBackbone.from_pretrained(source, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"--vit {source}: no DINOv3 ViT of transformers ({error})") from error
        if backbone.config.model_type != "dinov3_vit" or report["missing_keys"]:
            missing = listed(sorted(report["missing_keys"]), 3)
            raise CheckpointError(f"--vit {source}: a {backbone.config.model_type} that lacks {missing}")
        config, state = backbone.config, revert_weight_conversion(backbone, backbone.state_dict())
    if len(config.out_features) != NUM_MAPS:
        config.out_features = [config.stage_names[block] for block in tapped_blocks(config.num_hidden_layers)]
    return config, {_ENCODER + name: tensor for name, tensor in state.items()}


def infer_vit(tensors: Mapping[str, Tensor]) -> DINOv3ViTConfig:
    """The config of a ViT under Meta's names; heads by the number of frequencies, which is a quarter of their width.

    Raises:
        CheckpointError: if a tensor that decides is not there.
    """
    needed = ("cls_token", "storage_tokens", "patch_embed.proj.weight", "rope_embed.periods", "blocks.0.norm1.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise CheckpointError(f"--vit: {listed(missing)} missing: not the file of a DINOv3 ViT of Meta")
    width = tensors["cls_token"].shape[-1]
    gated = "blocks.0.mlp.w1.weight" in tensors
    first = tensors["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"]
    return DINOv3ViTConfig(
        hidden_size=width,
        intermediate_size=first.shape[0],
        num_hidden_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_attention_heads=width // (4 * len(tensors["rope_embed.periods"])),
        num_register_tokens=tensors["storage_tokens"].shape[1],
        patch_size=tensors["patch_embed.proj.weight"].shape[-1],
        query_bias="blocks.0.attn.qkv.bias" in tensors,
        value_bias="blocks.0.attn.qkv.bias" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        mlp_bias="blocks.0.mlp.w1.bias" in tensors if gated else "blocks.0.mlp.fc1.bias" in tensors,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )


def _translated(table: NameTable, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names on the table's right side; a joint matrix in its parts."""
    translated, unknown = {}, []
    for name, tensor in tensors.items():
        try:
            targets = table.to_ours(name)
        except KeyError:
            unknown.append(name)
            continue
        if len(targets) > 1:
            check_shape(name, tensor, tensor.ndim and len(tensor) % len(targets) == 0, "(3 C, ...)")
        parts = tensor.chunk(len(targets)) if len(targets) > 1 else [tensor]
        translated |= {
            target: part.contiguous() for target, part in zip(targets, parts, strict=True) if target is not None
        }
    if unknown:
        raise CheckpointError(f"no translation for {len(unknown)} tensors of {table.source}: {listed(unknown)}")
    return translated
