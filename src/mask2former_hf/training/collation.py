"""Annotated images -> the tensors that the model is trained on."""

from collections.abc import Sequence

import numpy as np

from ..image_processing_mask2former import Mask2FormerImageProcessor


class PanopticCollator:
    """Batch panoptic examples through an image processor.

    An example is `{"image", "segmentation", "segments_info"}`: an RGB image, an (H, W) map of segment ids with 0 for
    void, and a dict with `id` and `category_id` per segment. Void takes no part in matching and loss.

    Args:
        processor: resizes, normalises and pads; its own `ignore_index` does not matter.
    """

    def __init__(self, processor: Mask2FormerImageProcessor):
        self.processor = processor

    def __call__(self, examples: Sequence[dict]) -> dict:
        """Examples -> pixel_values, pixel_mask, mask_labels, class_labels and ignore_masks."""
        return dict(
            self.processor(
                [example["image"] for example in examples],
                segmentation_maps=[np.asarray(example["segmentation"]) for example in examples],
                instance_id_to_semantic_id=[
                    {segment["id"]: segment["category_id"] for segment in example["segments_info"]}
                    for example in examples
                ],
                ignore_index=0,
                return_tensors="pt",
            )
        )
