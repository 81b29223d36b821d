"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, section 4.1), in plain PyTorch.

`multi_scale_deformable_attention` is the specification that every faster implementation is tested against.
Letters: B batch, Q queries, S = sum of H * W over the L levels, h heads, D channels of a head, P points, C = h * D.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import use_kernel_forward_from_hub

from .compiled import deformable_attention as compiled_deformable_attention
from .onednn import linear


def multi_scale_deformable_attention(
    value: Tensor, spatial_shapes: list[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Attend to a few bilinear samples per query on every feature level (Deformable DETR, eq. 3).

    Args:
        value: (B, S, h, D) features of all levels, concatenated along S.
        spatial_shapes: L pairs (H, W) of Python ints with sum(H * W) == S.
        sampling_locations: (B, Q, h, L, P, 2) as (x, y); 0 and 1 are the outer edges of the feature map.
        attention_weights: (B, Q, h, L, P), summing to 1 over (L, P).

    Returns:
        (B, Q, h * D) in value's dtype; samples outside the map count as zero. Half precision is computed in float32.

    Raises:
        ValueError: if the shapes of locations and weights do not fit value's.
    """
    B, _, h, D = value.shape
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    shape = (B, Q, h, len(spatial_shapes), P)  # products of other shapes would broadcast
    if tuple(sampling_locations.shape) != (*shape, 2) or tuple(attention_weights.shape) != shape:
        raise ValueError(
            f"sampling_locations are {tuple(sampling_locations.shape)} and attention_weights "
            f"{tuple(attention_weights.shape)}; with B = {B}, h = {h} and L = {len(spatial_shapes)} they must be "
            "(B, Q, h, L, P, 2) and (B, Q, h, L, P)"
        )
    dtype = value.dtype
    if dtype in (torch.float16, torch.bfloat16):
        value, attention_weights = value.float(), attention_weights.float()
    # Points before queries, because neighbouring queries sample neighbouring places, and sums over the innermost axis
    # are slow: it takes 0.8 of the time here, 0.6 in OpenVINO.
    grids = (2 * sampling_locations - 1).to(value.dtype).permute(0, 2, 3, 4, 1, 5)  # (B, h, L, P, Q, 2)
    weights = attention_weights.permute(0, 2, 3, 4, 1)  # (B, h, L, P, Q)
    output = 0
    for level, (level_value, (H, W)) in enumerate(
        zip(value.split([H * W for H, W in spatial_shapes], dim=1), spatial_shapes, strict=True)
    ):
        maps = level_value.permute(0, 2, 3, 1).reshape(-1, D, H, W)  # (Bh, D, H, W)
        grid = grids[:, :, level].reshape(-1, P, Q, 2)
        samples = F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (Bh, D, P, Q)
        output = output + (samples * weights[:, :, level].reshape(-1, 1, P, Q)).sum(2)
    return output.view(-1, h * D, Q).transpose(1, 2).to(dtype)


def cell_centres(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H * W, 2) float32 (x, y) centres of the cells of a map, in units of its width and height."""
    H, W = size
    y = (torch.arange(H, dtype=torch.float32, device=device) + 0.5) / H
    x = (torch.arange(W, dtype=torch.float32, device=device) + 0.5) / W
    return torch.stack((x.expand(H, W), y.unsqueeze(1).expand(H, W)), dim=-1).flatten(0, 1)


@use_kernel_forward_from_hub("MultiScaleDeformableAttention")
class DeformableSampling(nn.Module):
    """The formula as a module without parameters, whose forward `use_kernels=True` may replace by a kernel of the Hub.

    Name of the layer and arguments are those that transformers' Deformable DETR has given them.
    """

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return multi_scale_deformable_attention(
            value, value_spatial_shapes_list, sampling_locations, attention_weights
        )


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention with its projections.

    Args:
        embed_dim: C, channels of queries and features.
        num_heads: h; must divide `embed_dim`.
        num_levels: L feature levels.
        num_points: P samples per query, head and level.
        ratio: width of the values, h * D, in units of `embed_dim`.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int, ratio: float = 1.0):
        super().__init__()
        width = int(embed_dim * ratio)
        if width < 1 or width % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide embed_dim={embed_dim} times ratio={ratio:g}; choose another "
                "number of heads"
            )
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(embed_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(embed_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(embed_dim, width)
        self.output_proj = nn.Linear(width, embed_dim)
        self.sampling = DeformableSampling()

    def forward(
        self, queries: Tensor, features: Tensor, reference_points: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Gather from `features` around each query's reference point.

        Args:
            queries: (B, Q, C), position embedding included.
            features: (B, S, C) of all levels.
            reference_points: (Q, 2) float32, as (x, y) in units of the map's width and height.
            spatial_shapes: L pairs (H, W).

        Returns:
            (B, Q, C).
        """
        B, Q, _ = queries.shape
        h, L, P = self.num_heads, self.num_levels, self.num_points
        value = linear(self.value_proj, features).unflatten(-1, (h, -1))  # (B, S, h, D)
        offsets = linear(self.sampling_offsets, queries).view(B, Q, h, L, P, 2)
        logits = linear(self.attention_weights, queries).view(B, Q, h, L * P)
        # A kernel of the Hub was asked for explicitly, so it goes before ours.
        from_hub = self.sampling.forward.__func__ is not DeformableSampling.forward
        if compiled_deformable_attention is not None and not from_hub:
            output = compiled_deformable_attention(value, spatial_shapes, reference_points, offsets, logits)
            if output is not None:
                return linear(self.output_proj, output)
        # Half precision cannot tell neighbouring pixels apart (bfloat16 has 8 bits): coordinates are float32, as in
        # the kernels, which take offsets of any dtype.
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        weights = logits.softmax(-1).view(B, Q, h, L, P)
        # By `full`, which takes the sides of a trace for what they are; `tensor` would make constants of them.
        sides = [
            torch.full((1,), side, dtype=torch.float32, device=queries.device)
            for H, W in spatial_shapes
            for side in (W, H)
        ]
        locations = reference_points.view(1, Q, 1, 1, 1, 2) + offsets / torch.cat(sides).view(1, 1, 1, L, 1, 2)
        starts = [sum(H * W for H, W in spatial_shapes[:level]) for level in range(L)]
        output = self.sampling(
            value.to(locations.dtype),  # kernels of the Hub take one dtype, and coordinates need float32
            torch.tensor(spatial_shapes, device=queries.device),
            spatial_shapes,
            torch.tensor(starts, device=queries.device),
            locations,
            weights.to(locations.dtype),
            im2col_step=64,
        )
        return self.output_proj(output.to(value.dtype))
