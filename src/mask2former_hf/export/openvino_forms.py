"""Parts of a network in forms that need operators of OpenVINO's: for the graph that becomes `model.xml`, no other.

Letters: B batch, Q queries, S tokens of all levels, h heads, D channels of a head, L levels, P points.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.deformable_attention import MultiScaleDeformableAttention
from .errors import require
from .forms import FORMS


def weighted_rows(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Sums (bags, D) of rows of a (rows, D) table at (bags, n) int32 indices, times (bags, n) weights.

    In a graph this is what `join_weighted_rows` looks for; nowhere else are all rows kept.
    """
    return (F.embedding(indices, table) * weights.unsqueeze(2)).sum(1)


def join_weighted_rows(network):
    """Change an `openvino.Model` in place: every `weighted_rows` becomes one operator."""
    openvino = require("openvino", "openvino")
    for node in network.get_ordered_ops():
        inputs = _inputs_of_weighted_rows(node)
        if inputs is not None:
            openvino.utils.replace_node(node, openvino.opset13.embedding_bag_packed_sum(*inputs))


def _inputs_of_weighted_rows(node) -> tuple | None:
    """Table, indices and weights where a node gives such sums."""
    total = _inputs(node, "ReduceSum")
    product = total and _inputs(total[0].get_node(), "Multiply")
    rows = product and _inputs(product[0].get_node(), "Gather")
    column = product and _inputs(product[1].get_node(), "Unsqueeze")
    if not (rows and column):
        return None
    axes = [getattr(value.get_node(), "data", np.array(())).tolist() for value in (total[1], rows[2], column[1])]
    return (rows[0], rows[1], column[0]) if axes == [[1], 0, [2]] else None


def _inputs(node, name: str) -> list | None:
    return node.input_values() if node.get_type_name() == name else None


class BagsOfCorners(MultiScaleDeformableAttention):
    """Of every query and head one bag of 4 * L * P rows: the corners of its points, of all levels.

    Values, offsets and results stay as the linear layers make and take them. `GridSample` reads every channel of a
    corner by itself, and two passes over all samples follow. Swin-T at 640 x 640 takes 1.25 s instead of 1.32 (2
    threads, medians of 12 in turn); a layer alone 53 ms instead of 62, of which 19 are its linear layers.
    """

    def forward(
        self, queries: Tensor, features: Tensor, reference_points: Tensor, spatial_shapes: list[tuple[int, int]]
    ) -> Tensor:
        B, Q, _ = queries.shape
        h, P, S = self.num_heads, self.num_points, features.shape[1]
        starts = [sum(H * W for H, W in spatial_shapes[:level]) for level in range(self.num_levels)]

        def by_point(sides, dtype):
            # By `full`, which takes the sides of a trace for what they are; `tensor` would make constants of them.
            return torch.cat([torch.full((P,), side, dtype=dtype) for side in sides])  # (L * P,)

        (rows, down), (columns, across) = (
            self._cells(
                queries, reference_points, axis, by_point([shape[1 - axis] for shape in spatial_shapes], torch.float32)
            )
            for axis in (1, 0)
        )
        widths, starts = (by_point(sides, torch.int32) for sides in ([W for _, W in spatial_shapes], starts))
        first = (torch.arange(B, dtype=torch.int32) * S).view(B, 1, 1, 1, 1) + starts
        heads = torch.arange(h, dtype=torch.int32).view(h, 1, 1)
        rows, columns = rows * (widths * h), (columns + first) * h + heads
        weights = self.attention_weights(queries).view(B, Q, h, 1, -1).softmax(-1)
        output = weighted_rows(
            self.value_proj(features).reshape(B * S * h, -1),
            (rows.unsqueeze(4) + columns.unsqueeze(3)).view(B * Q * h, -1),
            ((down * weights).unsqueeze(4) * across.unsqueeze(3)).view(B * Q * h, -1),
        )
        return self.output_proj(output.view(B, Q, -1))

    def _cells(self, queries: Tensor, points: Tensor, axis: int, sides: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, h, 2, L * P) of the two cells around every point along an axis: int32 places, and shares.

        Args:
            axis: 0 for x, 1 for y.
            sides: (L * P,) cells of the levels' maps along the axis.
        """
        places = self._offsets(queries, axis).unflatten(2, (self.num_heads, 1, -1))
        places = places + (points[:, axis].view(-1, 1, 1, 1) * sides - 0.5)
        before = places.floor()
        second = torch.tensor([[0.0], [1.0]])
        cells = before + second
        inside = torch.minimum(cells.clamp(min=0), sides - 1)
        shares = (1 - second) + (2 * second - 1) * (places - before)
        return inside.to(torch.int32), shares * (inside == cells).float()

    def _offsets(self, queries: Tensor, axis: int) -> Tensor:
        """(B, Q, h * L * P) of one axis. Pairs are too short to be taken apart, so the layer is, if it is one."""
        layer = self.sampling_offsets
        if type(layer) is nn.Linear:
            return F.linear(queries, layer.weight[axis::2], layer.bias[axis::2])
        return layer(queries)[..., axis::2]


OPENVINO_FORMS = FORMS | {MultiScaleDeformableAttention: BagsOfCorners}
