"""Random inputs of deformable attention, and the formula that every kernel is compared with."""

import torch

from mask2former_hf.model.deformable_attention import multi_scale_deformable_attention

SHAPES = [(3, 4), (6, 5), (9, 11), (1, 7)]


def flat(shapes):
    return [side for shape in shapes for side in shape]


def problem(D=8, L=3, P=4, B=2, Q=13, h=4, spread=4.0, seed=0):
    """Inputs of the fused form in float32; some samples lie outside."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES[:L]
    S = sum(H * W for H, W in shapes)
    value = torch.randn(B, S, h, D, generator=generator)
    points = torch.rand(Q, 2, generator=generator)
    offsets = torch.randn(B, Q, h, L, P, 2, generator=generator) * spread
    logits = torch.randn(B, Q, h, L * P, generator=generator) * 2
    return shapes, value, points, offsets, logits


def formula(shapes, value, points, offsets, logits):
    B, Q, h, L, P, _ = offsets.shape
    sizes = torch.tensor([(W, H) for H, W in shapes], dtype=offsets.dtype, device=offsets.device)
    locations = points.view(1, Q, 1, 1, 1, 2) + offsets / sizes.view(1, 1, 1, L, 1, 2)
    return multi_scale_deformable_attention(value, shapes, locations, logits.softmax(-1).view(B, Q, h, L, P))
