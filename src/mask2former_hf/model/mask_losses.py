"""The terms of the loss: what each is called and weighs, and the two forms of those that compare masks.

A mask term compares logits with targets at sampled points. Its two forms are one formula:

    pairs   for matching: every query with every target, as matrix products
                logits (L, Q, P), targets (L or 1, N, P), weights (L or 1, P) or None -> (L, Q, N)
    rows    for the loss: each matched query with its target
                logits (R, P), targets (R, P), weights (R, P) or None -> (R,)

Targets are in [0, 1]; a weight is 0 or 1, and 0 takes a point out. All are float32.
Letters: L supervised layers, Q queries, N targets of an image, R matched pairs, P points.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

PART = 256  # points; the recipes' 12544 are 49 of them
WEIGHT_FIELDS = {  # every term of the loss, and the config field of its weight
    "loss_cross_entropy": "class_weight",
    "loss_mask": "mask_weight",
    "loss_dice": "dice_weight",
}


def loss_weights(config) -> dict[str, float]:
    """Weight of every term in matching cost and loss, from this package's config or transformers'."""
    return {name: getattr(config, field, 0) for name, field in WEIGHT_FIELDS.items()}


def short_name(term: str) -> str:
    """`"loss_cross_entropy"` -> `"class"`: what a term is about, by its weight's field."""
    return WEIGHT_FIELDS[term].removesuffix("_weight")


class MaskTerm(Protocol):
    def pairs(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor: ...

    def rows(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor: ...


def mask_terms(config) -> dict[str, MaskTerm]:
    """The terms that compare masks, by name."""
    focal = getattr(config, "mask_loss", "bce") == "focal"  # transformers' config has no such field
    return {
        "loss_mask": Focal(config.focal_alpha, config.focal_gamma) if focal else CrossEntropy(),
        "loss_dice": Dice(),
    }


@dataclass(frozen=True)
class CrossEntropy:
    """Mean binary cross-entropy of the points of weight 1."""

    def pairs(self, logits, targets, weights):
        # softplus(-x) for the target 1 and softplus(x) for 0: the difference is x.
        return _mean_of_pairs(F.softplus(logits), logits, targets, weights)

    def rows(self, logits, targets, weights):
        return _mean_of_rows(F.binary_cross_entropy_with_logits(logits, targets, reduction="none"), weights)


@dataclass(frozen=True)
class Focal:
    """Mean focal loss (Lin et al., ICCV 2017, eq. 5) of the points of weight 1.

    A target t between 0 and 1 counts as t times the loss of the target 1 and 1 - t times that of 0.

    Args:
        alpha: weighs the target 1, and 1 - alpha the target 0.
        gamma: how strongly points that are right already count less; 0 for not at all.
    """

    alpha: float
    gamma: float

    def pairs(self, logits, targets, weights):
        positive, negative = self.halves(logits)
        return _mean_of_pairs(negative, negative - positive, targets, weights)

    def rows(self, logits, targets, weights):
        positive, negative = self.halves(logits)
        return _mean_of_rows(targets * positive + (1 - targets) * negative, weights)

    def halves(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`-alpha (1 - p)^gamma log(p)` for the target 1 and `-(1 - alpha) p^gamma log(1 - p)` for 0, p = sigmoid."""
        positive = self.alpha * torch.exp(self.gamma * F.logsigmoid(-logits)) * F.softplus(-logits)
        negative = (1 - self.alpha) * torch.exp(self.gamma * F.logsigmoid(logits)) * F.softplus(logits)
        return positive, negative


@dataclass(frozen=True)
class Dice:
    """`1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)`, p = sigmoid, over the points of weight 1."""

    def pairs(self, logits, targets, weights):
        probabilities, targets = logits.sigmoid(), targets.mT  # (L, Q, P), (L, P, N)
        if weights is not None:
            weights = weights.unsqueeze(-2)  # (L, 1, P)
            probabilities, targets = probabilities * weights, targets * weights.mT
        overlap = _over_points(probabilities, targets)
        total = probabilities.sum(-1, keepdim=True) + targets.sum(-2).unsqueeze(-2)
        return 1 - (2 * overlap + 1) / (total + 1)

    def rows(self, logits, targets, weights):
        probabilities = logits.sigmoid()
        if weights is not None:
            probabilities, targets = probabilities * weights, targets * weights
        overlap = (probabilities * targets).sum(1)
        return 1 - (2 * overlap + 1) / (probabilities.sum(1) + targets.sum(1) + 1)


def _over_points(rows: Tensor, columns: Tensor) -> Tensor:
    """(L, Q, P) @ (L or 1, P, N). On GPUs PART points at a time, side by side: of so few rows and columns one product
    is done by a few of a hundred multiprocessors."""
    P = rows.shape[-1]
    if rows.device.type != "cuda" or P % PART:
        return rows @ columns
    parts = (P // PART, PART)
    return (rows.unflatten(-1, parts).transpose(1, 2) @ columns.unflatten(-2, parts)).sum(1)


def _mean_of_pairs(of_zero: Tensor, slope: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the points of a loss linear in the target, `of_zero - target * slope`: one product for all pairs."""
    targets, total_weight = targets.mT, of_zero.shape[-1]  # (L, P, N)
    if weights is not None:
        weights = weights.unsqueeze(-2)  # (L, 1, P)
        total_weight = weights.sum(-1, keepdim=True).clamp(min=1)
        of_zero, targets = of_zero * weights, targets * weights.mT
    return (of_zero.sum(-1, keepdim=True) - _over_points(slope, targets)) / total_weight


def _mean_of_rows(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean(1) if weights is None else (losses * weights).sum(1) / weights.sum(1).clamp(min=1)
