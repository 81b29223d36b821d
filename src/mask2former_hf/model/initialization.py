"""The original's initialisation of what is not in a checkpoint.

`transformers.initialization` changes no tensor that was loaded, so each function may be called for a module that is
partly in a file. Modules come children first: parents refine what their leaves got.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .backbone import freeze_parts
from .criterion import Mask2FormerLoss
from .deformable_attention import MultiScaleDeformableAttention
from .fpn_decoders import DetrEncoderLayer, FPNPixelDecoder
from .per_pixel_head import PerPixelClassifier
from .pixel_decoder import Mask2FormerPixelDecoder, Mask2FormerPixelDecoderEncoderLayer, Mask2FormerPixelLevelModule
from .standard_decoder import StandardTransformerModule
from .transformer_decoder import (
    Mask2FormerDecoderLayer,
    Mask2FormerMaskedAttention,
    Mask2FormerSelfAttention,
    Mask2FormerTransformerModule,
)
from .vit_adapter import ViTAdapter
from .vit_pyramid import SimpleFeaturePyramid


def initialize(module: nn.Module, gain: float) -> bool:
    """Initialise a module; False if it has no rule here.

    Args:
        gain: of the Xavier initialisation in the transformer decoder.
    """
    match module:
        case nn.Linear() | nn.Conv2d():
            init_as_torch(module)
        case nn.Embedding():
            init.normal_(module.weight)
        case MultiScaleDeformableAttention():
            init_deformable_attention(module)
        case Mask2FormerPixelDecoderEncoderLayer():
            init.xavier_uniform_(module.fc1.weight)
            init.xavier_uniform_(module.fc2.weight)
        case Mask2FormerPixelDecoder():
            init_pixel_decoder(module)
        case Mask2FormerSelfAttention():
            # The original's projection is one (3 C, C) matrix: Xavier's bound is that of 4 C units, not of 2 C.
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init_as_xavier(projection, gain / math.sqrt(2))
            init_as_xavier(module.out_proj, gain)
        case Mask2FormerMaskedAttention():
            init.xavier_uniform_(module.in_proj_weight, gain=gain)
            init.zeros_(module.in_proj_bias)
            init_as_xavier(module.out_proj, gain)
        case Mask2FormerDecoderLayer() | DetrEncoderLayer():
            init.xavier_uniform_(module.fc1.weight, gain=gain)
            init.xavier_uniform_(module.fc2.weight, gain=gain)
        case Mask2FormerTransformerModule():
            for projection in module.input_projections:
                if isinstance(projection, nn.Conv2d):
                    init_as_caffe2(projection)
        case StandardTransformerModule():
            if isinstance(module.input_projection, nn.Conv2d):
                init_as_caffe2(module.input_projection)
        case FPNPixelDecoder():
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    init_as_caffe2(part)
        case PerPixelClassifier():
            init.kaiming_normal_(module.classifier.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(module.classifier.bias)
        case SimpleFeaturePyramid():
            for part in module.modules():
                if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                    init_as_torch(part)
        case ViTAdapter():
            init_vit_adapter(module)
        case Mask2FormerPixelLevelModule():
            freeze_parts(module.encoder, module.freezes_batch_norm)  # again: tensors missing in a file are new ones
            if module.encoder.config.model_type == "swin":
                init_swin(module.encoder)
        case Mask2FormerLoss():
            init.copy_(module.empty_weight, module.initial_weights().to(module.empty_weight))
        case _:
            return False
    return True


def init_as_torch(module: nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
    """PyTorch's default, spelled out because a tensor missing in a checkpoint is created without it."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if module.bias is not None:
        bound = 1 / math.sqrt(module.weight[0].numel())
        init.uniform_(module.bias, -bound, bound)


def init_as_xavier(module: nn.Linear | nn.Conv2d, gain: float = 1.0):
    init.xavier_uniform_(module.weight, gain=gain)
    init.zeros_(module.bias)


def init_as_caffe2(convolution: nn.Conv2d):
    init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        init.zeros_(convolution.bias)


def init_deformable_attention(module: MultiScaleDeformableAttention):
    """Each head starts looking in its own direction, point p at p + 1 pixels (Deformable DETR, appendix A.4)."""
    h, L, P = module.num_heads, module.num_levels, module.num_points
    angles = torch.arange(h, dtype=torch.float32) * (2 * math.pi / h)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().max(dim=-1, keepdim=True).values  # onto the unit square
    steps = torch.arange(1, P + 1, dtype=torch.float32).view(1, 1, P, 1)
    init.zeros_(module.sampling_offsets.weight)
    bias = (directions.view(h, 1, 1, 2) * steps).expand(h, L, P, 2).flatten()
    init.copy_(module.sampling_offsets.bias, bias.to(module.sampling_offsets.bias))
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)
    init_as_xavier(module.value_proj)
    init_as_xavier(module.output_proj)


def init_pixel_decoder(module: Mask2FormerPixelDecoder):
    init.normal_(module.level_embed)
    for convolution, _ in module.input_projections:
        init_as_xavier(convolution)
    init_as_caffe2(module.mask_projection)
    if module.has_fpn_step:
        init_as_caffe2(module.adapter_1[0])
        init_as_caffe2(module.layer_1[0])


def init_vit_adapter(module: ViTAdapter):
    """As Meta's: narrow linear layers, convolutions by what they send out (He et al., ICCV 2015)."""
    init.normal_(module.level_embed)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            init.trunc_normal_(part.weight, std=0.02)
            init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            sent = math.prod(part.kernel_size) * part.out_channels // part.groups
            init.normal_(part.weight, std=math.sqrt(2 / sent))
            if part.bias is not None:
                init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, MultiScaleDeformableAttention):
            init_deformable_attention(part)


def init_swin(backbone: nn.Module):
    """The original's Swin from scratch: PyTorch's defaults, position biases from N(0, 0.02)."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_as_torch(module)
        elif name.endswith("relative_position_bias"):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
