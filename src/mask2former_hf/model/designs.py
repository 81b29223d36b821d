"""The one place where a config's design becomes parts: pixel decoder, transformer decoder, class head, loss.

The paper's own are `pixel_decoder`, `transformer_decoder` and `criterion`; what it compares them with is in
`fpn_decoders`, `standard_decoder` and `per_pixel_head`. `design_rules` says which go together.
"""

from torch import nn

from .configuration_mask2former import Mask2FormerConfig
from .criterion import LossSettings, Mask2FormerLoss
from .design_rules import BACKBONE_MAPS, classifies_pixels
from .fpn_decoders import DetrEncoder, FPNPixelDecoder
from .per_pixel_head import CertainClasses, PerPixelClassifier, PerPixelLoss
from .pixel_decoder import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoder,
    Mask2FormerPixelDecoderEncoderLayer,
)
from .standard_decoder import StandardTransformerModule


def make_pixel_decoder(config: Mask2FormerConfig, backbone_channels: list[int]) -> nn.Module:
    sizes = config.feature_size, config.num_attention_heads, config.encoder_feedforward_dim, config.dropout
    if config.pixel_decoder_type == "deformable":
        layers = [Mask2FormerPixelDecoderEncoderLayer(*sizes) for _ in range(config.encoder_layers)]
        encoder = Mask2FormerPixelDecoderEncoder(layers, config)
        return Mask2FormerPixelDecoder(
            backbone_channels, config.feature_size, config.mask_feature_size, config.common_stride, encoder
        )
    with_encoder = config.pixel_decoder_type == "transformer_fpn"
    encoder = DetrEncoder(config.encoder_layers, *sizes, config.pre_norm) if with_encoder else None
    return FPNPixelDecoder(backbone_channels, config.feature_size, config.mask_feature_size, encoder)


def make_transformer(
    config: Mask2FormerConfig, backbone_channels: list[int], masked_class: type[nn.Module]
) -> nn.Module:
    """What makes states of queries out of maps.

    Args:
        backbone_channels: of the backbone's four maps, finest first.
        masked_class: the masked decoder's, of images or of clips.
    """
    if config.head_type == "per_pixel":
        return PerPixelClassifier(config.num_labels, config.mask_feature_size)
    if config.decoder_type == "standard":
        channels = dict(zip(BACKBONE_MAPS, backbone_channels, strict=True))
        channels |= {"transformer_encoder": config.feature_size, "pixel_embedding": config.mask_feature_size}
        return StandardTransformerModule(config, channels[config.transformer_in_feature])
    return masked_class(config)


def make_head(config: Mask2FormerConfig, criterion_class: type[Mask2FormerLoss]) -> tuple[nn.Module, nn.Module]:
    """What says the classes of queries, and the loss."""
    settings = LossSettings.from_config(config)
    if classifies_pixels(config):
        return CertainClasses(config.num_labels), PerPixelLoss(settings)
    return nn.Linear(config.hidden_dim, config.num_labels + 1), criterion_class(settings)
