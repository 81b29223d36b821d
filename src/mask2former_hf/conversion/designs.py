"""Which of the compared designs a checkpoint of the original is, by its tensors and by its yaml."""

from collections.abc import Callable, Mapping

from ..model.design_rules import BACKBONE_MAPS
from .names import CheckpointError

_PIXELS = "sem_seg_head.pixel_decoder."
_QUERIES = "sem_seg_head.predictor."
_STANDARD_LAYER = _QUERIES + "transformer.decoder.layers."
PIXEL_DECODERS = {
    "MSDeformAttnPixelDecoder": "deformable",
    "BasePixelDecoder": "fpn",
    "TransformerEncoderPixelDecoder": "transformer_fpn",
}
DECODERS = {"MultiScaleMaskedTransformerDecoder": "masked", "StandardTransformerDecoder": "standard"}
HEADS = {
    "MaskFormerHead": "masks",
    "PerPixelBaselineHead": "per_pixel",
    "PerPixelBaselinePlusHead": "per_pixel_plus",
}
# MaskFormer's own code has one transformer decoder, no name for it, and the loss of whole masks with these weights.
MASKFORMER = {
    "decoder_type": "standard",
    "dropout": 0.1,
    "class_weight": 1.0,
    "mask_weight": 20.0,
    "dice_weight": 1.0,
    "mask_loss": "focal",
    "matching_on": "masks",
    "loss_on": "masks",
}


def design_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The three types, by the names of tensors."""
    types = {"pixel_decoder_type": "deformable", "decoder_type": "masked", "head_type": "masks"}
    if _PIXELS + "layer_4.weight" in shapes:
        types["pixel_decoder_type"] = "transformer_fpn" if _PIXELS + "input_proj.weight" in shapes else "fpn"
    if _QUERIES + "weight" in shapes:
        types["head_type"] = "per_pixel"
    elif any(name.startswith(_STANDARD_LAYER) for name in shapes):
        types["decoder_type"] = "standard"
        if _QUERIES + "class_embed.weight" not in shapes:
            types["head_type"] = "per_pixel_plus"
    return types


def pixel_decoder_fields(types: Mapping[str, str], shape: Callable, count: Callable) -> dict:
    """Fields of `Mask2FormerConfig`; `shape(name, dimensions)` reads a tensor's, `count(template)` numbers names."""
    kind = types["pixel_decoder_type"]
    first = "input_proj.0.0.weight" if kind == "deformable" else "layer_4.weight"
    fields = {
        "feature_size": shape(_PIXELS + first, 4)[0],
        "mask_feature_size": shape(_PIXELS + "mask_features.weight", 4)[0],
    }
    if kind != "fpn":
        fields["encoder_layers"] = count(_PIXELS + "transformer.encoder.layers.{}.")
        if kind == "deformable" or fields["encoder_layers"]:
            fields["encoder_feedforward_dim"] = shape(_PIXELS + "transformer.encoder.layers.0.linear1.weight", 2)[0]
    return fields


def standard_decoder_fields(shapes: Mapping, shape: Callable, count: Callable, channels: Mapping) -> tuple[dict, dict]:
    """Fields that tensors show, and `transformer_in_feature`, which is a guess by channels where it is not visible.

    Args:
        channels: of every map that the decoder may take, by name.
    """
    queries, hidden = shape(_QUERIES + "query_embed.weight", 2)
    fields = {
        "num_queries": queries,
        "hidden_dim": hidden,
        "decoder_layers": count(_STANDARD_LAYER + "{}."),
        "memory_encoder_layers": count(_QUERIES + "transformer.encoder.layers.{}."),
        "dim_feedforward": shape(_STANDARD_LAYER + "0.linear1.weight", 2)[0],
    }
    projected = _QUERIES + "input_proj.weight" in shapes
    in_channels = shape(_QUERIES + "input_proj.weight", 4)[1] if projected else hidden
    if projected and in_channels == hidden:
        fields["enforce_input_projection"] = True
    likely = [name for name in ("res5", "transformer_encoder", "pixel_embedding", *BACKBONE_MAPS) if name in channels]
    guess = next((name for name in likely if channels[name] == in_channels), None)
    if guess is None:
        raise CheckpointError(
            f"the transformer decoder takes a map of {in_channels} channels; there is none: {channels}"
        )
    return fields, {"transformer_in_feature": guess}


def design_of_yaml(path, model: dict) -> tuple[dict, dict]:
    """Fields that a yaml's `MODEL` fixes by the names of its parts: those that its own numbers change, and the others.

    Raises:
        CheckpointError: for a part that is not converted.
    """
    head, former = model.get("SEM_SEG_HEAD", {}), model.get("MASK_FORMER", {})
    decoder = former.get("TRANSFORMER_DECODER_NAME")
    parts = {
        "SEM_SEG_HEAD.NAME": (head.get("NAME", "MaskFormerHead"), HEADS),
        "SEM_SEG_HEAD.PIXEL_DECODER_NAME": (head.get("PIXEL_DECODER_NAME"), PIXEL_DECODERS),
        "MASK_FORMER.TRANSFORMER_DECODER_NAME": (str(decoder).removeprefix("Video"), {**DECODERS, "None": "standard"}),
    }
    for key, (value, known) in parts.items():
        if value not in known:
            names = ", ".join(name for name in known if name != "None")
            raise CheckpointError(f"{path}: MODEL.{key} is {value!r}; what is converted is {names}")
    head_type, pixel_decoder_type, decoder_type = (known[value] for value, known in parts.values())
    fixed = {"pixel_decoder_type": pixel_decoder_type, "decoder_type": decoder_type, "head_type": head_type}
    if head_type != "masks":
        fixed["decoder_type"] = "standard" if head_type == "per_pixel_plus" else "masked"
        fixed |= {"num_queries": head.get("NUM_CLASSES"), "class_weight": float(head.get("LOSS_WEIGHT", 1.0))}
        fixed["task"] = "semantic"
    if fixed["decoder_type"] == "standard":
        fixed["transformer_in_feature"] = former.get("TRANSFORMER_IN_FEATURE", "res5")
        fixed["memory_encoder_layers"] = former.get("ENC_LAYERS", 0)
    return dict(MASKFORMER) if decoder is None and head_type == "masks" else {}, fixed
