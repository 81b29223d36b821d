"""ViTDet's simple feature pyramid: four maps from the last map of a plain ViT (Li et al., "Exploring Plain Vision
Transformer Backbones for Object Detection", ECCV 2022, section 3).

Letters: B batch, C channels of the ViT, D channels of the pyramid, (H, W) the image's size, a multiple of 32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDE = 16  # of the map that the pyramid begins with


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConvolution(nn.Conv2d):
    """A convolution without bias, and a norm that is its part `norm`, as detectron2 names it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Each level from the ViT's last map alone, up or down by its own layers, then projected.

    Args:
        channels: C.
        out_channels: D.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
            *_projection(quarter, out_channels),
        )
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(channels, half, 2, stride=2), *_projection(half, out_channels))
        self.simfp_4 = nn.Sequential(*_projection(channels, out_channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2, stride=2), *_projection(channels, out_channels))
        self.out_channels = [out_channels] * 4

    def forward(self, pixel_values: Tensor, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """(B, 3, H, W) and the ViT's maps -> four maps (B, D, h, w) at strides 4, 8, 16, 32."""
        x, size = maps[-1], tuple(side // STRIDE for side in pixel_values.shape[-2:])
        if x.shape[-2:] != torch.Size(size):  # of patches of another size
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return [self.simfp_2(x), self.simfp_3(x), self.simfp_4(x), self.simfp_5(x)]


def _projection(in_channels: int, out_channels: int) -> tuple[nn.Module, nn.Module]:
    return NormedConvolution(in_channels, out_channels, 1), NormedConvolution(out_channels, out_channels, 3)
