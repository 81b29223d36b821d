"""The rules of postprocessing.py for instances and panoptic segments, around any decision what belongs to a mask.

With the plain decision (probability above 0.5) the results are those of postprocessing.py; a test holds them together.
Letters and the first five arguments are those of postprocessing.py. `N` kept queries, `S` segments.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from tqdm import tqdm

from ..model.postprocessing import _check, _check_fraction, masks_to_boxes, resize_mask_logits


def instances_by(
    decide: Callable[[Tensor], Tensor],
    class_logits: Tensor,
    mask_logits: Tensor,
    canvas_size,
    image_size=None,
    target_size=None,
    *,
    top_k: int = 100,
    thing_label_ids: Collection[int] | None = None,
    score_threshold: float = 0.0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """`postprocessing.instance_segmentation`, where `decide` turns a mask's probabilities into the mask.

    Args:
        decide: (H, W) float32 probabilities -> (H, W) bool.
        progress: show a bar over the masks.

    Returns:
        as `instance_segmentation`; scores are class probability x mean mask probability inside the new mask.
    """
    _check_fraction("score_threshold", score_threshold)
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes, device = probabilities.shape[1], probabilities.device
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    wanted = scores * 1.001 >= score_threshold  # a mean mask probability cannot exceed 1, so these need no mask
    if thing_label_ids is not None:
        wanted &= torch.isin(pairs % num_classes, torch.tensor(sorted(thing_label_ids), device=device))
    scores, pairs = scores[wanted], pairs[wanted]
    queries, pair_query = torch.unique(pairs // num_classes, return_inverse=True)

    masks = torch.zeros(len(queries), *sizes[2], dtype=torch.bool, device=device)
    quality = torch.zeros(len(queries), device=device)
    shown = tqdm(queries.tolist(), desc="refining", unit="mask", disable=not progress, leave=False)
    for number, query in enumerate(shown):
        logits = resize_mask_logits(mask_logits[query : query + 1], *sizes)
        inside = logits[0].sigmoid()  # (H, W)
        masks[number] = mask = decide(inside)
        quality[number] = (inside * mask).sum() / (mask.sum() + 1e-6)
    scores = scores * quality[pair_query]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_threshold]
    masks, labels = masks[pair_query[order]], pairs[order] % num_classes
    return {"masks": masks, "scores": scores[order], "labels": labels, "boxes": masks_to_boxes(masks)}


def panoptic_scores(
    class_logits: Tensor,
    mask_logits: Tensor,
    canvas_size,
    image_size=None,
    target_size=None,
    *,
    thresholds: Callable[[Tensor], Tensor] | None = None,
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    stuff_label_ids: Collection[int] = (),
) -> tuple[Tensor, list[dict]]:
    """How much each segment and void claim each pixel, after the original's rules have chosen the segments.

    Args:
        thresholds: (N, H, W) probabilities of the kept queries -> (N,) probabilities from which on a pixel belongs to
            its query; None for 0.5.
        object_mask_threshold, overlap_threshold, stuff_label_ids: as in `postprocessing.panoptic_segmentation`.

    Returns:
        (S + 1, H, W) float32: first void, whose claim is the owner's score x threshold, then score x mask probability
        of each segment. The largest claim, the first of equal ones, makes the panoptic map. And a dict per segment as
        in `panoptic_segmentation`, without "area". All N masks exist at once, at 4 H W bytes each.
    """
    _check_fraction("object_mask_threshold", object_mask_threshold)
    _check_fraction("overlap_threshold", overlap_threshold)
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[1] - 1) & (scores > object_mask_threshold)
    scores, labels = scores[kept], labels[kept]
    if not len(scores):
        return torch.ones(1, *sizes[2], device=scores.device), []
    masks = resize_mask_logits(mask_logits[kept], *sizes).sigmoid()
    needed = torch.full_like(scores, 0.5) if thresholds is None else thresholds(masks)
    hits = masks >= needed[:, None, None]
    areas = hits.flatten(1).sum(1)
    claims = masks.mul_(scores[:, None, None])  # (N, H, W)
    best, owner = claims.max(0)
    inside = hits.gather(0, owner[None])[0]
    owned = owner.flatten().bincount(minlength=len(scores))
    visible = owner[inside].bincount(minlength=len(scores))
    counts = torch.stack([labels, owned, areas, visible], 1).tolist()

    rows, segments, fused = [], [], {}
    survives = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for query, ((label, owned, area, visible), score) in enumerate(zip(counts, scores.tolist(), strict=True)):
        if not (owned and area and visible) or owned / area < overlap_threshold:
            continue
        survives[query] = True
        if label in fused:
            place = fused[label]
            rows[place] = torch.maximum(rows[place], claims[query])
            segments[place]["score"] = max(segments[place]["score"], score)
            continue
        is_stuff = label in stuff_label_ids
        if is_stuff:
            fused[label] = len(rows)
        rows.append(claims[query])
        segments.append({"id": len(rows), "label_id": label, "was_fused": is_stuff, "score": score})
    void = (needed * scores)[owner] * (1 - 1e-6)  # a pixel exactly at the threshold is the segment's
    void = torch.where(inside & survives[owner], void, torch.maximum(void, best))
    return torch.stack([void, *rows]), segments


def panoptic_result(winner: Tensor, segments: list[dict]) -> tuple[Tensor, list[dict]]:
    """(H, W) position of the winning claim, and its segments, as `postprocessing.panoptic_segmentation` returns them.

    Segments that have no pixel left are dropped and the others numbered anew.
    """
    areas = winner.flatten().bincount(minlength=len(segments) + 1)[1:].tolist()
    ids, kept = [0], []
    for segment, area in zip(segments, areas, strict=True):
        if area:
            kept.append({**segment, "id": len(kept) + 1, "area": area})
        ids.append(len(kept) if area else 0)
    return torch.tensor(ids, dtype=torch.int32, device=winner.device)[winner], kept
