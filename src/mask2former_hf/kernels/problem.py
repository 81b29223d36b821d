"""What every implementation asks of its tensors; the kernels read memory by these numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_SIDE = 2**24  # float32 counts no further, and the kernels compute positions in it
MOST_CELLS = 2**31 - 1


def check(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    positions: Tensor,
    weights: Tensor,
    reference_points: Tensor | None = None,
    padding: Tensor | None = None,
    output_gradient: Tensor | None = None,
):
    """Refuse tensors that do not belong together.

    Args:
        value: (B, S, h, D) floating point.
        spatial_shapes: L pairs (H, W) with sum(H * W) == S.
        positions: (B, Q, h, L, P, 2), offsets or locations.
        weights: (B, Q, h, L * P) or (B, Q, h, L, P), logits or weights.
        reference_points: (Q, 2), with offsets.
        padding: (B, S) bool or uint8.
        output_gradient: (B, Q, h * D).

    Raises:
        ValueError: the argument, its shape, dtype or device, and what it must be.
    """
    if value.ndim != 4 or positions.ndim != 6:
        raise ValueError(
            f"value is {tuple(value.shape)} and the offsets or locations are {tuple(positions.shape)}: they must be "
            "(B, S, h, D) and (B, Q, h, L, P, 2)"
        )
    B, S, h, D = value.shape
    L, Q, P = len(spatial_shapes), positions.shape[1], positions.shape[4]
    if not all(1 <= side <= MOST_SIDE for shape in spatial_shapes for side in shape):
        raise ValueError(f"spatial_shapes={list(spatial_shapes)}: every side must be from 1 to {MOST_SIDE}")
    if sum(H * W for H, W in spatial_shapes) != S or S > MOST_CELLS:
        raise ValueError(
            f"spatial_shapes={list(spatial_shapes)} have another number of cells than value, {S}, or more than "
            f"{MOST_CELLS}"
        )
    if min(h, D, L, P) < 1:
        raise ValueError(f"{h} heads, {D} channels, {L} levels and {P} points: there must be one of each at least")
    expected = {
        "value": (value, [(B, S, h, D)]),
        "the offsets or locations": (positions, [(B, Q, h, L, P, 2)]),
        "the logits or weights": (weights, [(B, Q, h, L * P), (B, Q, h, L, P)]),
        "reference_points": (reference_points, [(Q, 2)]),
        "the output's gradient": (output_gradient, [(B, Q, h * D)]),
        "padding": (padding, [(B, S)]),
    }
    given = {name: tensor for name, (tensor, _) in expected.items() if tensor is not None}
    for name, tensor in given.items():
        shapes = expected[name][1]
        if tuple(tensor.shape) not in shapes:
            allowed = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: {tuple(tensor.shape)}; for value {tuple(value.shape)} it must be {allowed}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}: its layout is {tensor.layout}; call .to_dense()")
        floating = name != "padding"
        if tensor.is_floating_point() != floating or not floating and tensor.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"{name}: {tensor.dtype}; it must be {'floating point' if floating else 'bool or uint8'}")
    check_devices(*given.values())


def check_devices(*tensors: Tensor | None):
    """Refuse tensors of several devices; PyTorch takes a meta tensor among others for one of an abstract run."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise ValueError(f"the tensors of one call are on {' and '.join(devices)}; move them to the device of value")
