"""DINOv3's rotary positions in float32 whatever the model's dtype."""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTRopePositionEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)


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
    for module in backbone.modules():
        if type(module) is DINOv3ViTRopePositionEmbedding:
            module.__class__ = ExactRotaryPositions  # the same parameters and names
        elif type(module) is DINOv3ViTAttention:
            module.__class__ = ExactRotaryAttention
