"""Test-time augmentation: the image at several sizes, as it is and mirrored, one pass of the network at a time.

Semantic results are the mean of the class score maps, as in the original (`test_time_augmentation.py`). For instance
and panoptic results, which the original does not have, the queries of every view are matched with those of the first
view, and class and mask probabilities averaged: what comes out is a model output like any other. An object that the
first view misses stays missed.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.argument_checks import check_logits
from ..model.canvas import image_sizes_of
from ..model.mask_losses import loss_weights, mask_terms
from ..model.matcher import assign
from ..model.postprocessing import logits_per_image, semantic_scores

# In units of the test size: those of the original's configs for ADE20K, the test size itself first.
FACTORS = (1.0, 0.5, 0.75, 1.25, 1.5, 1.75)
MIN_OVERLAP = 0.5  # IoU from which on matched queries count as the same object


def augmented_sizes(size, factors: Sequence[float] = FACTORS) -> list[dict[str, int]]:
    """A processor's `size` times each factor."""
    lengths = {name: length for name, length in dict(size).items() if length}
    return [{name: max(1, round(length * factor)) for name, length in lengths.items()} for factor in factors]


@torch.inference_mode()
def augmented_semantic_scores(
    model,
    processor,
    image,
    target_size: tuple[int, int],
    sizes: Sequence[dict] | None = None,
    flip: bool = True,
    *,
    resize_masks_first: bool = True,
) -> Tensor:
    """Mean over all views of the score of every class at every pixel.

    Args:
        image: one image, as the processor takes it.
        target_size: (H, W) of the result.
        sizes: of the views, as the processor's `size`; None for `augmented_sizes(processor.size)`.
        flip: every size also mirrored.
        resize_masks_first: see `postprocessing.semantic_scores`.

    Returns:
        (K, H, W) float32; two such maps exist at a time.
    """
    total, count = None, 0
    for outputs, flipped in _views(model, processor, image, sizes, flip):
        logits = next(logits_per_image(outputs, [target_size]))
        scores = semantic_scores(*logits, resize_masks_first=resize_masks_first)
        scores = scores.flip(-1) if flipped else scores
        total, count = scores if total is None else total.add_(scores), count + 1
    return total.div_(count)


@torch.inference_mode()
def augmented_outputs(model, processor, image, sizes: Sequence[dict] | None = None, flip: bool = True):
    """The model's output for the first view, with probabilities averaged over all views.

    A query's probabilities are averaged with those of the query that matches it in another view if the two masks
    overlap by an IoU of at least 0.5; masks are compared and averaged on the grid of the first view's mask logits.

    Args:
        image, sizes, flip: as in `augmented_semantic_scores`; the first size, not mirrored, is the first view.

    Returns:
        the output of the first view with new `class_queries_logits` (1, Q, K + 1) and `masks_queries_logits`
        (1, Q, h, w), for the processor's `post_process_...` methods.
    """
    first = None
    for outputs, flipped in _views(model, processor, image, sizes, flip):
        class_logits, mask_logits, canvas, extent, _ = next(logits_per_image(outputs))
        check_logits(class_logits, mask_logits)
        class_logits, mask_logits = class_logits.float(), mask_logits.float()
        probabilities = class_logits.softmax(-1)  # (Q, K + 1)
        if first is None:
            first, first_canvas, first_extent = outputs, canvas, extent
            classes, masks = probabilities, mask_logits.sigmoid()
            class_sum, mask_sum, count = classes.clone(), masks.clone(), torch.ones(len(classes), device=masks.device)
            continue
        grid = _grid(masks.shape[1:], first_canvas, first_extent, canvas, extent, flipped).to(masks)
        seen = F.grid_sample(mask_logits[None], grid[None], padding_mode="border", align_corners=False)[0]
        queries, targets = _match(probabilities, seen, classes, masks, model.config)
        seen = seen[queries].sigmoid()
        one, other = seen >= 0.5, masks[targets] >= 0.5
        union = (one | other).flatten(1).sum(1)
        same = (one & other).flatten(1).sum(1) >= MIN_OVERLAP * union.clamp(min=1)
        targets, queries = targets[same], queries[same]
        class_sum[targets] += probabilities[queries]
        mask_sum[targets] += seen[same]
        count[targets] += 1
    first.class_queries_logits = (class_sum / count[:, None]).clamp_(min=1e-12).log_()[None]
    first.masks_queries_logits = torch.logit(mask_sum / count[:, None, None], eps=1e-6)[None]
    return first


def _views(model, processor, image, sizes, flip) -> Iterator[tuple[object, bool]]:
    """(output, mirrored?) of every view; the image is resized, then mirrored, then padded, as in the original."""
    sizes = augmented_sizes(processor.size) if sizes is None else list(sizes)
    if not sizes:
        raise ValueError("sizes is empty: give at least one size, or None for those of augmented_sizes")
    for size in sizes:
        inputs = processor(image, size=size, return_tensors="pt").to(model.device)
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(f"image holds {len(inputs['pixel_values'])} images: pass one at a time")
        yield model(**inputs), False
        if flip:
            height, width = image_sizes_of(inputs["pixel_mask"])[0]
            part = inputs["pixel_values"][..., :height, :width]
            part.copy_(part.flip(-1))
            yield model(**inputs), True


def _grid(shape, first_canvas, first_extent, canvas, extent, flipped) -> Tensor:
    """Where the first view's (h, w) mask positions lie in another view, as grid_sample takes it, (h, w, 2)."""
    axes = []
    for side in (0, 1):
        centre = (torch.arange(shape[side], dtype=torch.float64) + 0.5) / shape[side] * first_canvas[side]
        part = (centre / first_extent[side]).clamp(max=1)  # of the image
        part = 1 - part if flipped and side == 1 else part
        axes.append(2 * part * extent[side] / canvas[side] - 1)
    y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([x, y], -1)


def _match(probabilities, mask_logits, classes, masks, config) -> tuple[Tensor, Tensor]:
    """Pairs of a view's queries and the first view's, by the terms and weights of the training loss."""
    points = mask_logits.flatten(1)[None], masks.flatten(1)[None], None  # every pixel
    weights = loss_weights(config)
    cost = -weights["loss_cross_entropy"] * (probabilities[:, :-1] @ classes[:, :-1].T)[None]  # (1, Q, Q)
    for name, term in mask_terms(config).items():
        cost += weights[name] * term.pairs(*points)
    queries, targets = assign([cost])[0]
    return queries[0], targets[0]
