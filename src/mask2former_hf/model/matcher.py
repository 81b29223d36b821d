"""Bipartite matching of queries and targets (Mask2Former, section 3.3; the original's `modeling/matcher.py`).

Costs are evaluated at sampled points. All layers and images of a step are solved after one copy to the host.
Letters: L supervised layers, Q queries, K classes, N targets of an image, P points, M = min(Q, N) matched pairs.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import is_scipy_available

if is_scipy_available():
    from scipy.optimize import linear_sum_assignment


def focal_halves(logits: Tensor, focal: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Focal loss (Lin et al., ICCV 2017, eq. 5) of each logit for the target 1 and for the target 0.

    Args:
        focal: (alpha, gamma); alpha weighs the target 1 and 1 - alpha the target 0.

    Returns:
        `-alpha (1 - p)^gamma log(p)` and `-(1 - alpha) p^gamma log(1 - p)`, p the predicted probability. A target t
        between 0 and 1 counts as t times the first and 1 - t times the second.
    """
    alpha, gamma = focal
    positive = alpha * torch.exp(gamma * F.logsigmoid(-logits)) * F.softplus(-logits)
    negative = (1 - alpha) * torch.exp(gamma * F.logsigmoid(logits)) * F.softplus(logits)
    return positive, negative


def pairwise_mask_costs(
    point_logits: Tensor,
    point_targets: Tensor,
    point_weights: Tensor | None = None,
    focal: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, or focal loss, and dice of every predicted mask with every target.

    Args:
        point_logits: (L, Q, P) float32 mask logits at the points.
        point_targets: (L or 1, N, P) float32 targets in [0, 1] at the same points.
        point_weights: (L or 1, P) float32; 0 takes a point out of the cost. None for 1 everywhere.
        focal: (alpha, gamma) of the focal loss, None for cross-entropy.

    Returns:
        Two (L, Q, N) tensors: mean cross-entropy or focal loss over the points of weight 1, and
        `1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)` with p the predicted probability.
    """
    targets = point_targets.transpose(-1, -2)  # (L, P, N)
    total_weight = point_logits.shape[-1]
    # Either loss is t times that of target 1 plus (1 - t) times that of target 0, so the pairwise sum is one matrix
    # product. For cross-entropy, softplus(-x) and softplus(x), the difference of the two is x.
    if focal is None:
        entropy, slope = F.softplus(point_logits), point_logits
    else:
        positive, entropy = focal_halves(point_logits, focal)
        slope = entropy - positive
    probabilities = point_logits.sigmoid()
    if point_weights is not None:
        weights = point_weights.unsqueeze(-2)  # (L, 1, P)
        total_weight = weights.sum(-1, keepdim=True).clamp(min=1)
        entropy, probabilities, targets = entropy * weights, probabilities * weights, targets * weights.mT
    entropy = (entropy.sum(-1, keepdim=True) - slope @ targets) / total_weight
    overlap = probabilities @ targets
    total = probabilities.sum(-1, keepdim=True) + targets.sum(-2).unsqueeze(-2)
    return entropy, 1 - (2 * overlap + 1) / (total + 1)


@torch.no_grad()
def matching_costs(
    class_logits: Tensor,
    point_logits: Tensor,
    labels: Tensor,
    point_targets: Tensor,
    point_weights: Tensor | None,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
    focal: tuple[float, float] | None = None,
) -> Tensor:
    """Matching costs of one image for all layers, (L, Q, N) float32.

    Args:
        class_logits: (L, Q, K + 1).
        point_logits, point_targets, point_weights, focal: see `pairwise_mask_costs`.
        labels: (N,) class of each target.
        class_weight, mask_weight, dice_weight: weights of `-p(class)`, cross-entropy (or focal loss) and dice.
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        entropy, dice = pairwise_mask_costs(point_logits.float(), point_targets.float(), point_weights, focal)
        return (
            mask_weight * entropy
            - class_weight * class_logits.float().softmax(-1)[..., labels]
            + dice_weight * dice
        )  # fmt: skip


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
    flat = torch.from_numpy(np.concatenate([pairs.ravel() for pairs in solved])).to(device)
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
