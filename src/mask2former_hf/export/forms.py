"""Parts of a network in the forms that are fastest in a graph, with the same parameters and results.

A runtime goes through a graph node by node. What eager mode does in views, in place or by this package's kernels is
there a pass over memory each, so that the order of axes and the place of a factor cost time. Processor times are of
OpenVINO, Swin-T at 640 x 640: 2.93 s without these forms, 2.78 s with them. Deformable attention by head, or by head
and point, whose intermediate results stay in the cache, was no faster than by level.

Letters: B batch, Q queries, C channels, S tokens of all levels, h heads, D channels of a head, L levels, P points.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.swin.modeling_swin import SwinLayer

from ..model.cpu_layout import ConvolutionNorm
from ..model.deformable_attention import MultiScaleDeformableAttention
from ..model.modeling_mask2former import Mask2FormerModel
from ..model.pixel_decoder import Mask2FormerPixelDecoder
from ..model.pointwise_convolution import PointwiseConvolution
from ..model.swin_speed import GatheredSwinLayer
from ..model.transformer_decoder import Mask2FormerMaskedAttentionDecoder, Mask2FormerMaskPredictor


def to_graph_forms(model: nn.Module, forms: dict[type, type]):
    """Change the parts of a `Mask2FormerForUniversalSegmentation` that have another form, as in `FORMS`."""
    for module in model.modules():
        module.__class__ = forms.get(type(module), type(module))
    if _projects_masks(model.model):
        project_embeddings(model.model)


class AlwaysCroppedSwinLayer(SwinLayer):
    """transformers' layer asks in Python whether its map was padded to whole windows, and crops it only then."""

    def maybe_pad(self, hidden_states, height, width):
        padded, _ = super().maybe_pad(hidden_states, height, width)
        return padded, (0, 0, 0, 1, 0, 1)


class GraphConvolutionNorm(ConvolutionNorm):
    """Without what torch's variance needs on CPUs."""

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        convolution, norm = self
        x = norm(convolution(x))
        x = x if plus is None else x + plus
        return F.relu(x) if self.rectify else x


class GraphDeformableAttention(MultiScaleDeformableAttention):
    """The formula with queries innermost wherever numbers are multiplied: 0.1 s less.

    A pair (x, y) is too short an axis to divide along, and the L * P weights of a query too few for a softmax.
    """

    def forward(
        self, queries: Tensor, features: Tensor, reference_points: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        B, Q, _ = queries.shape
        h, L, P = self.num_heads, self.num_levels, self.num_points
        # By `full`, which takes the sides of a trace for what they are; `tensor` would make constants of them.
        sides = [torch.full((1,), side, dtype=torch.float32) for H, W in spatial_shapes for side in (W, H)]
        scale = (2 / torch.cat(sides)).view(1, L, 1, 2).expand(h, L, P, 2).flatten()
        centres = (2 * reference_points - 1).unsqueeze(1).expand(Q, h * L * P, 2).flatten(1)
        grids = self.sampling_offsets(queries).float() * scale + centres  # (B, Q, h * L * P * 2)
        grids = grids.view(B, Q, h, L, P, 2).permute(0, 2, 3, 4, 1, 5)  # (B, h, L, P, Q, 2)
        weights = self.attention_weights(queries).float().transpose(1, 2)  # (B, h * L * P, Q)
        weights = weights.reshape(B, h, L * P, Q).softmax(2).view(B, h, L, P, Q)
        value = self.value_proj(features).float().transpose(1, 2)  # (B, h * D, S)
        output = 0
        for level, (maps, (H, W)) in enumerate(
            zip(value.split([H * W for H, W in spatial_shapes], dim=2), spatial_shapes, strict=True)
        ):
            samples = F.grid_sample(
                maps.reshape(B * h, -1, H, W), grids[:, :, level].flatten(0, 1), align_corners=False
            )  # (B * h, D, P, Q)
            output = output + (samples * weights[:, :, level].reshape(-1, 1, P, Q)).sum(2)
        output = output.view(B, -1, Q).transpose(1, 2)  # (B, Q, h * D)
        return self.output_proj(output.to(self.output_proj.weight.dtype))


class ProjectedMaskPredictor(Mask2FormerMaskPredictor):
    """Makes (B, Q, C + 1) embeddings: the product with the features, and what is added to it."""

    def masks(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Logits (B, Q, S) of (B, C, S) features."""
        return embeddings[..., :-1] @ features + embeddings[..., -1:]

    def allowed_positions(self, states: Tensor, features: Tensor) -> Tensor:
        allowed = self.masks(self(states), features) >= 0
        return allowed | ~allowed.any(dim=-1, keepdim=True)


class ProjectedMasksModel(Mask2FormerModel):
    def mask_maps(self, embeddings: Tensor, mask_features: Tensor) -> Tensor:
        predictor = self.transformer_module.decoder.mask_predictor
        return predictor.masks(embeddings, mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])


FORMS = {
    GatheredSwinLayer: AlwaysCroppedSwinLayer,
    ConvolutionNorm: GraphConvolutionNorm,
    MultiScaleDeformableAttention: GraphDeformableAttention,
}


def _projects_masks(model: nn.Module) -> bool:
    """Whether mask features are a projection that nothing reads but the masks of the queries, and both are what they
    were built as, no adapter's."""
    pixels, decoder = model.pixel_level_module.decoder, getattr(model.transformer_module, "decoder", None)
    return (
        type(model) is Mask2FormerModel
        and type(pixels) is Mask2FormerPixelDecoder
        and type(pixels.mask_projection) is PointwiseConvolution
        and type(decoder) is Mask2FormerMaskedAttentionDecoder
        and type(decoder.mask_predictor) is Mask2FormerMaskPredictor
        and type(decoder.mask_predictor.mask_embedder[-1][0]) is nn.Linear
    )


@torch.no_grad()
def project_embeddings(model: Mask2FormerModel):
    """Multiply the projection of the mask features into the last layer of the mask embeddings.

    E (W f + b) = (E W) f + E b: a projection of Q embeddings instead of every pixel. 0.1 s less.
    """
    pixels, decoder = model.pixel_level_module.decoder, model.transformer_module.decoder
    last = decoder.mask_predictor.mask_embedder[-1]
    projection = torch.cat([pixels.mask_projection.weight.flatten(1), pixels.mask_projection.bias.unsqueeze(1)], dim=1)
    layer = nn.Linear(last[0].in_features, projection.shape[1], dtype=last[0].weight.dtype)
    layer.weight.copy_(projection.T.double() @ last[0].weight.double())
    layer.bias.copy_(projection.T.double() @ last[0].bias.double())
    last[0] = layer.requires_grad_(False)
    pixels.mask_projection = nn.Identity()
    decoder.mask_predictor.__class__ = ProjectedMaskPredictor
    model.__class__ = ProjectedMasksModel
