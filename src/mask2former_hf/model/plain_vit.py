"""What plain ViTs of transformers need to serve Mask2Former: whole patches, exact rotary positions, a neck.

A plain ViT has maps of one stride, that of its patches. A neck, `SimpleFeaturePyramid` or `ViTAdapter`, makes four
maps at strides 4, 8, 16, 32 of them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTRopePositionEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .vit_adapter import NUM_HEADS, NUM_MAPS, VALUE_RATIO, ViTAdapter, tapped_blocks
from .vit_pyramid import SimpleFeaturePyramid

LEAST_PATCH = 8  # pixels; hierarchical backbones begin with patches of 2 or 4, and may be asked for their first map


def patch_size_of(config) -> tuple[int, int] | None:
    """(height, width) of a backbone's patches in pixels; None for one without patches."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def is_plain(config, size: tuple[int, int], shapes: list[tuple[int, ...]]) -> bool:
    """Whether maps of these shapes, of an image of this size, are those of a plain ViT."""
    patch = patch_size_of(config)
    if patch is None or min(patch) < LEAST_PATCH:
        return False
    grid = tuple(side // step for side, step in zip(size, patch, strict=True))
    return all(len(shape) == 4 and tuple(shape[-2:]) == grid for shape in shapes)


def make_neck(kind: str | None, config, channels: list[int], pyramid_channels: int) -> nn.Module:
    """The neck of a plain ViT with these channels of its maps.

    Args:
        kind: "pyramid", "adapter", or None for the pyramid.
        pyramid_channels: of each of the pyramid's maps. The adapter's have those of the ViT.

    Raises:
        ValueError: for an adapter without four maps, or of a width that its heads do not divide.
    """
    if kind != "adapter":
        return SimpleFeaturePyramid(channels[-1], pyramid_channels)
    if len(channels) != NUM_MAPS:
        layers = getattr(config, "num_hidden_layers", len(getattr(config, "stage_names", ())) - 1)
        which = f", for example out_indices={tapped_blocks(layers)}" if layers >= NUM_MAPS else ""
        raise ValueError(
            f"vit_neck='adapter': backbone_config is a {config.model_type} with {len(channels)} feature maps, and the "
            f"adapter takes {NUM_MAPS}: name four of its blocks{which}"
        )
    if channels[-1] * VALUE_RATIO % NUM_HEADS:
        raise ValueError(
            f"vit_neck='adapter': the {config.model_type} has {channels[-1]} channels, and the adapter's {NUM_HEADS} "
            f"heads need a multiple of {int(NUM_HEADS / VALUE_RATIO)}; take another ViT, or vit_neck='pyramid'"
        )
    return ViTAdapter(channels[-1])


def neck_maps(backbone: nn.Module, neck: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """Four maps, finest first, of (B, 3, H, W) whose sides are multiples of 32."""
    return neck(pixel_values, backbone(whole_patches(pixel_values, patch_size_of(backbone.config))).feature_maps)


def whole_patches(pixel_values: Tensor, patch: tuple[int, int]) -> Tensor:
    """The image resized to the next whole number of patches, so that the ViT sees all of it.

    Its convolution would leave out a remainder: up to 13 pixels of patches of 14 at the right and the bottom, by which
    its map, spread over the whole image afterwards, would be shifted. Multiples of the patch stay as they are.
    """
    H, W = pixel_values.shape[-2:]
    # Not by a negative quotient, which PyTorch's tracer rounds to the other side.
    size = ((H + patch[0] - 1) // patch[0] * patch[0], (W + patch[1] - 1) // patch[1] * patch[1])
    if size == (H, W):
        return pixel_values
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)


class ExactRotaryPositions(DINOv3ViTRopePositionEmbedding):
    """Sines and cosines in float32 whatever the model's dtype, from frequencies that were not rounded with it."""

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        if self.inv_freq.dtype != torch.float32:
            exponents = torch.arange(0, 1, 4 / self.head_dim, dtype=torch.float32, device=pixel_values.device)
            self.inv_freq = 1 / self.base**exponents
        return super().forward(pixel_values.float())


class ExactRotaryAttention(DINOv3ViTAttention):
    """Rotates queries and keys in float32, as Meta's code does, then attends in the values' dtype."""

    def forward(self, hidden_states: Tensor, attention_mask=None, position_embeddings=None, **kwargs):
        B, N, _ = hidden_states.shape
        query, key, value = (
            projection(hidden_states).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(B, N, -1).contiguous()), weights


def keep_positions_exact(backbone: nn.Module):
    """Let DINOv3's rotary positions stay float32 in a bfloat16 model; transformers rounds them to its dtype."""
    if backbone.config.model_type == "dinov3_vit":
        for module in backbone.modules():
            if type(module) is DINOv3ViTRopePositionEmbedding:
                module.__class__ = ExactRotaryPositions  # the same parameters and names
            elif type(module) is DINOv3ViTAttention:
                module.__class__ = ExactRotaryAttention
