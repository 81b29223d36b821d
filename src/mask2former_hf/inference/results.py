"""Model outputs, or an image, -> results with refinement, in the form in which the processor gives them without."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.image_processing_mask2former import _per_image
from ..model.postprocessing import semantic_scores
from .crf import crf_instance_segmentation, crf_panoptic_segmentation, crf_semantic_map, load_densecrf
from .otsu import load_threshold_otsu, otsu_instance_segmentation, otsu_panoptic_segmentation
from .tta import augmented_outputs, augmented_semantic_scores

METHODS = ("otsu", "crf")


def check_refinement(task: str, refine: str | None):
    """Find out before the first image what would fail.

    Raises:
        ValueError: for an unknown method, and Otsu's threshold for semantic results, which have none.
        ImportError: if the method's package is missing.
    """
    if refine not in (None, *METHODS):
        raise ValueError(f"refine={refine!r}: must be one of {', '.join(METHODS)}, or None")
    if refine == "otsu":
        if task == "semantic":
            raise ValueError("refine='otsu': semantic results have no threshold; use 'crf', or another task")
        load_threshold_otsu()
    elif refine == "crf":
        load_densecrf()


def post_process(
    processor,
    outputs,
    images: Sequence[np.ndarray],
    task: str,
    refine: str | None = None,
    *,
    threshold: float = 0.0,
    overlap_threshold: float = 0.8,
    stuff_label_ids: Collection[int] = (),
    top_k: int = 100,
    resize_masks_first: bool = True,
    progress: bool = False,
) -> list:
    """What `processor.post_process_<task>_segmentation` gives for the images' own sizes, refined.

    Args:
        outputs: the model's, for a batch.
        images: per image (H, W, 3) uint8 RGB, as before the processor.
        task: "panoptic", "instance" or "semantic".
        refine: "otsu" (not for semantic results), "crf", or None for the processor's own result.
        threshold: lowest score of a segment (panoptic) or an instance.
        overlap_threshold: of panoptic results.
        stuff_label_ids: classes that are merged in panoptic results and left out of instances.
        top_k: instances per image.
        resize_masks_first: of semantic results, see `postprocessing.semantic_scores`.
        progress: show the steps of an image.

    Returns:
        per image {"segmentation", "segments_info"} (panoptic), {"masks", "scores", "labels", "boxes"} without empty
        masks (instance), or an (H, W) map (semantic).
    """
    check_refinement(task, refine)
    sizes = [tuple(np.shape(image)[:2]) for image in images]
    stuff = set(stuff_label_ids)
    if refine is None and task == "panoptic":
        return processor.post_process_panoptic_segmentation(
            outputs,
            threshold=threshold,
            overlap_mask_area_threshold=overlap_threshold,
            label_ids_to_fuse=stuff,
            target_sizes=sizes,
        )
    if refine is None and task == "semantic":
        return processor.post_process_semantic_segmentation(
            outputs, target_sizes=sizes, resize_masks_first=resize_masks_first
        )
    if refine is None:
        found = processor.post_process_instance_segmentation(
            outputs, threshold=threshold, target_sizes=sizes, top_k=top_k
        )
        return [_without(result, stuff) for result in found]
    results = []
    for image, logits in zip(images, _per_image(outputs, sizes), strict=True):
        if task == "semantic":
            scores = semantic_scores(*logits, resize_masks_first=resize_masks_first)
            results.append(crf_semantic_map(image, scores, progress=progress))
        elif task == "panoptic":
            options = {
                "object_mask_threshold": threshold,
                "overlap_threshold": overlap_threshold,
                "stuff_label_ids": stuff,
            }
            if refine == "otsu":
                segmentation, segments = otsu_panoptic_segmentation(*logits, **options)
            else:
                segmentation, segments = crf_panoptic_segmentation(image, *logits, progress=progress, **options)
            results.append({"segmentation": segmentation, "segments_info": segments})
        else:
            options = {"top_k": top_k, "score_threshold": threshold, "progress": progress}
            if refine == "otsu":
                found = otsu_instance_segmentation(*logits, **options)
            else:
                found = crf_instance_segmentation(image, *logits, **options)
            results.append(_without(found, stuff))
    return results


def segment_image(
    model,
    processor,
    image: np.ndarray,
    task: str,
    refine: str | None = None,
    tta: bool = False,
    *,
    progress: bool = False,
    **options,
):
    """An image's result by `post_process`, from the mean over several sizes and both directions if `tta` is set.

    Args:
        image: (H, W, 3) uint8 RGB.
        task, refine, progress, options: as in `post_process`.

    Returns:
        one entry of what `post_process` returns.
    """
    check_refinement(task, refine)
    picture = Image.fromarray(image)  # of an array of 1, 3 or 4 rows the processor would guess that they are channels
    if tta and task == "semantic":
        first = options.get("resize_masks_first", True)
        scores = augmented_semantic_scores(model, processor, picture, image.shape[:2], resize_masks_first=first)
        return scores.argmax(0) if refine is None else crf_semantic_map(image, scores, progress=progress)
    if tta:
        outputs = augmented_outputs(model, processor, picture)
    else:
        with torch.inference_mode():
            outputs = model(**processor(picture, return_tensors="pt").to(model.device))
    return post_process(processor, outputs, [image], task, refine, progress=progress, **options)[0]


def _without(found: dict[str, Tensor], stuff: set[int]) -> dict[str, Tensor]:
    """Instances that are not empty and not stuff."""
    labels = found["labels"]
    kept = (found["boxes"][:, 2] > 0) & ~torch.isin(labels, torch.tensor(sorted(stuff), device=labels.device))
    return {name: found[name][kept] for name in ("masks", "scores", "labels", "boxes")}
