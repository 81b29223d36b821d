"""The designs that the paper compares, as fields of the config: their values, and which of them go together.

Which combinations exist in the original was tried there, one by one; those that it cannot build are refused here, too.
The parts are chosen in `designs`.
"""

PIXEL_DECODERS = ("deformable", "fpn", "transformer_fpn")
DECODERS = ("masked", "standard")
HEADS = ("masks", "per_pixel", "per_pixel_plus")
BACKBONE_MAPS = ("res2", "res3", "res4", "res5")  # of the backbone, finest first
IN_FEATURES = (*BACKBONE_MAPS, "transformer_encoder", "pixel_embedding")
STRIDES = (32, 16, 8)  # of the pixel decoder's maps, in their order
COMPARED = ("points", "masks")


def _one_of(choices: tuple) -> tuple:
    return lambda value: value in choices, f"one of {', '.join(map(str, choices))}"


DESIGN_RULES = {  # what a field must be whatever the others are; none of them is in a file that does not use it
    "pixel_decoder_type": _one_of(PIXEL_DECODERS),
    "decoder_type": _one_of(DECODERS),
    "head_type": _one_of(HEADS),
    "transformer_in_feature": _one_of(IN_FEATURES),
    "memory_encoder_layers": (
        lambda value: type(value) is int and 0 <= value <= 1000,
        "a whole number from 0 to 1000",
    ),
    "masked_attention": (lambda value: isinstance(value, bool), "True or False"),
    "attended_stride": (lambda value: value in (None, *STRIDES), "one of 32, 16, 8, or None for all in turn"),
    "self_attention_first": (lambda value: isinstance(value, bool), "True or False"),
    "learned_query_features": (lambda value: isinstance(value, bool), "True or False"),
    "matching_on": _one_of(COMPARED),
    "loss_on": _one_of(COMPARED),
    "encoder_exits": (lambda value: isinstance(value, bool), "True or False"),
}
LOSS_FIELDS = ("matching_on", "loss_on")
ACTING = (*LOSS_FIELDS, "encoder_exits")  # in training, when they are changed; the others become modules
BUILT_IN_DESIGN = tuple(name for name in DESIGN_RULES if name not in ACTING)
_WITH_EXITS = {
    "pixel_decoder_type": "deformable",
    "decoder_type": "masked",
    "head_type": "masks",
    "use_auxiliary_loss": True,
}
_OF_STANDARD = ("transformer_in_feature", "memory_encoder_layers")
_OF_MASKED = ("masked_attention", "attended_stride", "self_attention_first", "learned_query_features")


def classifies_pixels(config) -> bool:
    """Whether the head says a class per pixel, by a config, ours or transformers', or by the settings of training."""
    return getattr(config, "head_type", None) in ("per_pixel", "per_pixel_plus")


def own_design(config) -> list[str]:
    """Fields, as `name=value`, by which the network is another than transformers' class makes of the same config."""
    usual = type(config)
    return [
        _said(config, name)
        for name in BUILT_IN_DESIGN
        if hasattr(usual, name) and getattr(config, name) != getattr(usual, name)
    ]


def check_design(config):
    """Refuse fields that do not go together.

    Raises:
        ValueError: naming the field, its value, and what to do.
    """
    usual = type(config)
    standard, of_pixels = config.decoder_type == "standard", config.head_type
    rules = []  # field, does it hold, the rule
    if config.encoder_exits:
        for name, needed in _WITH_EXITS.items():
            rule = f"left out with {_said(config, name)}: such a model cannot answer with fewer layers"
            rules.append(("encoder_exits", getattr(config, name) == needed, rule))
        rules.append(("encoder_layers", config.encoder_layers > 1, "at least 2 with encoder_exits=True"))
    if config.pixel_decoder_type != "deformable":
        rules.append(("common_stride", config.common_stride == 4, f"4 with {_said(config, 'pixel_decoder_type')}"))
    if of_pixels == "per_pixel":
        rules.append(("decoder_type", not standard, f"left out with {_said(config, 'head_type')}, which has none"))
    if of_pixels == "per_pixel_plus":
        rules.append(("decoder_type", standard, f"'standard' with {_said(config, 'head_type')}, as in the original"))
    unread = () if standard else _OF_STANDARD
    if standard or of_pixels == "per_pixel":
        unread = (*unread, *_OF_MASKED)
    if of_pixels != "masks":
        unread = (*unread, *LOSS_FIELDS)
    for name in unread:
        rule = f"left out with {_said(config, 'decoder_type')} and {_said(config, 'head_type')}, which do not read it"
        rules.append((name, getattr(config, name) == getattr(usual, name), rule))
    source = config.transformer_in_feature
    if standard and config.pixel_decoder_type == "fpn":
        rules.append(
            ("transformer_in_feature", source != "transformer_encoder", "a map of the backbone: 'fpn' has no encoder")
        )
    if of_pixels == "per_pixel_plus":
        rule = "a map of the backbone or 'transformer_encoder' with head_type='per_pixel_plus', as in the original"
        rules.append(("transformer_in_feature", source != "pixel_embedding", rule))
    if of_pixels != "masks":
        count = f"num_labels={config.num_labels} with {_said(config, 'head_type')}: every class is a query of its own"
        rules.append(("num_queries", config.num_queries == config.num_labels, count))
        semantic = f"'semantic' or None with {_said(config, 'head_type')}, which knows no segments"
        rules.append(("task", config.task in (None, "semantic"), semantic))
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name}={getattr(config, name)!r}: must be {rule}")


def _said(config, name: str) -> str:
    return f"{name}={getattr(config, name)!r}"
