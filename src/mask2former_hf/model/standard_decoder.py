"""MaskFormer's transformer decoder: DETR's, over one map, without masks in its attention.

The original's `StandardTransformerDecoder` (Cheng et al., NeurIPS 2021, section 3.3; Carion et al., "End-to-End Object
Detection with Transformers", ECCV 2020). Letters: B batch, Q queries, C channels.
"""

import torch
from torch import Tensor, nn

from .configuration_mask2former import Mask2FormerConfig
from .cpu_layout import tokens_of
from .fpn_decoders import DetrEncoder
from .pixel_decoder import sine_position_embedding
from .transformer_decoder import DecoderStates, Mask2FormerDecoderLayer, Mask2FormerMaskPredictor


class StandardDecoder(nn.Module):
    """Mask2Former's layers with self-attention first and everything allowed, which is what DETR's are."""

    def __init__(self, layers: list[nn.Module], channels: int, mask_feature_size: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.layernorm = nn.LayerNorm(channels)
        self.mask_predictor = Mask2FormerMaskPredictor(channels, mask_feature_size)

    def forward(self, query_positions: Tensor, memory: Tensor, memory_positions: Tensor, eager: bool) -> DecoderStates:
        queries = torch.zeros_like(query_positions)
        states = DecoderStates([], [], [], [])
        for layer in self.layers:
            queries, self_weights, cross_weights = layer(
                queries, query_positions, memory, memory_positions, None, eager
            )
            states.hidden.append(queries)
            states.normalised.append(self.layernorm(queries))
            states.self_attentions.append(self_weights)
            states.cross_attentions.append(cross_weights)
        return states


class StandardTransformerModule(nn.Module):
    """Queries that start as zeros and look at one map (section 3.3 of MaskFormer).

    Every layer's output is a prediction: `config.decoder_layers` of them are as many layers.

    Args:
        in_channels: of the map.
    """

    def __init__(self, config: Mask2FormerConfig, in_channels: int):
        super().__init__()
        channels = config.hidden_dim
        self.queries_embedder = nn.Embedding(config.num_queries, channels)
        projects = config.enforce_input_projection or in_channels != channels
        self.input_projection = nn.Conv2d(in_channels, channels, 1) if projects else nn.Identity()
        sizes = channels, config.num_attention_heads, config.dim_feedforward
        self.memory_encoder = DetrEncoder(config.memory_encoder_layers, *sizes, config.dropout, config.pre_norm)
        layers = [
            Mask2FormerDecoderLayer(
                *sizes, config.activation_function, config.dropout, config.pre_norm, self_attention_first=True
            )
            for _ in range(config.decoder_layers)
        ]
        self.decoder = StandardDecoder(layers, channels, config.mask_feature_size)

    def changed_fields(self) -> dict:
        """Fields of the config that may change with the module."""
        return {"num_queries": self.queries_embedder.num_embeddings}

    def forward(self, maps: list[Tensor], mask_features: Tensor, eager: bool) -> DecoderStates:
        (x,) = maps
        x = self.memory_encoder(self.input_projection(x))
        positions = sine_position_embedding(tuple(x.shape[-2:]), x.shape[1], x.device).to(x.dtype)
        query_positions = self.queries_embedder.weight.expand(x.shape[0], -1, -1)
        return self.decoder(query_positions, tokens_of(x), positions, eager)
