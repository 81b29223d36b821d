"""Pixel decoder: deformable attention over the backbone's feature maps (section 3.2; Deformable DETR, section 4).

Letters: B batch, C channels, S = sum of H * W over the three levels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import feature_maps, make_backbone, rest_frozen
from .configuration_mask2former import Mask2FormerConfig
from .cpu_layout import (
    ConvolutionNorm,
    channels_last_on_cpu,
    hooked,
    in_blocks,
    map_of,
    plain,
    tokens_of,
)
from .deformable_attention import MultiScaleDeformableAttention, cell_centres
from .design_rules import BACKBONE_MAPS, STRIDES
from .feed_forward import FeedForward
from .layer_norms import norm_of_sum
from .onednn import feed_forward, linear, records_eagerly
from .pointwise_convolution import PointwiseConvolution

NUM_LEVELS = 3  # strides 32, 16, 8, in this order everywhere
NUM_POINTS = 4  # samples per query, head and level in the pixel decoder


def sine_axis(length: int, features: int, device: torch.device) -> Tensor:
    """(length, features) float32: sines and cosines in turn of positions along one axis, normalised to 2 pi."""
    exponent = torch.arange(features, device=device).div(2, rounding_mode="floor") * 2 / features
    frequency = 10000**exponent
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    phase = (position / (length + 1e-6) * (2 * math.pi)).unsqueeze(1) / frequency  # (length, features)
    return torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), dim=2).flatten(1)


def sine_position_embedding(size: tuple[int, int], channels: int, device: torch.device) -> Tensor:
    """(H * W, channels) float32: sines of y, then of x, normalised to 2 pi (DETR, appendix A.4).

    The two axes do not mix, so only H + W rows are computed.
    """
    features = channels // 2
    H, W = size
    rows, columns = (sine_axis(length, features, device) for length in size)
    return torch.cat(
        (rows.unsqueeze(1).expand(H, W, features), columns.unsqueeze(0).expand(H, W, features)), dim=2
    ).flatten(0, 1)


class Mask2FormerPixelDecoderEncoderLayer(GradientCheckpointingLayer):
    """Deformable attention and a feed-forward block, each with residual and layer norm after it."""

    def __init__(self, channels: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(channels, num_heads, NUM_LEVELS, NUM_POINTS)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, feedforward_dim)
        self.fc2 = nn.Linear(feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, positions: Tensor, reference_points: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        attended = self.self_attn(x + positions.to(x.dtype), x, reference_points, spatial_shapes)
        x = norm_of_sum(self.self_attn_layer_norm, x, self.dropout(attended))
        rows = x.flatten(0, 1)
        if records_eagerly(rows) and self._is_plain():
            layers = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            fed = FeedForward.apply(rows, None, None, *layers, ("relu", 0.0, 1.0, True))
            return self.final_layer_norm(fed.view_as(x))
        update = feed_forward(self.fc1, self.fc2, rows, "relu") if self._is_plain() else None
        if update is not None:
            return norm_of_sum(self.final_layer_norm, x, update.view_as(x))
        # On rows, because a linear layer's output in three dimensions is a view, and autograd copies a view that is
        # changed in place.
        update = in_blocks(self.feed_forward, rows, self.fc1.out_features)
        return norm_of_sum(self.final_layer_norm, x, update.view_as(x))

    def _is_plain(self) -> bool:
        """Whether the feed-forward block's parts are what they were built as."""
        parts = (self.fc1, self.fc2)
        return (
            not (self.training and self.dropout.p)
            and all(type(part) is nn.Linear and plain(part.weight, part.bias) for part in parts)
            and not any(hooked(part) for part in (*parts, self.dropout))
        )

    def feed_forward(self, rows: Tensor) -> Tensor:
        hidden = self.dropout(linear(self.fc1, rows, then="relu"))
        return self.dropout(linear(self.fc2, hidden))


class Mask2FormerPixelDecoderEncoder(nn.Module):
    """Layers one after the other; with `encoder_exits` of the config training runs the first ones now and then."""

    def __init__(self, layers: list[nn.Module], config: Mask2FormerConfig):
        super().__init__()
        self.layers, self.config = nn.ModuleList(layers), config

    def forward(self, x: Tensor, positions: Tensor, reference_points: Tensor, spatial_shapes) -> Tensor:
        layers = list(self.layers)
        exits = self.config.encoder_exits and self.training and len(layers) > 1
        count = drawn_exit(len(layers), x.device) if exits else len(layers)
        for layer in layers[:count]:
            x = layer(x, positions, reference_points, spatial_shapes)
        return x if count == len(layers) else with_no_gradient_of(layers[count:], x)


@torch.compiler.disable
def drawn_exit(layers: int, device: torch.device) -> int:
    """How many of the layers a training step runs: in one half of all steps all, in the other any smaller number.

    So what follows learns to read every layer, as in the first step of ECO-M2F (Yao et al., "Efficient Transformer
    Encoders for Mask2Former-style models", 2024, arXiv:2404.15244), which computes the loss of all of them in every
    step, and weighs deeper ones more. Processes that train together run as many: sharded ones wait for each other
    in every layer.
    """
    drawn = torch.randint(
        2 * (layers - 1), (), device="cpu"
    )  # of torch's own generator, which resumed runs go on with
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        drawn = drawn.to(device)
        torch.distributed.broadcast(drawn, 0)
    count = int(drawn) + 1
    return count if count < layers else layers


def with_no_gradient_of(unused: list[nn.Module], x: Tensor) -> Tensor:
    """The same values, and of unused parameters a gradient of 0, for which DistributedDataParallel waits."""
    parameters = (parameter for layer in unused for parameter in layer.parameters() if parameter.requires_grad)
    # Those that FSDP shards are of another type, and nobody waits for them.
    firsts = [parameter.flatten()[:1].sum() for parameter in parameters if type(parameter) is nn.Parameter]
    return x + 0 * sum(firsts).to(x.dtype) if firsts else x


class PixelMaps(NamedTuple):
    """What a pixel decoder makes of the backbone's four maps."""

    mask_features: Tensor  # (B, C, H, W)
    maps: list[Tensor]  # at strides 32, 16, 8
    encoded: Tensor | None  # at stride 32, what an encoder made of the coarsest map


class Mask2FormerPixelDecoder(nn.Module):
    """Multi-scale deformable attention over strides 32, 16, 8, and one FPN step to the stride of the mask features.

    Args:
        backbone_channels: channels of the backbone's four feature maps, finest first.
        feature_size: channels inside.
        mask_feature_size: channels of the mask features.
        common_stride: stride of the mask features, 4 (with the FPN step) or 8.
        encoder: runs over (B, S, feature_size).
    """

    def __init__(
        self,
        backbone_channels: list[int],
        feature_size: int,
        mask_feature_size: int,
        common_stride: int,
        encoder: Mask2FormerPixelDecoderEncoder,
    ):
        super().__init__()
        self.input_projections = nn.ModuleList(
            ConvolutionNorm(PointwiseConvolution(channels, feature_size))
            for channels in reversed(backbone_channels[-NUM_LEVELS:])
        )
        self.level_embed = nn.Parameter(torch.empty(NUM_LEVELS, feature_size))
        self.encoder = encoder
        self.has_fpn_step = common_stride == 4
        if self.has_fpn_step:
            self.adapter_1 = ConvolutionNorm(PointwiseConvolution(backbone_channels[0], feature_size, bias=False))
            self.layer_1 = ConvolutionNorm(
                nn.Conv2d(feature_size, feature_size, 3, padding=1, bias=False), rectify=True
            )
        self.mask_projection = PointwiseConvolution(feature_size, mask_feature_size)

    def forward(self, features: list[Tensor]) -> PixelMaps:
        """Of four maps, finest first."""
        device = features[0].device
        maps = [
            project(x) for project, x in zip(self.input_projections, reversed(features[-NUM_LEVELS:]), strict=True)
        ]
        sizes = [tuple(x.shape[-2:]) for x in maps]
        positions = torch.cat(
            [
                sine_position_embedding(size, maps[0].shape[1], device) + level
                for size, level in zip(sizes, self.level_embed, strict=True)
            ]
        )  # (S, C)
        reference_points = torch.cat([cell_centres(size, device) for size in sizes])  # (S, 2)
        tokens = torch.cat([tokens_of(x) for x in maps], dim=1)  # (B, S, C)
        tokens = self.encoder(tokens, positions.to(tokens.dtype), reference_points, sizes)
        parts = tokens.split([H * W for H, W in sizes], dim=1)
        maps = [map_of(part, size) for part, size in zip(parts, sizes, strict=True)]
        finest = maps[-1]
        if self.has_fpn_step:
            lateral = channels_last_on_cpu(features[0])
            upsampled = F.interpolate(finest, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            finest = self.layer_1(self.adapter_1(lateral, plus=upsampled))
        return PixelMaps(self.mask_projection(finest), maps, maps[0])


class Mask2FormerPixelLevelModule(nn.Module):
    """Backbone (`encoder`), the `neck` of a plain ViT, and pixel decoder (`decoder`).

    A part of the backbone without a parameter that trains stays in evaluation mode in training, too: no dropped paths,
    no statistics of batches, and, of a backbone that is frozen as a whole, no random scale of DINOv3's positions.
    """

    def __init__(self, config: Mask2FormerConfig, make_decoder: Callable[[Mask2FormerConfig, list[int]], nn.Module]):
        super().__init__()
        self.freezes_batch_norm = config.freeze_batch_norm
        self.encoder, self.neck, self.backbone_channels = make_backbone(
            config.backbone_config,
            config.feature_strides,
            self.freezes_batch_norm,
            config.vit_neck,
            config.feature_size,
        )
        self.decoder = make_decoder(config, self.backbone_channels)
        self.attended = config.attended_stride
        if config.decoder_type == "standard":
            self.attended = config.transformer_in_feature

    def train(self, mode: bool = True):
        super().train(mode)
        rest_frozen(self.encoder)
        return self

    def forward(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
        """(B, 3, H, W) -> the backbone's four maps, mask features, and the maps that the transformer decoder sees."""
        features = feature_maps(self.encoder, self.neck, pixel_values)
        pixels = self.decoder(list(features))
        return features, pixels.mask_features, attended_maps(self.attended, features, pixels)


def attended_maps(name: str | int | None, features: tuple[Tensor, ...], pixels: PixelMaps) -> list[Tensor]:
    """All maps at strides 32, 16, 8, or the one of a stride or of a name of `design_rules.IN_FEATURES`."""
    if name is None:
        return pixels.maps
    named = dict(zip((*BACKBONE_MAPS, *STRIDES), (*features, *pixels.maps), strict=True))
    named |= {"transformer_encoder": pixels.encoded, "pixel_embedding": pixels.mask_features}
    return [named[name]]
