"""Model outputs → `Segmentation`s, by given rules; what every door calls in the end."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

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
from .sliding_window import sliding_scores
from .tta import augmented_outputs, augmented_semantic_scores


@torch.inference_mode()
def segment_images(
    model, processor, images: Sequence[np.ndarray], rules: Rules, *, tta: bool = False, progress: bool = False
) -> list[Segmentation]:
    """The results of a batch of (H, W, 3) uint8 RGB images.

    Args:
        tta: average over several sizes and their mirror images (`inference.tta`); a checkpoint with a sliding window
            always takes that for semantic results.
        progress: show the steps of an image with a refinement.
    """
    # As pictures: of an array of 1, 3 or 4 rows the processor would guess that they are channels.
    pictures = [Image.fromarray(image) for image in images]
    sizes = [image.shape[:2] for image in images]
    window = getattr(model.config, "sliding_window", None)
    if window is not None and rules.task == "semantic":
        scores = (
            sliding_scores(model, processor, picture, size, window, tta)
            for picture, size in zip(pictures, sizes, strict=True)
        )
        return [from_scores(score, rules, image, progress) for score, image in zip(scores, images, strict=True)]
    if not tta:
        inputs = processor(pictures, return_tensors="pt")  # its pixel_mask is read on the host
        inputs["pixel_values"] = inputs["pixel_values"].to(model.device)
        return segment_outputs(model(**inputs), rules, sizes, images, progress)
    return [
        _augmented(model, processor, *parts, rules, progress) for parts in zip(pictures, images, sizes, strict=True)
    ]


def _augmented(model, processor, picture, image, size, rules: Rules, progress: bool) -> Segmentation:
    if rules.task == "semantic":
        first = not rules.semantic_only
        scores = augmented_semantic_scores(model, processor, picture, size, resize_masks_first=first)
        return from_scores(scores, rules, image, progress)
    return segment_outputs(augmented_outputs(model, processor, picture), rules, [size], [image], progress)[0]


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
    decide = {
        "otsu": lambda: otsu_decision(progress),
        "crf": lambda: crf_instance_decision(image, mask_threshold=rules.mask_threshold, progress=progress),
    }
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
    return instance_result(
        (ids + 1).cpu().numpy(),
        masks.numpy(),
        scores.tolist(),
        labels.tolist(),
        boxes.tolist(),
        rules.id2label,
        rules.stuff_label_ids,
    )


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
