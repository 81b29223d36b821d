"""How queries share out the pixels of an image: the original's panoptic rules in tensors alone.

Results in PyTorch and exported graphs run these lines, so nothing here depends on a value in Python. Letters: `N`
queries that take part, `S` segments. Row 0 of what has N + 1 rows is nobody: pixels that no query claims are theirs,
and an image without queries is no case of its own.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

CACHED = 2**16  # pixels whose claims a CPU keeps in its second cache, with what they are compared with


class Pixels(NamedTuple):
    """What a contest knows of each pixel; the fields of `Contest`."""

    best: Tensor
    owner: Tensor
    inside: Tensor


class Contest(NamedTuple):
    """Who owns each pixel, and what the rules count of each query."""

    best: Tensor  # (H, W) largest score × mask probability, -1 without a query
    owner: Tensor  # (H, W) int64, number of the query that has it, from 1; 0 for nobody
    inside: Tensor  # (H, W) bool, whether the pixel belongs to its owner's mask
    areas: Tensor  # (N + 1,) pixels of each mask
    owned: Tensor  # (N + 1,) pixels of which the query is the owner
    visible: Tensor  # (N + 1,) pixels that are both

    @property
    def holder(self) -> Tensor:
        """(H, W) int64, the owner of pixels that belong to its mask; 0 for the others."""
        return self.owner * self.inside


class Segments(NamedTuple):
    numbers: Tensor  # (N + 1,) int64, number of each query's segment, from 1; 0 for nobody and dropped queries
    labels: Tensor  # (S,)
    scores: Tensor  # (S,)
    areas: Tensor  # (S,)


def kept_queries(class_logits: Tensor, threshold) -> tuple[Tensor, Tensor, Tensor]:
    """(Q,) bool, which queries take part; score and label of each: (Q, K + 1) logits, the last class no object."""
    scores, labels = class_logits.softmax(-1).max(-1)
    return (labels != class_logits.shape[1] - 1) & (scores > threshold), scores, labels


def contest(
    scores: Tensor, chunks: Iterable[tuple[int, Tensor]], size: tuple[int, int], decide: Callable[[Tensor], Tensor]
) -> Contest:
    """A pixel belongs to the query with the largest score × mask probability, the first of equal ones.

    Args:
        scores: (N,).
        chunks: (first query, (n, H, W) mask logits of it and its followers), in turn.
        size: (H, W).
        decide: (n, H, W) mask probabilities → bool, what belongs to each mask.
    """
    pixels = Pixels(
        scores.new_full(size, -1.0),
        torch.zeros(size, dtype=torch.int64, device=scores.device),
        torch.zeros(size, dtype=torch.bool, device=scores.device),
    )
    claim = _claim_in_turn if _on_cpu(scores) else _claim
    areas = [pixels.owner.new_zeros(1)]
    for start, logits in chunks:
        masks = logits.sigmoid()
        hits = decide(masks)
        areas.append(mask_areas(hits))
        claims = masks.mul_(scores[start : start + masks.shape[0], None, None])
        pixels = claim(pixels, claims, hits, start)
    best, owner, inside = pixels
    kinds = (2 * owner + inside).flatten()
    counts = owner.new_zeros(2 * (scores.shape[0] + 1)).scatter_add(0, kinds, torch.ones_like(kinds)).view(-1, 2)
    return Contest(best, owner, inside, torch.cat(areas), counts.sum(1), counts[:, 1])


def _claim(pixels: Pixels, claims: Tensor, hits: Tensor, start: int) -> Pixels:
    """Who has each pixel once the (n, H, W) claims of queries from `start` on are heard, whose masks are `hits`."""
    best, index = torch.cat([pixels.best[None], claims]).max(0)
    inside = torch.cat([pixels.inside[None], hits]).gather(0, index[None])[0]
    return Pixels(best, torch.where(index > 0, index + start, pixels.owner), inside)


def _claim_in_turn(pixels: Pixels, claims: Tensor, hits: Tensor, start: int) -> Pixels:
    """The same in place, one query after the other over pixels that stay in a CPU's caches."""
    states = zip(*(state.view(-1).split(CACHED) for state in pixels), strict=True)
    some = zip(*(rows.flatten(1).split(CACHED, dim=1) for rows in (claims, hits)), strict=True)
    for (best, owner, inside), (claims, hits) in zip(states, some, strict=True):
        for query, (claim, hit) in enumerate(zip(claims, hits, strict=True), start=start + 1):
            wins = claim > best
            torch.maximum(best, claim, out=best)
            owner.masked_fill_(wins, query)
            torch.where(wins, hit, inside, out=inside)
    return pixels


def mask_areas(masks: Tensor) -> Tensor:
    """(n,) pixels of (n, H, W) bool masks; on CPUs a sum would make an int64 of every pixel first."""
    if len(masks) and _on_cpu(masks):
        return torch.stack([mask.count_nonzero() for mask in masks])
    return masks.flatten(1).sum(1)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def accept(found: Contest, scores: Tensor, labels: Tensor, is_stuff: Tensor, overlap_threshold) -> Segments:
    """A query is dropped when it owns too little of its mask; all queries of a stuff class share one segment.

    Args:
        scores, labels, is_stuff: (N,).
        overlap_threshold: share of its mask's pixels that a query has to own; a float64 if it is a tensor.
    """
    scores, labels, is_stuff = (torch.cat([x.new_zeros(1), x]) for x in (scores, labels, is_stuff))
    accepted = (found.areas > 0) & (found.visible > 0)
    precise = torch.float32 if labels.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    accepted = accepted & (found.owned.to(precise) / found.areas.to(precise) >= overlap_threshold)
    rows = torch.arange(labels.shape[0], device=labels.device)
    same = (labels[:, None] == labels) & is_stuff[:, None] & is_stuff
    together = (same | (rows[:, None] == rows)) & accepted  # (N + 1, N + 1)
    first = together.int().argmax(1)
    leads = accepted & (first == rows)
    numbers = leads.long().cumsum(0)[first] * accepted
    members = together[leads].to(scores.dtype)  # (S, N + 1)
    return Segments(numbers, labels[leads], (members * scores).amax(1), (together[leads] * found.visible).sum(1))
