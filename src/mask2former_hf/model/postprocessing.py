"""Logits of one image → semantic, panoptic and instance results; pure functions of tensors, on the logits' device.

Letters: `Q` queries, `K` classes, `N` kept queries or instances, `C` any channels. Every result starts from the same
arguments:

    class_logits: (Q, K + 1), the last column is "no object".
    mask_logits: (Q, h, w), the image's own part of the model output, at stride 4 of the canvas.
    canvas_size: (rows, columns) of the zero-padded input that the network saw, in pixels.
    image_size: (rows, columns) of the image inside the canvas, at its top left; None means the whole canvas.
    target_size: (H, W) of the result, usually the photo's size on disk; None means image_size.

Half-precision logits are computed on in float32. Sizes that contradict each other and logits that are nan or infinite
raise ValueError; class logits alone may be -inf, of a class that cannot be (`argument_checks.check_logits`).
"The original" is facebookresearch/Mask2Former (`maskformer_model.py`); the paper is arXiv 2112.01527.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .argument_checks import as_tensor, check_logits
from .canvas import crop_to_canvas
from .cpu_layout import chunk_length
from .instance_masks import masks_to_boxes, thresholded
from .mask_resizing import check_sizes, query_chunks, resize_rows, source_rows
from .number_checks import check_count, check_fractions, check_labels
from .panoptic_rules import Contest, accept, contest, kept_queries
from .result_blocks import BlockContest, classes_in_blocks, contest_in_blocks
from .result_defaults import CERTAIN, MASK_THRESHOLD, MAX_INSTANCES, OVERLAP_THRESHOLD, PANOPTIC_THRESHOLD


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
    """Best class of every pixel: the argmax of `semantic_scores`, by bands of rows, or on CPUs by `result_blocks`.

    Returns:
        (H, W) int64 class ids; the first class wins a tie.
    """
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    if mask_logits.device.type == "cpu":
        probabilities = class_logits.softmax(-1)[:, :-1].T  # (K, Q)
        return classes_in_blocks(probabilities, mask_logits, sizes, resize_masks_first)
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
        queries), "area" in pixels and "query" (of merged ones the first).
    """
    check_labels(stuff_label_ids=stuff_label_ids)
    found, _ = _contest(
        (class_logits, mask_logits, canvas_size, image_size, target_size),
        object_mask_threshold,
        overlap_threshold,
        mask_threshold,
        decide,
    )
    numbers, segments = _segments(found, stuff_label_ids, overlap_threshold)
    holder = found.contest.holder
    return numbers.int().index_select(0, holder.flatten()).view_as(holder), segments


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
    decide: Callable[[Tensor], Tensor] | None = None,
):
    """How much void and every segment of `panoptic_segmentation` claim each pixel, for those who weigh them anew.

    Returns:
        (S + 1, H, W) float32: first void, whose claim is the owner's score × mask_threshold, then score × mask
        probability of each of the S segments; and their dicts. The largest claim, the first of equal ones, makes the
        map of `panoptic_segmentation`.
    """
    check_labels(stuff_label_ids=stuff_label_ids)
    found, mask_logits = _contest(
        (class_logits, mask_logits, canvas_size, image_size, target_size),
        object_mask_threshold,
        overlap_threshold,
        mask_threshold,
        decide,
        every_pixel=True,
    )
    numbers, segments = _segments(found, stuff_label_ids, overlap_threshold)
    best, owner, inside = found.contest[:3]
    places = numbers[1:].tolist()
    survivors = [query for query, place in enumerate(places) if place]
    claims = best.new_zeros(len(segments) + 1, *best.shape)
    for start, logits in query_chunks(mask_logits[survivors], *found.sizes):
        for query, logit in zip(survivors[start : start + len(logits)], logits, strict=True):
            row = claims[places[query]]
            torch.maximum(row, logit.sigmoid_() * found.scores[query], out=row)
    threshold = mask_threshold * torch.cat([found.scores.new_ones(1), found.scores])
    void = threshold[owner] * (1 - 1e-6)  # a pixel exactly at the threshold is the segment's
    less = torch.minimum(void, best * (1 - 1e-6))  # `decide` may give a pixel below mask_threshold to the segment
    claims[0] = torch.where(inside & (numbers > 0)[owner], less, torch.maximum(void, best))
    return claims, segments


class _Found(NamedTuple):
    """A contest of N queries with their scores, labels and numbers (N,)."""

    contest: Contest | BlockContest
    scores: Tensor
    labels: Tensor
    queries: Tensor
    sizes: tuple


def _contest(
    logits, object_mask_threshold, overlap_threshold, mask_threshold, decide=None, every_pixel=False
) -> tuple[_Found, Tensor]:
    """The contest, and the mask logits (N, h, w) of the queries that take part in it.

    Args:
        every_pixel: whether it has to be a `Contest`, which knows all of every pixel.
    """
    check_fractions(
        object_mask_threshold=object_mask_threshold, overlap_threshold=overlap_threshold, mask_threshold=mask_threshold
    )
    class_logits, mask_logits, sizes = _check(*logits)
    _check_has_segments(class_logits)
    kept, scores, labels = kept_queries(class_logits, object_mask_threshold)
    scores, labels, mask_logits = scores[kept], labels[kept], mask_logits[kept]  # (N,), (N,), (N, h, w)
    if decide is None and not every_pixel and len(scores) and mask_logits.device.type == "cpu":
        found = contest_in_blocks(scores, mask_logits, sizes, mask_threshold)
    else:
        decide = decide or (lambda masks: masks >= mask_threshold)
        found = contest(scores, query_chunks(mask_logits, *sizes), sizes[2], decide)
    return _Found(found, scores, labels, kept.nonzero()[:, 0], sizes), mask_logits


def _segments(found: _Found, stuff_label_ids, overlap_threshold) -> tuple[Tensor, list[dict]]:
    """(N + 1,) the number of each query's segment, as in `Segments`; and the segments."""
    stuff = torch.tensor(sorted(stuff_label_ids), dtype=torch.int64, device=found.labels.device)
    is_stuff = torch.isin(found.labels, stuff)
    accepted = accept(found.contest, found.scores, found.labels, is_stuff, overlap_threshold)
    rows = zip(torch.stack([accepted.labels, accepted.areas], 1).tolist(), accepted.scores.tolist(), strict=True)
    segments = [
        {"id": number, "label_id": label, "was_fused": label in stuff_label_ids, "score": score, "area": area}
        for number, ((label, area), score) in enumerate(rows, start=1)
    ]
    for number, query in zip(accepted.numbers[1:].tolist(), found.queries.tolist(), strict=True):
        if number:
            segments[number - 1].setdefault("query", query)
    return accepted.numbers, segments


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
    check_count(top_k=top_k)
    if thing_label_ids is not None:
        check_labels(thing_label_ids=thing_label_ids)
    class_logits, mask_logits, sizes = _check(class_logits, mask_logits, canvas_size, image_size, target_size)
    _check_has_segments(class_logits)
    num_classes, device = class_logits.shape[1] - 1, class_logits.device
    scores = class_logits.softmax(-1)[:, :-1].flatten()  # (Q * K,)
    scores, pairs = scores.topk(min(top_k, len(scores)))
    wanted = scores * 1.001 >= score_threshold  # a mean mask probability cannot exceed 1, so these need no mask
    if thing_label_ids is not None:
        wanted &= torch.isin(pairs % num_classes, torch.tensor(sorted(thing_label_ids), device=device))
    scores, pairs = scores[wanted], pairs[wanted]
    queries, pair_query = torch.unique(pairs // num_classes, return_inverse=True)  # every mask is resized once

    logit_threshold = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()
    found = thresholded(mask_logits[queries], sizes, logit_threshold, decide)

    scores = scores * found.quality[pair_query]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_threshold]  # (N,)
    rows = pair_query[order]
    return {
        "masks": found.masks(rows),
        "scores": scores[order],
        "labels": pairs[order] % num_classes,
        "boxes": found.boxes[rows],
        "queries": queries[rows],
    }


def stack_instances(masks, overlap_threshold=0.0, boxes=None):
    """Lay (N, H, W) bool masks on one map, the first on top, without empty ones.

    Args:
        overlap_threshold: leave out a mask of which those on top leave less than this fraction visible.
        boxes: (N, 4) of the masks, outside of which no pixel is looked at; None for those of `masks_to_boxes`.

    Returns:
        (H, W) int32 map of positions in the second result, -1 where there is no mask; and the list of the masks' N.
    """
    check_fractions(overlap_threshold=overlap_threshold)
    masks = as_tensor("masks", masks, 3)
    boxes = masks_to_boxes(masks) if boxes is None else as_tensor("boxes", boxes, 2)
    stacked = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
    kept = []
    for n, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        mask, below = masks[n, top:bottom, left:right], stacked[top:bottom, left:right]
        visible = mask & (below < 0)
        if right == left or (overlap_threshold > 0 and visible.sum() < overlap_threshold * mask.sum()):
            continue
        below.masked_fill_(visible, len(kept))
        kept.append(n)
    return stacked, kept


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
    check_logits(class_logits, mask_logits)
    sizes = check_sizes(canvas_size, image_size, target_size)
    return class_logits.detach().float(), mask_logits.detach().float(), sizes


def _check_has_segments(class_logits: Tensor):
    """Refuse the output of a head that classifies pixels, where every query is a class (`per_pixel_head`)."""
    Q, columns = class_logits.shape
    if columns == Q + 1 and torch.equal(
        (class_logits / CERTAIN).round(), torch.full_like(class_logits, -1).fill_diagonal_(0)
    ):
        raise ValueError(
            "class_logits are of a model that classifies pixels (head_type of its config), which knows no segments; "
            "its results are semantic, of post_process_semantic_segmentation or task='semantic'."
        )


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
