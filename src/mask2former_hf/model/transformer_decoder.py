"""The transformer decoder: queries that attend to where their last predicted mask is (section 3.2).

Letters: B batch, Q queries, C channels, h heads, D head dim, S = H * W of one feature level.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .compiled import attention as compiled_attention
from .configuration_mask2former import Mask2FormerConfig
from .cpu_layout import channels_last_on_cpu, tokens_of
from .layer_norms import norm_of_sum, normed
from .onednn import linear, product, scaled_dot_product_attention, times_features
from .pixel_decoder import NUM_LEVELS, sine_position_embedding


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, allowed: Tensor | None, dropout: float, eager: bool
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention of projected (B, Q, C) queries over (B, S, C); `allowed` is (B, Q, S), shared by heads.

    Returns:
        (B, Q, C), and with `eager` the (B, h, Q, S) weights.
    """
    if compiled_attention is not None and not eager and not dropout:
        output = compiled_attention(query, key, value, num_heads, allowed)
        if output is not None:
            return output, None
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))  # (B, h, ., D)
    allowed = None if allowed is None else allowed.unsqueeze(1)
    weights = None
    if eager:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        weights = scores.softmax(-1)
        output = F.dropout(weights, dropout, training=dropout > 0) @ value
    else:
        output = scaled_dot_product_attention(query, key, value, allowed, dropout)
    return output.transpose(1, 2).flatten(2), weights


class Mask2FormerSelfAttention(nn.Module):
    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, positions: Tensor, eager: bool, others: "Bystanders | None" = None
    ) -> tuple[Tensor, Tensor | None]:
        placed = x + positions
        query, seen = linear(self.q_proj, placed), placed
        if others is not None:
            x = torch.cat((x, others.states), dim=1)
            seen = torch.cat((placed, others.states + others.positions), dim=1)
        dropout = self.dropout if self.training else 0.0
        key, value = linear(self.k_proj, seen), linear(self.v_proj, x)
        output, weights = attend(query, key, value, self.num_heads, None, dropout, eager)
        return linear(self.out_proj, output), weights


class Bystanders(NamedTuple):
    """Queries that the others see, and that stay what they are."""

    states: Tensor  # (B, R, C)
    positions: Tensor  # (B, R, C)


class Mask2FormerMaskedAttention(nn.Module):
    """Cross-attention to one feature level, only where the previous prediction says the segment is (section 3.2.1).

    Parameters are named as in `nn.MultiheadAttention`.
    """

    def __init__(self, channels: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * channels))
        self.out_proj = nn.Linear(channels, channels)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        allowed: Tensor | None,
        eager: bool,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (x + positions, memory + memory_positions, memory)
        query, key, value = (
            product(states, weight, bias)
            for states, weight, bias in zip(
                inputs, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        dropout = self.dropout if self.training else 0.0
        output, weights = attend(query, key, value, self.num_heads, allowed, dropout, eager)
        return linear(self.out_proj, output), weights


class Mask2FormerDecoderLayer(GradientCheckpointingLayer):
    """Masked attention, self-attention and a feed-forward block, each in a residual branch (section 3.2).

    With self-attention first, and everything allowed, it is DETR's layer.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        feedforward_dim: int,
        activation: str,
        dropout: float,
        pre_norm: bool,
        self_attention_first: bool = False,
    ):
        super().__init__()
        self.pre_norm, self.self_attention_first = pre_norm, self_attention_first
        self.cross_attn = Mask2FormerMaskedAttention(channels, num_heads, dropout)
        self.cross_attn_layer_norm = nn.LayerNorm(channels)
        self.self_attn = Mask2FormerSelfAttention(channels, num_heads, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, feedforward_dim)
        self.fc2 = nn.Linear(feedforward_dim, channels)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        allowed: Tensor | None,
        eager: bool,
        others: Bystanders | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        def branch(x, norm, block):
            output, weights = block(norm(x) if self.pre_norm else x)
            output = self.dropout(output)
            return x + output if self.pre_norm else norm_of_sum(norm, x, output), weights

        def see_each_other(x):
            norm, seen = self.self_attn_layer_norm, others
            if self.pre_norm and others is not None:
                seen = others._replace(states=norm(others.states))
            return branch(x, norm, lambda x: self.self_attn(x, positions, eager, seen))

        if self.self_attention_first:
            x, self_weights = see_each_other(x)
        x, cross_weights = branch(
            x,
            self.cross_attn_layer_norm,
            lambda x: self.cross_attn(x, positions, memory, memory_positions, allowed, eager),
        )
        if not self.self_attention_first:
            x, self_weights = see_each_other(x)
        x, _ = branch(x, self.final_layer_norm, lambda x: (self._feed_forward(x), None))
        return x, self_weights, cross_weights

    def _feed_forward(self, x: Tensor) -> Tensor:
        return linear(self.fc2, self.dropout(self.activation(linear(self.fc1, x))))


class Mask2FormerMaskPredictor(nn.Module):
    """Query states -> mask embeddings, whose product with the mask features is the mask logits."""

    def __init__(self, channels: int, mask_feature_size: int):
        super().__init__()
        self.mask_embedder = nn.Sequential(
            nn.Sequential(nn.Linear(channels, channels), nn.ReLU()),
            nn.Sequential(nn.Linear(channels, channels), nn.ReLU()),
            nn.Sequential(nn.Linear(channels, mask_feature_size)),
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.mask_embedder(states)

    @torch.no_grad()
    def allowed_positions(self, states: Tensor, features: Tensor) -> Tensor:
        """Where each query may look: (B, Q, C) states, (B, C, S) mask features of a level -> (B, Q, S) bool.

        A query whose mask is empty may look everywhere.
        """
        allowed = times_features(self(states), features) >= 0  # sigmoid(logit) >= 0.5
        return allowed | ~allowed.any(dim=-1, keepdim=True)


class DecoderStates(NamedTuple):
    hidden: list[Tensor]  # (B, Q, C) before the first and after each layer
    normalised: list[Tensor]  # the same after the shared layer norm: what the heads read
    self_attentions: list[Tensor]
    cross_attentions: list[Tensor]


class Mask2FormerMaskedAttentionDecoder(nn.Module):
    """Layers that look where the masks of the layer before are; everywhere if not `masked`.

    Attributes:
        masked: whether attention masks are computed at all.
        masked_shares: (layers,), in training the share of queries whose attention is masked, drawn for every image and
            layer anew; None for all of them. See `anneal`.
    """

    def __init__(self, layers: list[nn.Module], channels: int, mask_feature_size: int, masked: bool = True):
        super().__init__()
        self.masked, self.masked_shares, self.generator = masked, None, None
        self.layers = nn.ModuleList(layers)
        self.layernorm = nn.LayerNorm(channels)
        self.mask_predictor = Mask2FormerMaskPredictor(channels, mask_feature_size)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        memories: list[Tensor],
        memory_positions: list[Tensor],
        level_mask_features: list[Tensor],
        eager: bool,
    ) -> DecoderStates:
        states = DecoderStates([queries], [normed(self.layernorm, queries)], [], [])
        every = range(len(self.layers))
        return self.go_on(states, every, query_positions, memories, memory_positions, level_mask_features, eager)

    def go_on(
        self,
        states: DecoderStates,
        layers: range,
        query_positions: Tensor,
        memories: list[Tensor],
        memory_positions: list[Tensor],
        level_mask_features: list[Tensor],
        eager: bool,
        others: Bystanders | None = None,
    ) -> DecoderStates:
        """Add to the states what some layers make of the last ones."""
        queries = states.hidden[-1]
        for index in layers:
            layer, level, allowed = self.layers[index], index % len(memories), None
            if self.masked:
                allowed = self.mask_predictor.allowed_positions(states.normalised[-1], level_mask_features[level])
                if self.training and self.masked_shares is not None:
                    allowed = allowed | self._drawn_free(allowed, self.masked_shares[index])
            queries, self_weights, cross_weights = layer(
                queries, query_positions, memories[level], memory_positions[level], allowed, eager, others
            )
            states.hidden.append(queries)
            states.normalised.append(normed(self.layernorm, queries))
            states.self_attentions.append(self_weights)
            states.cross_attentions.append(cross_weights)
        return states

    def anneal(self, shares: Sequence[float], generator: torch.Generator | None = None):
        """Mask in training the attention of a share of queries; with no share left, compute no masks at all, anywhere.

        EoMT's mask annealing (Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025). The
        config has to say the same: `training.annealing.anneal_masks`.

        Args:
            shares: of each layer, in [0, 1].
            generator: draws the queries; torch's own if None.

        Raises:
            ValueError: for other numbers, or not one per layer.
        """
        if len(shares) != len(self.layers) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"shares={list(shares)}: must be {len(self.layers)} numbers in [0, 1], one per layer")
        self.masked, self.generator = any(shares), generator
        partly = self.masked and not all(share == 1 for share in shares)
        # A tensor, as a compiled graph would be made anew for every other number.
        self.masked_shares = torch.tensor(shares, device=self.layernorm.weight.device) if partly else None

    def _drawn_free(self, allowed: Tensor, share: Tensor) -> Tensor:
        """(B, Q, 1) bool: queries that may look everywhere, of (B, Q, S) `allowed`."""
        size = (*allowed.shape[:2], 1)
        return torch.rand(size, device=allowed.device, generator=self.generator) >= share


class Mask2FormerTransformerModule(nn.Module):
    """Learned queries that look at the feature levels in turn, coarse to fine (section 3.2.2)."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        channels = config.hidden_dim
        projects = config.enforce_input_projection or config.feature_size != channels
        self.queries_embedder = nn.Embedding(config.num_queries, channels)
        self.queries_features = nn.Embedding(config.num_queries, channels) if config.learned_query_features else None
        num_levels = NUM_LEVELS if config.attended_stride is None else 1
        self.level_embed = nn.Embedding(num_levels, channels)
        self.input_projections = nn.ModuleList(
            nn.Conv2d(config.feature_size, channels, 1) if projects else nn.Identity() for _ in range(num_levels)
        )
        layers = [
            Mask2FormerDecoderLayer(
                channels,
                config.num_attention_heads,
                config.dim_feedforward,
                config.activation_function,
                config.dropout,
                config.pre_norm,
                config.self_attention_first,
            )
            for _ in range(config.decoder_layers - 1)
        ]
        self.decoder = Mask2FormerMaskedAttentionDecoder(
            layers, channels, config.mask_feature_size, config.masked_attention
        )

    def changed_fields(self) -> dict:
        """Fields of the config that may change with the module: queries are resized, masks annealed."""
        return {"num_queries": self.queries_embedder.num_embeddings, "masked_attention": self.decoder.masked}

    def forward(self, maps: list[Tensor], mask_features: Tensor, eager: bool) -> DecoderStates:
        positions = [self.positions(x) for x in maps]
        return self.decode(*self.levels(maps, mask_features), positions, eager)

    def positions(self, x: Tensor) -> Tensor:
        """(H * W, C) position embedding of a level's map (B, ., H, W)."""
        return sine_position_embedding(tuple(x.shape[-2:]), self.level_embed.embedding_dim, x.device).to(x.dtype)

    def levels(self, maps: list[Tensor], mask_features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Memory (B, H * W, C) and, for attention masks, mask features (B, ., H * W) of every level."""
        memories, level_mask_features = [], []
        with torch.no_grad():  # attention masks are decisions, without gradient
            pixels = channels_last_on_cpu(mask_features)
        for x, project, level in zip(maps, self.input_projections, self.level_embed.weight, strict=True):
            memories.append(tokens_of(project(x)) + level)
            if not self.decoder.masked:
                continue
            with torch.no_grad():
                # Resizing is linear: resizing the features once equals resizing every layer's mask logits.
                resized = F.interpolate(pixels, size=tuple(x.shape[-2:]), mode="bilinear", align_corners=False)
                level_mask_features.append(resized.flatten(2))
        return memories, level_mask_features

    def decode(
        self, memories: list[Tensor], level_mask_features: list[Tensor], positions: list[Tensor], eager: bool
    ) -> DecoderStates:
        B = memories[0].shape[0]
        query_positions = self.queries_embedder.weight.expand(B, -1, -1)
        learned = self.queries_features
        queries = torch.zeros_like(query_positions) if learned is None else learned.weight.expand(B, -1, -1)
        return self.decoder(queries, query_positions, memories, positions, level_mask_features, eager)
