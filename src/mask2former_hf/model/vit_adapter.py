"""DINOv3's adapter: four maps from four maps of a plain ViT and a small convolutional network on the image.

Nothing flows back into the ViT, so it may be frozen (Siméoni et al., "DINOv3", arXiv 2508.10104; the parts come from
Chen et al., "Vision Transformer Adapter for Dense Predictions", ICLR 2023). Names are those of Meta's checkpoints; the
code is written from the formulas alone, because Meta's has a licence of its own.

Letters: B batch, C channels of the ViT, (H, W) the image's size, a multiple of 32, N = 21 * H * W / 1024 cells at
strides 8, 16, 32, which are the adapter's queries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .cpu_layout import channels_last_on_cpu, map_of, tokens_of
from .deformable_attention import MultiScaleDeformableAttention, cell_centres

# The numbers of Meta's released segmentor (facebookresearch/dinov3 at 6876159), for ViTs of any size
STEM_WIDTH = 64
NUM_HEADS = 16
NUM_POINTS = 4
VALUE_RATIO = 0.5  # width of the attention's values, in units of C
FEEDFORWARD_RATIO = 0.25
DROP_PATH = 0.3
EXTRA_EXTRACTORS = 2  # of the last interaction
NUM_MAPS = 4


class DropPath(nn.Module):
    """Leave a residual branch out, for each image with probability `rate`, in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class SpatialPrior(nn.Module):
    """The image's local structure: convolutions to strides 4, 8, 16, 32."""

    def __init__(self, channels: int, width: int, image_channels: int):
        super().__init__()
        self.stem = nn.Sequential(
            *_convolution(image_channels, width, stride=2),
            *_convolution(width, width),
            *_convolution(width, width),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*_convolution(width, 2 * width, stride=2))
        self.conv3 = nn.Sequential(*_convolution(2 * width, 4 * width, stride=2))
        self.conv4 = nn.Sequential(*_convolution(4 * width, 4 * width, stride=2))
        for level, factor in enumerate((1, 2, 4, 4), start=1):
            setattr(self, f"fc{level}", nn.Conv2d(factor * width, channels, 1))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(channels_last_on_cpu(pixel_values))
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)


class DepthwiseConvolution(nn.Module):
    """One 3x3 filter per channel, the same on the map of every level."""

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, tokens: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        levels = tokens.split([h * w for h, w in sizes], dim=1)
        maps = [self.dwconv(map_of(level, size)) for level, size in zip(levels, sizes, strict=True)]
        return torch.cat([tokens_of(x) for x in maps], dim=1)


class ConvolutionalFeedForward(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, width)
        self.dwconv = DepthwiseConvolution(width)
        self.fc2 = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(tokens), sizes)))


class Extractor(GradientCheckpointingLayer):
    """Queries of three levels gather from a map of the ViT by deformable attention, then mix with their neighbours."""

    def __init__(self, channels: int, num_heads: int, drop_path: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feat_norm = nn.LayerNorm(channels, eps=1e-6)
        self.attn = MultiScaleDeformableAttention(channels, num_heads, 1, NUM_POINTS, VALUE_RATIO)
        self.ffn_norm = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = ConvolutionalFeedForward(channels, int(channels * FEEDFORWARD_RATIO))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        queries: Tensor,
        features: Tensor,
        reference_points: Tensor,
        sizes: list[tuple[int, int]],
        grid: tuple[int, int],
    ) -> Tensor:
        """(B, N, C) queries and (B, h * w, C) tokens of the ViT's grid (h, w) -> (B, N, C).

        Args:
            reference_points: (N, 2) the queries' places, as (x, y) from 0 to 1.
            sizes: of the three levels that the queries are the cells of.
        """
        queries = queries + self.attn(self.query_norm(queries), self.feat_norm(features), reference_points, [grid])
        return queries + self.drop_path(self.ffn(self.ffn_norm(queries), sizes))


class Interaction(nn.Module):
    """One map of the ViT and who gathers from it."""

    def __init__(self, extras: int, **options):
        super().__init__()
        self.extractor = Extractor(**options)
        if extras:
            self.extra_extractors = nn.ModuleList(Extractor(**options) for _ in range(extras))

    def forward(self, queries: Tensor, *memory) -> Tensor:
        for extractor in (self.extractor, *getattr(self, "extra_extractors", ())):
            queries = extractor(queries, *memory)
        return queries


class ViTAdapter(nn.Module):
    """Four maps at strides 4 to 32 from the image and the ViT's maps of four depths, each after the ViT's last norm.

    Args:
        channels: C.
        num_heads: of the extractors; must divide C / 2.
        stem_width: channels of the convolutional network's first layers; None for `STEM_WIDTH`.
        drop_path: of the extractors' feed-forward blocks.
        image_channels: of the image.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = NUM_HEADS,
        stem_width: int | None = None,
        drop_path: float = DROP_PATH,
        image_channels: int = 3,
    ):
        super().__init__()
        self.spm = SpatialPrior(channels, STEM_WIDTH if stem_width is None else stem_width, image_channels)
        self.level_embed = nn.Parameter(torch.empty(3, channels))
        options = {"channels": channels, "num_heads": num_heads, "drop_path": drop_path}
        self.interactions = nn.ModuleList(
            Interaction(EXTRA_EXTRACTORS if last else 0, **options) for last in (False, False, False, True)
        )
        self.up = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        for level in range(1, NUM_MAPS + 1):
            setattr(self, f"norm{level}", nn.BatchNorm2d(channels))
        self.out_channels = [channels] * NUM_MAPS

    def forward(self, pixel_values: Tensor, maps: tuple[Tensor, ...]) -> list[Tensor]:
        """(B, c, H, W) and the ViT's four maps (B, C, h, w), shallow first -> four maps at strides 4, 8, 16, 32."""
        c1, *coarser = self.spm(pixel_values)
        sizes = [tuple(x.shape[-2:]) for x in coarser]
        tokens = [tokens_of(x) + level for x, level in zip(coarser, self.level_embed, strict=True)]
        queries = torch.cat(tokens, dim=1)  # (B, N, C)
        reference_points = torch.cat([cell_centres(size, queries.device) for size in sizes])
        grid = tuple(maps[0].shape[-2:])
        for interaction, x in zip(self.interactions, maps, strict=True):
            queries = interaction(queries, tokens_of(x), reference_points, sizes, grid)
        levels = queries.split([h * w for h, w in sizes], dim=1)
        # Copied: torch 2.13's batch norm gives wrong gradients on CPUs for the map of a single image that is a view of
        # tokens, whose stride over images is not that of channels innermost.
        c2, c3, c4 = (map_of(level, size).contiguous() for level, size in zip(levels, sizes, strict=True))
        outputs = []
        for level, (c, x) in enumerate(zip((c1 + self.up(c2), c2, c3, c4), maps, strict=True), start=1):
            c = c + F.interpolate(x, size=c.shape[-2:], mode="bilinear", align_corners=False)
            outputs.append(getattr(self, f"norm{level}")(c))
        return outputs


def tapped_blocks(num_layers: int) -> list[int]:
    """After which of a ViT's blocks its four maps are taken; 1 is the first block, as in transformers' `out_indices`.

    Four even intervals, but of 24 blocks [5, 12, 18, 24], as Meta's models were trained.

    Raises:
        ValueError: for fewer than four blocks.
    """
    if num_layers < NUM_MAPS:
        raise ValueError(f"num_layers={num_layers}: an adapter needs maps of four blocks")
    return [5, 12, 18, 24] if num_layers == 24 else [n * (num_layers // NUM_MAPS) for n in range(1, NUM_MAPS + 1)]
