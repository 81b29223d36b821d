"""Measure a model on a dataset, image by image, without keeping predictions."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from ..image_processing_mask2former import Mask2FormerImageProcessor
from ..metrics.panoptic_quality import PanopticQuality
from ..modeling_mask2former import Mask2FormerForUniversalSegmentation


@torch.inference_mode()
def predict_panoptic(
    model: Mask2FormerForUniversalSegmentation,
    processor: Mask2FormerImageProcessor,
    images: Sequence[np.ndarray],
    threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> list[dict]:
    """Panoptic results of a batch of images at their own size; stuff is fused by `config.stuff_label_ids`.

    Returns:
        Per image `{"segmentation": (H, W) int32 with 0 for void, "segments_info": [{"id", "label_id", ...}]}`.
    """
    inputs = processor(images, return_tensors="pt").to(model.device)
    outputs = model(**inputs)
    return processor.post_process_panoptic_segmentation(
        outputs,
        threshold=threshold,
        overlap_mask_area_threshold=overlap_threshold,
        label_ids_to_fuse=set(model.config.stuff_label_ids or ()),
        target_sizes=[np.asarray(image).shape[:2] for image in images],
    )


def evaluate_panoptic(
    model: Mask2FormerForUniversalSegmentation,
    processor: Mask2FormerImageProcessor,
    examples: Iterable[dict],
    batch_size: int = 8,
    on_result: Callable[[dict, dict], None] | None = None,
    progress: bool = True,
) -> dict:
    """Panoptic quality of `model` on examples as `PanopticCollator` takes them.

    Args:
        on_result: called with every example and its result.

    Returns:
        The metric's summary (`PanopticQuality.compute`).
    """
    stuff = set(model.config.stuff_label_ids or ())
    categories = {i: {"name": name, "isthing": i not in stuff} for i, name in model.config.id2label.items()}
    metric = PanopticQuality(categories)
    training = model.training
    model.eval()
    try:
        batch = []
        for example in tqdm(examples, desc="evaluating", unit="image", disable=not progress):
            batch.append(example)
            if len(batch) == batch_size:
                _update(metric, model, processor, batch, on_result)
                batch = []
        if batch:
            _update(metric, model, processor, batch, on_result)
    finally:
        model.train(training)
    return metric.compute()


def _update(metric, model, processor, batch, on_result):
    for example, result in zip(
        batch, predict_panoptic(model, processor, [example["image"] for example in batch]), strict=True
    ):
        predicted = [{"id": s["id"], "category_id": s["label_id"]} for s in result["segments_info"]]
        metric.update(result["segmentation"], predicted, example["segmentation"], example["segments_info"])
        if on_result is not None:
            on_result(example, result)
