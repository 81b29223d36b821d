"""Logits of one image → semantic, panoptic and instance results; pure functions of tensors, on the logits' device.

Letters: `Q` queries, `K` classes, `N` kept queries or instances, `C` any channels. Every result starts from the same
arguments:

    class_logits: (Q, K + 1), the last column is "no object".
    mask_logits: (Q, h, w), the image's own part of the model output, at stride 4 of the canvas.
    canvas_size: (rows, columns) of the zero-padded input that the network saw, in pixels.
    image_size: (rows, columns) of the image inside the canvas, at its top left; None means the whole canvas.
    target_size: (H, W) of the result, usually the photo's size on disk; None means image_size.

Half-precision logits are computed on in float32. Sizes that contradict each other and logits that are nan raise
ValueError.
"The original" is facebookresearch/Mask2Former (`maskformer_model.py`); the paper is arXiv 2112.01527.
"""

import reprlib
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from .argument_checks import as_tensor, check_fractions, check_labels
from .canvas import crop_to_canvas
from .cpu_layout import chunk_length
from .mask_resizing import check_sizes, query_chunks, resize_rows, source_rows

# What results are made by at every door unless told otherwise. The panoptic thresholds are the original's
# (OBJECT_MASK_THRESHOLD, OVERLAP_THRESHOLD), and so is the number of instances (DETECTIONS_PER_IMAGE). The original
# has no lowest score for instances: 0.5 is transformers', for people who look at results; metrics take 0.
PANOPTIC_THRESHOLD = 0.8
INSTANCE_THRESHOLD = 0.5
OVERLAP_THRESHOLD = 0.8
MASK_THRESHOLD = 0.5
MAX_INSTANCES = 100


def semantic_scores(
    class_logits, mask_logits, canvas_size, image_size=None, target_size=None, *, resize_masks_first=True
):
    """Score of every class at every pixel: sum over queries of class probability × mask probability (paper §3.1).

    Args:
        resize_masks_first: the original resizes mask logits before mixing them into classes for models that also
            serve panoptic or instance results (True); for semantic-only models it mixes at canvas size, then crops
            and resizes the scores (False).

    Returns:
        (K, H, W) float32; K * H * W floats of memory, see `semantic_map` when only the winner is wanted.
    """
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    scores = class_logits.new_empty(class_logits.shape[1] - 1, *sizes[2])
    for start, stop, band in _semantic_bands(class_logits, mask_logits, *sizes, resize_masks_first):
        scores[:, start:stop] = band
    return scores


def semantic_map(
    class_logits, mask_logits, canvas_size, image_size=None, target_size=None, *, resize_masks_first=True
):
    """Best class of every pixel: the argmax of `semantic_scores`, computed by bands of rows.

    Returns:
        (H, W) int64 class ids; the first class wins a tie.
    """
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    classes = torch.empty(sizes[2], dtype=torch.int64, device=class_logits.device)
    for start, stop, band in _semantic_bands(class_logits, mask_logits, *sizes, resize_masks_first):
        classes[start:stop] = band.argmax(0)
    return classes


def panoptic_segmentation(
    class_logits,
    mask_logits,
    canvas_size,
    image_size=None,
    target_size=None,
    *,
    object_mask_threshold=PANOPTIC_THRESHOLD,
    overlap_threshold=OVERLAP_THRESHOLD,
    mask_threshold=MASK_THRESHOLD,
    stuff_label_ids=(),
    decide: Callable[[Tensor], Tensor] | None = None,
):
    """Give every pixel to at most one segment, by the original's rules.

    A query is kept when its best class is an object and scores above object_mask_threshold (strictly). A pixel
    belongs to the kept query with the largest score × mask probability, and is void unless that query's own mask
    probability reaches mask_threshold there. A query is dropped when it owns less than overlap_threshold of its
    thresholded area. All queries of a stuff class share one segment.

    Args:
        stuff_label_ids: class ids whose queries are merged into one segment per class.
        decide: (n, H, W) float32 mask probabilities → (n, H, W) bool, what belongs to each mask, instead of
            mask_threshold.

    Returns:
        A pair: (H, W) int32 map with 0 for void, and one dict per segment with "id" (1, 2, ... in the map),
        "label_id", "was_fused" (label_id is in stuff_label_ids), "score" (class probability, the best one of merged
        queries) and "area" in pixels.
    """
    check_labels(stuff_label_ids=stuff_label_ids)
    contest, _ = _contest(
        (class_logits, mask_logits, canvas_size, image_size, target_size),
        object_mask_threshold,
        overlap_threshold,
        mask_threshold,
        decide,
    )
    places, segments = _accept(contest, overlap_threshold, stuff_label_ids)
    ids = torch.tensor([0, *(place + 1 for place in places)], dtype=torch.int32, device=contest.owner.device)
    return ids[contest.owner + 1] * contest.inside, segments


def panoptic_claims(
    class_logits,
    mask_logits,
    canvas_size,
    image_size=None,
    target_size=None,
    *,
    object_mask_threshold=PANOPTIC_THRESHOLD,
    overlap_threshold=OVERLAP_THRESHOLD,
    mask_threshold=MASK_THRESHOLD,
    stuff_label_ids=(),
):
    """How much void and every segment of `panoptic_segmentation` claim each pixel, for those who weigh them anew.

    Returns:
        (S + 1, H, W) float32: first void, whose claim is the owner's score × mask_threshold, then score × mask
        probability of each of the S segments; and their dicts. The largest claim, the first of equal ones, makes the
        map of `panoptic_segmentation`.
    """
    check_labels(stuff_label_ids=stuff_label_ids)
    contest, mask_logits = _contest(
        (class_logits, mask_logits, canvas_size, image_size, target_size),
        object_mask_threshold,
        overlap_threshold,
        mask_threshold,
    )
    places, segments = _accept(contest, overlap_threshold, stuff_label_ids)
    survivors = [query for query, place in enumerate(places) if place >= 0]
    claims = contest.best.new_zeros(len(segments) + 1, *contest.best.shape)
    for start, logits in query_chunks(mask_logits[survivors], *contest.sizes):
        for query, logit in zip(survivors[start : start + len(logits)], logits, strict=True):
            row = claims[places[query] + 1]
            torch.maximum(row, logit.sigmoid_() * contest.scores[query], out=row)
    kept = torch.tensor([False, *(place >= 0 for place in places)], device=claims.device)
    threshold = mask_threshold * torch.cat([contest.scores.new_ones(1), contest.scores])
    void = threshold[contest.owner + 1] * (1 - 1e-6)  # a pixel exactly at the threshold is the segment's
    claims[0] = torch.where(contest.inside & kept[contest.owner + 1], void, torch.maximum(void, contest.best))
    return claims, segments


class _Contest(NamedTuple):
    """Which of the N kept queries owns each pixel, and what the rules count of each query."""

    sizes: tuple
    scores: Tensor  # (N,)
    best: Tensor  # (H, W) largest score × mask probability, -1 without a query
    owner: Tensor  # (H, W) int32, the query that has it, -1 without one
    inside: Tensor  # (H, W) bool, whether the pixel belongs to its owner's mask
    counts: list  # per query label, owned pixels, pixels of its mask, pixels that are both


def _contest(logits, object_mask_threshold, overlap_threshold, mask_threshold, decide=None) -> tuple[_Contest, Tensor]:
    """The contest, and the mask logits (N, h, w) of the queries that take part in it."""
    check_fractions(
        object_mask_threshold=object_mask_threshold, overlap_threshold=overlap_threshold, mask_threshold=mask_threshold
    )
    class_logits, mask_logits, sizes = _check(*logits)
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[1] - 1) & (scores > object_mask_threshold)
    scores, labels, mask_logits = scores[kept], labels[kept], mask_logits[kept]  # (N,), (N,), (N, h, w)
    best = torch.full(sizes[2], -1.0, device=scores.device)
    owner = torch.full(sizes[2], -1, dtype=torch.int32, device=scores.device)
    inside = torch.zeros(sizes[2], dtype=torch.bool, device=scores.device)
    areas = [labels[:0]]
    for start, logits in query_chunks(mask_logits, *sizes):
        masks = logits.sigmoid()
        hits = masks >= mask_threshold if decide is None else decide(masks)
        areas.append(hits.flatten(1).sum(1))
        value, index = (masks * scores[start : start + len(masks), None, None]).max(0)  # (H, W)
        better = value > best  # strict: the first of equal queries wins, across chunks as within one
        best = torch.maximum(best, value)
        inside = torch.where(better, hits.gather(0, index[None])[0], inside)
        owner = torch.where(better, index.int() + start, owner)
    owned = (owner + 1).flatten().bincount(minlength=len(scores) + 1)[1:]
    visible = owner[inside].bincount(minlength=len(scores))
    counts = torch.stack([labels, owned, torch.cat(areas), visible], 1).tolist()  # the one copy of counts to the host
    return _Contest(sizes, scores, best, owner, inside, counts), mask_logits


def _accept(contest: _Contest, overlap_threshold, stuff_label_ids) -> tuple[list[int], list[dict]]:
    """Per query the position of its segment, -1 if it is dropped; and the segments."""
    places, segments, fused = [], [], {}
    for (label, owned, area, visible), score in zip(contest.counts, contest.scores.tolist(), strict=True):
        if not (owned and area and visible) or owned / area < overlap_threshold:
            places.append(-1)
            continue
        place = fused.get(label)
        if place is None:
            place, is_stuff = len(segments), label in stuff_label_ids
            segments.append({"id": place + 1, "label_id": label, "was_fused": is_stuff, "score": score, "area": 0})
            if is_stuff:
                fused[label] = place
        segments[place]["score"] = max(segments[place]["score"], score)
        segments[place]["area"] += visible
        places.append(place)
    return places, segments


def instance_segmentation(
    class_logits,
    mask_logits,
    canvas_size,
    image_size=None,
    target_size=None,
    *,
    top_k=MAX_INSTANCES,
    thing_label_ids=None,
    score_threshold=0.0,
    mask_threshold=MASK_THRESHOLD,
    decide: Callable[[Tensor], Tensor] | None = None,
):
    """The top_k best (query, class) pairs as overlapping instances, by the original's rules.

    An instance's score is its class probability × the mean mask probability inside its mask; a query may appear
    with several classes.

    Args:
        top_k: pairs taken by class probability, before any filter; at most Q * K.
        thing_label_ids: class ids that count as instances, None for all. The original filters so, after the top_k,
            on panoptic models.
        score_threshold: instances below it are left out (the original has no such rule: 0).
        mask_threshold: mask probability above which (strictly) a pixel belongs to the instance.
        decide: (n, H, W) float32 mask probabilities → (n, H, W) bool, what belongs to each mask, instead of
            mask_threshold.

    Returns:
        dict sorted by falling score: "masks" (N, H, W) bool, "scores" (N,) float32, "labels" (N,) int64, "boxes"
        (N, 4) float32 as (x0, y0, x1, y1) pixel edges of the mask, zeros for an empty one, and "queries" (N,) int64.
    """
    check_fractions(score_threshold=score_threshold, mask_threshold=mask_threshold)
    if not isinstance(top_k, Integral) or top_k < 1 or isinstance(top_k, bool):
        shown = reprlib.repr(top_k)
        raise ValueError(f"top_k={shown} must be at least 1; pass the number of instances wanted, for example 100.")
    if thing_label_ids is not None:
        check_labels(thing_label_ids=thing_label_ids)
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    num_classes, device = class_logits.shape[1] - 1, class_logits.device
    scores = class_logits.softmax(-1)[:, :-1].flatten()  # (Q * K,)
    scores, pairs = scores.topk(min(top_k, len(scores)))
    wanted = scores * 1.001 >= score_threshold  # a mean mask probability cannot exceed 1, so these need no mask
    if thing_label_ids is not None:
        wanted &= torch.isin(pairs % num_classes, torch.tensor(sorted(thing_label_ids), device=device))
    scores, pairs = scores[wanted], pairs[wanted]
    queries, pair_query = torch.unique(pairs // num_classes, return_inverse=True)  # every mask is resized once

    logit_threshold = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()
    masks = torch.empty(len(queries), *sizes[2], dtype=torch.bool, device=device)
    quality = torch.empty(len(queries), device=device)
    for start, logits in query_chunks(mask_logits[queries], *sizes):
        chunk = slice(start, start + len(logits))
        probabilities = logits.sigmoid()
        masks[chunk] = hits = logits > logit_threshold if decide is None else decide(probabilities)
        inside = probabilities.mul_(hits).flatten(1).sum(1)
        quality[chunk] = inside / (hits.flatten(1).sum(1) + 1e-6)

    scores = scores * quality[pair_query]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_threshold]  # (N,)
    labels, scores, boxes = pairs[order] % num_classes, scores[order], masks_to_boxes(masks)[pair_query[order]]
    found = queries[pair_query[order]]
    return {"masks": masks[pair_query[order]], "scores": scores, "labels": labels, "boxes": boxes, "queries": found}


def stack_instances(masks, overlap_threshold=0.0):
    """Lay (N, H, W) bool masks on one map, the first on top, without empty ones.

    Args:
        overlap_threshold: leave out a mask of which those on top leave less than this fraction visible.

    Returns:
        (H, W) int32 map of positions in the second result, -1 where there is no mask; and the list of the masks' N.
    """
    check_fractions(overlap_threshold=overlap_threshold)
    masks = as_tensor("masks", masks, 3)
    stacked = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
    kept = []
    for n in masks.flatten(1).any(1).nonzero()[:, 0].tolist():
        visible = masks[n] & (stacked < 0)
        if overlap_threshold > 0 and visible.sum() < overlap_threshold * masks[n].sum():
            continue
        stacked.masked_fill_(visible, len(kept))
        kept.append(n)
    return stacked, kept


def masks_to_boxes(masks):
    """Tight boxes of (N, H, W) bool masks → (N, 4) float32 (x0, y0, x1, y1); x1, y1 are exclusive, empty is zeros."""
    masks, edges = as_tensor("masks", masks, 3), []
    for used in (masks.any(1).int(), masks.any(2).int()):  # (N, W) columns, (N, H) rows
        first, last = used.argmax(1), used.shape[1] - used.flip(1).argmax(1)
        edges.append(torch.stack([first, last], 1) * used.any(1, keepdim=True))
    return torch.stack(edges, 2).flatten(1).float()  # (N, 4)


def logits_per_image(outputs, target_sizes=None, dimensions=4) -> Iterator[tuple]:
    """Each image's (class_logits, mask_logits, canvas_size, image_size, target_size), freed of the batch's padding.

    Args:
        outputs: of the model, with class_queries_logits (B, Q, K + 1), masks_queries_logits (B, Q, h, w), image_sizes
            and canvas_sizes (B, 2) and mask_strides (B,). Without the last three, as from transformers' own model, the
            whole tensor counts as image, at a stride of 4.
        target_sizes: B pairs (rows, columns), or None for the images' own sizes.
        dimensions: of masks_queries_logits; clips have 5, (B, Q, T, h, w).

    Raises:
        TypeError: for outputs of other types; ValueError: for those that do not belong together.
    """
    if not hasattr(outputs, "class_queries_logits") or not hasattr(outputs, "masks_queries_logits"):
        raise TypeError(
            f"outputs is a {type(outputs).__name__} without class_queries_logits and masks_queries_logits; pass what "
            "the model returns with return_dict=True."
        )
    if outputs.masks_queries_logits is None:
        raise ValueError(
            "outputs has no masks_queries_logits, as in training with labels; run the model without labels, or with "
            "output_auxiliary_logits=True."
        )
    classes = as_tensor("class_queries_logits", outputs.class_queries_logits, 3)
    masks = as_tensor("masks_queries_logits", outputs.masks_queries_logits, dimensions)
    fields = {name: getattr(outputs, name, None) for name in ("canvas_sizes", "image_sizes", "mask_strides")}
    fields = {name: None if field is None else as_tensor(name, field) for name, field in fields.items()}
    if target_sizes is not None and not hasattr(target_sizes, "__len__"):
        raise TypeError(f"target_sizes={target_sizes!r} must be a list of pairs (rows, columns), one per image.")
    for name, value in {"masks_queries_logits": masks, **fields, "target_sizes": target_sizes}.items():
        if value is not None and len(value) != len(classes):
            raise ValueError(f"{name} has {len(value)} entries for {len(classes)} images; pass one each.")
    canvases, sizes, strides = (None if field is None else field.tolist() for field in fields.values())
    strides = [4] * len(classes) if strides is None else strides
    if canvases is None:
        canvases = [[stride * side for side in masks.shape[-2:]] for stride in strides]
    sizes = canvases if sizes is None else sizes
    for b, (canvas, stride) in enumerate(zip(canvases, strides, strict=True)):
        part = crop_to_canvas(masks[b], canvas, stride)
        yield classes[b], part, tuple(canvas), sizes[b], None if target_sizes is None else target_sizes[b]


def _check(class_logits, mask_logits, canvas_size, image_size, target_size):
    class_logits, mask_logits = as_tensor("class_logits", class_logits), as_tensor("mask_logits", mask_logits)
    if class_logits.ndim != 2 or mask_logits.ndim != 3 or len(class_logits) != len(mask_logits):
        raise ValueError(
            f"class_logits {tuple(class_logits.shape)} and mask_logits {tuple(mask_logits.shape)} must be (Q, K + 1) "
            "and (Q, h, w) of one image with the same Q; index the batch first."
        )
    for name, logits in (("class_logits", class_logits), ("mask_logits", mask_logits)):
        if logits.isnan().any():
            raise ValueError(f"{name} has values that are not numbers; is the image finite, and float16 wide enough?")
    sizes = check_sizes(canvas_size, image_size, target_size)
    return class_logits.detach().float(), mask_logits.detach().float(), sizes


def _semantic_bands(class_logits, mask_logits, canvas_size, image_size, target_size, resize_masks_first):
    """Yield (first row, end row, (K, rows, W) class scores) from top to bottom.

    Rows, not queries, are the unit here: a class score needs all queries, and all classes at once do not fit.
    """
    width = max(target_size[1], canvas_size[1] * -(-image_size[0] // target_size[0]))
    step = chunk_length(max(class_logits.shape) * width, mask_logits.device)
    bands = [(start, min(start + step, target_size[0])) for start in range(0, target_size[0], step)]
    if not resize_masks_first and target_size != image_size:
        scores = semantic_scores(class_logits, mask_logits, canvas_size, image_size)  # (K, *image_size)
        for start, stop in bands:
            yield start, stop, resize_rows(scores, target_size, start, stop)
        return
    probabilities = class_logits.softmax(-1)[:, :-1].T  # (K, Q)
    for start, stop in bands:
        upper, lower, _ = source_rows(image_size[0], target_size[0], start, stop)
        top, bottom = int(upper[0]), int(lower[-1]) + 1
        logits = resize_rows(mask_logits, canvas_size, top, bottom)[..., : image_size[1]]
        masks = resize_rows(logits, target_size, start, stop, top, image_size[0]).sigmoid()  # (Q, rows, W)
        yield start, stop, (probabilities @ masks.flatten(1)).unflatten(1, masks.shape[1:])
