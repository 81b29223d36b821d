"""Model outputs → `Segmentation`s, by given rules; what every door calls in the end."""

from collections.abc import Sequence

import numpy as np
import torch

from ..model.postprocessing import (
    instance_segmentation,
    logits_per_image,
    panoptic_segmentation,
    semantic_map,
    semantic_scores,
    stack_instances,
)
from .crf import crf_instance_decision, crf_panoptic_segmentation, crf_semantic_map
from .otsu import otsu_decision
from .rules import Rules
from .segmentation import Segmentation, instance_result, panoptic_result, semantic_result


def segment_outputs(
    outputs,
    rules: Rules,
    sizes: Sequence[tuple[int, int]],
    images: Sequence[np.ndarray] | None = None,
    progress: bool = False,
) -> list[Segmentation]:
    """The results of a batch.

    Args:
        outputs: the model's.
        sizes: (height, width) of each image before the processor, which is that of its result.
        images: (H, W, 3) uint8 RGB each; `refine="crf"` needs them.
        progress: show the steps of an image with a refinement.
    """
    images = [None] * len(sizes) if images is None else images
    return [
        segment_logits(logits, rules, image, progress)
        for image, logits in zip(images, logits_per_image(outputs, sizes), strict=True)
    ]


def segment_logits(logits: tuple, rules: Rules, image: np.ndarray | None = None, progress: bool = False):
    """The result of one image, whose logits and sizes are what `postprocessing.logits_per_image` yields."""
    if rules.refine == "crf" and image is None:
        raise ValueError("refine='crf' needs the image: give images")
    return {"panoptic": _panoptic, "instance": _instances, "semantic": _semantic}[rules.task](
        logits, rules, image, progress
    )


def _panoptic(logits, rules: Rules, image, progress) -> Segmentation:
    options = {
        "object_mask_threshold": rules.threshold,
        "overlap_threshold": rules.overlap_threshold,
        "mask_threshold": rules.mask_threshold,
        "stuff_label_ids": set(rules.stuff_label_ids),
    }
    if rules.refine == "crf":
        ids, segments = crf_panoptic_segmentation(image, *logits, progress=progress, **options)
    else:
        decide = otsu_decision(progress) if rules.refine == "otsu" else None
        ids, segments = panoptic_segmentation(*logits, decide=decide, **options)
    return panoptic_result(ids.cpu().numpy(), segments, rules.id2label, rules.stuff_label_ids)


def _instances(logits, rules: Rules, image, progress) -> Segmentation:
    return instances_and_queries(logits, rules, image, progress)[0]


def instances_and_queries(logits, rules: Rules, image=None, progress=False) -> tuple[Segmentation, torch.Tensor]:
    """The result, and the (N,) queries that its instances come from."""
    decide = {"otsu": lambda: otsu_decision(progress), "crf": lambda: crf_instance_decision(image, progress=progress)}
    stuff = set(rules.stuff_label_ids)
    found = instance_segmentation(
        *logits,
        top_k=rules.top_k,
        thing_label_ids=set(rules.id2label) - stuff if stuff else None,
        score_threshold=rules.threshold,
        mask_threshold=rules.mask_threshold,
        decide=decide[rules.refine]() if rules.refine else None,
    )
    ids, kept = stack_instances(found["masks"], rules.overlap_threshold)
    masks, scores, labels, boxes = (found[name][kept].cpu() for name in ("masks", "scores", "labels", "boxes"))
    result = instance_result(
        (ids + 1).cpu().numpy(),
        masks.numpy(),
        scores.tolist(),
        labels.tolist(),
        boxes.tolist(),
        rules.id2label,
        rules.stuff_label_ids,
    )
    return result, found["queries"][kept]


def _semantic(logits, rules: Rules, image, progress) -> Segmentation:
    first = not rules.semantic_only
    if rules.refine == "crf":
        return from_scores(semantic_scores(*logits, resize_masks_first=first), rules, image, progress)
    return _from_labels(semantic_map(*logits, resize_masks_first=first), rules)


def from_scores(scores: torch.Tensor, rules: Rules, image: np.ndarray | None = None, progress: bool = False):
    """The semantic result of (K, H, W) scores."""
    labels = scores.argmax(0) if rules.refine is None else crf_semantic_map(image, scores, progress=progress)
    return _from_labels(labels, rules)


def _from_labels(labels: torch.Tensor, rules: Rules) -> Segmentation:
    return semantic_result(labels.int().cpu().numpy(), rules.id2label, rules.stuff_label_ids)
