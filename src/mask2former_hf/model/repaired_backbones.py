"""Backbones of transformers 5.24 whose maps are not what their names say, with forwards that give them.

Letters: B batch, C channels, (H, W) in tokens.
"""

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BackboneOutput
from transformers.models.focalnet.modeling_focalnet import FocalNetBackbone
from transformers.models.hiera.modeling_hiera import HieraBackbone, unroll


class UnrolledHiera(HieraBackbone):
    """Hiera for images of any size that is a multiple of 32.

    transformers' puts its tokens back into the image's order without having brought them into that of the windows
    before (`HieraModel` does both), which scrambles its maps, and takes one image size alone.
    """

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        size = tuple(
            side // step for side, step in zip(pixel_values.shape[-2:], self.config.patch_stride, strict=True)
        )
        tokens = self.embeddings.patch_embeddings(pixel_values)[0] + self.positions(size)
        strides = [self.config.query_stride] * (len(self.config.depths) - 1)
        tokens = unroll(tokens, pixel_values.shape[-2:], self.config.patch_stride, strides)
        maps = []
        for index, (name, stage) in enumerate(zip(self.stage_names[1:], self.encoder.stages, strict=True)):
            tokens = stage(tokens)[0]
            if 0 < index <= self.config.num_query_pool:  # a stage begins with pooling over a group of tokens
                size, strides = _divided(size, strides[0]), strides[1:]
            if name in self.out_features:
                maps.append(rolled(self.hidden_states_norms[name](tokens), size, strides))
        return BackboneOutput(feature_maps=tuple(maps))

    def positions(self, size: tuple[int, int]) -> Tensor:
        """(1, H * W, C) position embeddings, resized to the image's tokens."""
        trained = _divided(self.config.image_size, self.config.patch_stride)
        embeddings = self.embeddings.position_embeddings
        if trained == size:
            return embeddings
        maps = embeddings.transpose(1, 2).unflatten(2, trained)
        return F.interpolate(maps, size=size, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def _divided(size, steps) -> tuple[int, int]:
    return tuple(side // step for side, step in zip(size, steps, strict=True))


def rolled(tokens: Tensor, size: tuple[int, int], strides: list) -> Tensor:
    """(B, H * W, C) tokens in `unroll`'s order -> (B, C, H, W)."""
    n = len(strides)
    coarse = _divided(size, [prod(steps) for steps in zip(*strides, strict=True)]) if n else size
    parts = tokens.unflatten(1, [step for pair in strides for step in pair] + [*coarse])
    rows, columns = ([axis + 2 * group for group in reversed(range(n + 1))] for axis in (1, 2))
    return parts.permute(0, len(parts.shape) - 1, *rows, *columns).reshape(tokens.shape[0], -1, *size)


class UnmergedFocalNet(FocalNetBackbone):
    """FocalNet with the map of each stage; transformers' gives the one after the merging for the next stage, so that
    the strides are 8, 16, 32, 32."""

    def forward(self, pixel_values: Tensor, **kwargs) -> BackboneOutput:
        tokens, size = self.focalnet.embeddings(pixel_values)
        maps = []
        for name, stage in zip(self.stage_names[1:], self.focalnet.encoder.stages, strict=True):
            tokens, unmerged, sizes = stage(tokens, size)
            if name in self.out_features:
                maps.append(unmerged.transpose(1, 2).unflatten(2, size))
            size = tuple(sizes[-2:])
        return BackboneOutput(feature_maps=tuple(maps))


def repair_maps(backbone: nn.Module):
    """Give a backbone of these classes its forward here; parameters and names stay."""
    for repaired in (UnrolledHiera, UnmergedFocalNet):
        if type(backbone) is repaired.__base__:
            backbone.__class__ = repaired
