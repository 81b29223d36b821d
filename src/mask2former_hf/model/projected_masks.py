"""Mask features that are left as they are before their projection: E (W f + b) = (E W) f + E b.

In exports, and at inference in eager mode on CPUs, that is a product of Q embeddings instead of one of every pixel,
and a map less. Mask features themselves are made when somebody reads them in the output (`outputs.MadeWhenRead`).
Elsewhere ten more small products take longer than a large one.
"""

import copy

import torch
from torch import Tensor, nn

from .cpu_layout import hooked, plain
from .onednn import product
from .pixel_decoder import Mask2FormerPixelDecoder, Mask2FormerPixelLevelModule
from .pointwise_convolution import PointwiseConvolution
from .transformer_decoder import Mask2FormerMaskedAttentionDecoder, Mask2FormerMaskPredictor

_PROJECTION = ("pixel_level_module", "decoder", "mask_projection")
_PREDICTOR = ("transformer_module", "decoder", "mask_predictor")


class ProjectedMaskPredictor(Mask2FormerMaskPredictor):
    """Makes (B, Q, C + 1) embeddings of what is projected: the product with it, and what is added to that.

    Attributes:
        projection: (C + 1, M), the transposed weight and the bias.
    """

    projection: Tensor

    def forward(self, states: Tensor) -> Tensor:
        return product(super().forward(states), self.projection, None)


def leaves_projection(model: nn.Module) -> bool:
    """Whether nothing but the masks of queries reads mask features, and all parts are what they were built as."""
    if model.config.head_type != "masks":
        return False
    level, module = model.pixel_level_module, model.transformer_module
    pixels, decoder = level.decoder, getattr(module, "decoder", None)
    if type(level) is not Mask2FormerPixelLevelModule or type(pixels) is not Mask2FormerPixelDecoder:
        return False
    if not isinstance(decoder, Mask2FormerMaskedAttentionDecoder):
        return False
    projection, predictor = pixels.mask_projection, decoder.mask_predictor
    return (
        type(projection) is PointwiseConvolution
        and type(predictor) is Mask2FormerMaskPredictor
        and plain(projection.weight, projection.bias)
        and not any(hooked(part) for part in (level, pixels, projection, module, decoder, predictor))
    )


def with_projected_embeddings(model: nn.Module) -> nn.Module:
    """The model with the projection in its embeddings, in a few copied modules that share all parameters."""
    predictor = copy.copy(model.transformer_module.decoder.mask_predictor)
    projection = model.pixel_level_module.decoder.mask_projection
    predictor.__class__ = ProjectedMaskPredictor
    predictor.projection = torch.cat([projection.weight.flatten(1).T, projection.bias.unsqueeze(0)])
    return with_part(with_part(model, _PROJECTION, nn.Identity()), _PREDICTOR, predictor)


def with_part(module: nn.Module, path: tuple[str, ...], part: nn.Module) -> nn.Module:
    """The same module with another part, whose owners are copied and nothing else."""
    if not path:
        return part
    changed = copy.copy(module)
    changed._modules = module._modules | {path[0]: with_part(module._modules[path[0]], path[1:], part)}
    return changed
