"""Annotated images -> the tensors that the model is trained on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.classes import ClassTable
from ..model.image_processing_mask2former import Mask2FormerImageProcessor, resize_nearest


class SegmentationCollator:
    """Batch annotated examples (`data.readers.Reader`) through an image processor.

    An example has `image` (RGB), `segmentation` ((H, W) segment ids, or (M, H, W) where segments overlap) and
    `segments_info` (`id`, `category_id`, optionally `iscrowd`). Pixels with id 0 (void) and those of crowds take no
    part in matching and loss; pixels with a negative id are background, a statement. A segment without a pixel is a
    target with an empty mask.

    Args:
        processor: normalises and pads, and resizes unless `resize` is False.
        resize: False for examples that an augmentation has brought to their size.
    """

    def __init__(self, processor: Mask2FormerImageProcessor, resize: bool = True):
        self.processor, self.resize = processor, resize

    def __call__(self, examples: Sequence[dict]) -> dict:
        """Examples -> pixel_values, pixel_mask, mask_labels, class_labels; ignore_masks if any pixel is ignored."""
        options = {"input_data_format": "channels_last", "return_tensors": "pt"}
        options |= {} if self.resize else {"do_resize": False}
        batch = dict(self.processor([example["image"] for example in examples], **options))
        canvas = tuple(batch["pixel_values"].shape[-2:])
        rows, columns = (batch["pixel_mask"].amax(axis).sum(1).tolist() for axis in (2, 1))
        targets = [
            example_targets(example, size, canvas)
            for example, size in zip(examples, zip(rows, columns, strict=True), strict=True)
        ]
        batch["mask_labels"], batch["class_labels"], ignored = (list(column) for column in zip(*targets, strict=True))
        if any(mask.any() for mask in ignored):
            batch["ignore_masks"] = ignored
        return batch


def example_targets(example: dict, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of an example that was resized to `size` and padded to `canvas`.

    Returns:
        masks (N, H, W) uint8, labels (N,) int64, and (H, W) bool, True where nothing is stated.

    Raises:
        ValueError: if a map has another size than its image, or an id without an entry in `segments_info`.
    """
    layers = np.asarray(example["segmentation"])
    layers = layers[None] if layers.ndim == 2 else layers
    name = example.get("file_name", "an example")
    if layers.shape[1:] != np.shape(example["image"])[:2]:
        raise ValueError(
            f"segmentation of {name} is {layers.shape[1:]} and its image {np.shape(example['image'])[:2]}: they must "
            "have the same height and width"
        )
    segments = example["segments_info"]
    listed = [segment["id"] for segment in segments]
    if len(set(listed)) < len(listed):
        double = sorted({number for number in listed if listed.count(number) > 1})
        raise ValueError(f"segments_info of {name} has the ids {double} twice: give every segment its own id")
    unknown = set(np.unique(layers[layers > 0]).tolist()) - set(listed)
    if unknown:
        raise ValueError(
            f"segmentation of {name} has the ids {sorted(unknown)[:10]} that segments_info does not describe: add "
            "them, or use 0 for pixels without a statement and -1 for background"
        )
    height, width = size
    if layers.shape[1:] != (height, width):
        layers = np.stack([resize_nearest(layer, size) for layer in layers])
    layers = torch.from_numpy(np.ascontiguousarray(layers))
    things = [segment for segment in segments if not segment.get("iscrowd", 0)]
    masks = torch.zeros(len(things), *canvas, dtype=torch.uint8)
    for mask, segment in zip(masks, things, strict=True):
        mask[:height, :width] = (layers == segment["id"]).any(0)
    ignored = torch.zeros(canvas, dtype=torch.bool)
    ignored[:height, :width] = (layers == 0).all(0)
    for segment in segments:
        if segment.get("iscrowd", 0):
            ignored[:height, :width] |= (layers == segment["id"]).any(0)
    if len(masks):
        ignored &= masks.amax(0) == 0  # an object in front of a crowd is a statement
    labels = torch.tensor([segment["category_id"] for segment in things], dtype=torch.int64)
    return masks, labels, ignored


def processor_for(classes: ClassTable, shortest_edge: int, longest_edge: int) -> Mask2FormerImageProcessor:
    """An image processor for inference at a size, that knows which labels are stuff."""
    return Mask2FormerImageProcessor(
        size={"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        label_ids_to_fuse=list(classes.stuff_label_ids),
    )
