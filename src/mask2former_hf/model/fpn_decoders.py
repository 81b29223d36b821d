"""Pixel decoders that the paper compares with deformable attention: MaskFormer's FPN, bare or behind a DETR encoder.

The original's `BasePixelDecoder` and `TransformerEncoderPixelDecoder` (Cheng et al., "Per-Pixel Classification is Not
All You Need for Semantic Segmentation", NeurIPS 2021, section 3.4). Letters: B batch, C channels.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .cpu_layout import ConvolutionNorm, channels_last_on_cpu, map_of, tokens_of
from .pixel_decoder import PixelMaps, sine_position_embedding
from .pointwise_convolution import PointwiseConvolution
from .transformer_decoder import Mask2FormerSelfAttention


class DetrEncoderLayer(GradientCheckpointingLayer):
    """Self-attention of all cells of a map and a feed-forward block, each in a residual branch (DETR, section 3.2)."""

    def __init__(self, channels: int, num_heads: int, feedforward_dim: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Mask2FormerSelfAttention(channels, num_heads, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, feedforward_dim)
        self.fc2 = nn.Linear(feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        def branch(x, norm, block):
            x = x + self.dropout(block(norm(x) if self.pre_norm else x))
            return x if self.pre_norm else norm(x)

        x = branch(x, self.self_attn_layer_norm, lambda x: self.self_attn(x, positions, eager=False)[0])
        return branch(x, self.final_layer_norm, lambda x: self.fc2(self.dropout(F.relu(self.fc1(x)))))


class DetrEncoder(nn.Module):
    """Layers over the cells of one map, told apart by sines of their positions. Without a layer it changes nothing.

    Args:
        num_layers, channels, num_heads, feedforward_dim, dropout: of the layers.
        pre_norm: layer norm before each block, and one at the end.
    """

    def __init__(
        self, num_layers: int, channels: int, num_heads: int, feedforward_dim: int, dropout: float, pre_norm: bool
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DetrEncoderLayer(channels, num_heads, feedforward_dim, dropout, pre_norm) for _ in range(num_layers)
        )
        self.layernorm = nn.LayerNorm(channels) if pre_norm and num_layers else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if not self.layers:
            return x
        size = x.shape[-2:]
        positions = sine_position_embedding(tuple(size), x.shape[1], x.device).to(x.dtype)
        tokens = tokens_of(x)
        for layer in self.layers:
            tokens = layer(tokens, positions)
        return map_of(tokens if self.layernorm is None else self.layernorm(tokens), size)


class FPNPixelDecoder(nn.Module):
    """A feature pyramid network (Lin et al., CVPR 2017) with group norm, coarse to fine.

    Args:
        backbone_channels: channels of the backbone's four feature maps, finest first.
        feature_size: channels inside.
        mask_feature_size: channels of the mask features.
        encoder: over the coarsest map, behind a 1x1 convolution to `feature_size`; None for neither.
    """

    def __init__(
        self,
        backbone_channels: list[int],
        feature_size: int,
        mask_feature_size: int,
        encoder: DetrEncoder | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        if encoder is not None:
            self.input_projection = PointwiseConvolution(backbone_channels[-1], feature_size)
        coarsest = backbone_channels[-1] if encoder is None else feature_size
        self.layer_4 = smoothing(coarsest, feature_size)
        for level, channels in enumerate(backbone_channels[:-1], start=1):
            lateral = ConvolutionNorm(PointwiseConvolution(channels, feature_size, bias=False))
            setattr(self, f"adapter_{level}", lateral)
            setattr(self, f"layer_{level}", smoothing(feature_size, feature_size))
        self.mask_projection = nn.Conv2d(feature_size, mask_feature_size, 3, padding=1)

    def forward(self, features: list[Tensor]) -> PixelMaps:
        """Of four maps, finest first."""
        encoded = None if self.encoder is None else self.encoder(self.input_projection(features[-1]))
        maps = [self.layer_4(channels_last_on_cpu(features[-1] if encoded is None else encoded))]
        for level in (3, 2, 1):
            lateral = channels_last_on_cpu(features[level - 1])
            upsampled = F.interpolate(maps[-1], size=lateral.shape[-2:], mode="nearest")
            merged = getattr(self, f"adapter_{level}")(lateral, plus=upsampled)
            maps.append(getattr(self, f"layer_{level}")(merged))
        return PixelMaps(self.mask_projection(maps[-1]), maps[:-1], encoded)


def smoothing(in_channels: int, out_channels: int) -> ConvolutionNorm:
    return ConvolutionNorm(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), rectify=True)
