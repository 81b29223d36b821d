"""Bipartite matching of queries and targets (Mask2Former, section 3.3; the original's `modeling/matcher.py`).

Costs are evaluated at sampled points. All layers and images of a step are solved after one copy to the host.
Letters: L supervised layers, Q queries, K classes, N targets of an image, P points, M = min(Q, N) matched pairs.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers.utils import is_scipy_available

from .mask_losses import MaskTerm
from .transfers import to_device

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment


@torch.no_grad()
def matching_costs(
    class_logits: Tensor,
    point_logits: Tensor,
    labels: Tensor,
    point_targets: Tensor,
    point_weights: Tensor | None,
    weights: Mapping[str, float],
    mask_terms: Mapping[str, MaskTerm],
) -> Tensor:
    """Matching costs of one image for all layers, (L, Q, N) float32.

    Args:
        class_logits: (L, Q, K + 1).
        point_logits: (L, Q, P) mask logits at the points.
        labels: (N,) class of each target.
        point_targets: (L or 1, N, P) targets in [0, 1] at the same points.
        point_weights: (L or 1, P) float32; 0 takes a point out of the cost. None for 1 everywhere.
        weights: of the terms, by name; "loss_cross_entropy" weighs `-p(class)`.
        mask_terms: the others (`mask_losses`).
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        cost = -weights["loss_cross_entropy"] * class_logits.float().softmax(-1)[..., labels]
        for name, term in mask_terms.items():
            cost += weights[name] * term.pairs(point_logits.float(), point_targets.float(), point_weights)
        return cost


@torch.no_grad()
def assign(costs: list[Tensor], dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Solve the assignment of every layer and image after one copy to the host.

    One problem after the other: 80 of 100 queries x 20 targets take 1.6 ms, in a pool of two threads 2.9 ms.

    Args:
        costs: per image a (L, Q, N) tensor of costs; N may differ between images and be 0 or larger than Q.
        dtype: of the predictions behind the costs, for the error message.

    Returns:
        Per image `(queries, targets)`, two (L, M) int64 tensors on the costs' device with M = min(Q, N), ordered by
        query: `queries[l, m]` is matched with `targets[l, m]` in layer l.

    Raises:
        ValueError: for a cost that is not finite, naming layer, image and dtype.
    """
    if not is_scipy_available():
        raise ImportError("Computing the loss needs scipy for the assignment: pip install scipy")
    on_host = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    if not np.isfinite(on_host).all():
        _raise_not_finite(costs, dtype)
    solved, start = [], 0
    for cost in costs:
        num_layers, Q, N = cost.shape
        block = on_host[start : start + cost.numel()].reshape(num_layers, Q, N)
        start += cost.numel()
        pairs = [linear_sum_assignment(layer) for layer in block]
        solved.append(np.array(pairs, dtype=np.int64).reshape(num_layers, 2, min(Q, N)))
    device = costs[0].device
    flat = to_device(np.concatenate([pairs.ravel() for pairs in solved]), device)
    parts = flat.split([pairs.size for pairs in solved])
    return [tuple(part.view(pairs.shape).unbind(1)) for part, pairs in zip(parts, solved, strict=True)]


def _raise_not_finite(costs: list[Tensor], dtype: torch.dtype):
    for image, cost in enumerate(costs):
        bad = (~cost.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"The matching cost of image {image} of the batch is not finite in layer {bad[0]} (layer 0 predicts "
                f"from the learned queries); predictions are {dtype}. They or the targets contain NaN or infinity: "
                "check the learning rate, the input images, and with float16 the loss scaling (bfloat16 does not "
                "overflow)"
            )
