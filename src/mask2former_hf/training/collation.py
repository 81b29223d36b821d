"""Annotated images -> the tensors that the model is trained on."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.classes import ClassTable, count_ids
from ..data.example import Example
from ..model.image_inputs import resize_nearest
from ..model.image_processing_mask2former import Mask2FormerImageProcessor


class SegmentationCollator:
    """Batch annotated examples, `data.example.Example` or mappings (`Example.of`), through an image processor.

    Pixels with id 0 (void) and those of crowds take no part in matching and loss; pixels with a negative id are
    background, a statement. A segment without a pixel is a target with an empty mask.

    Args:
        processor: normalises and pads, and resizes unless `resize` is False.
        resize: False for examples that an augmentation has brought to their size.
    """

    def __init__(self, processor: Mask2FormerImageProcessor, resize: bool = True):
        self.processor, self.resize = processor, resize

    def __call__(self, examples: Sequence[Example | Mapping]) -> dict:
        """Examples -> pixel_values, pixel_mask, mask_labels, class_labels; ignore_masks if any pixel is ignored."""
        options = {"input_data_format": "channels_last", "return_tensors": "pt"}
        options |= {} if self.resize else {"do_resize": False}
        examples = [Example.of(example) for example in examples]
        batch = dict(self.processor([example.image for example in examples], **options))
        canvas = tuple(batch["pixel_values"].shape[-2:])
        mask = batch["pixel_mask"]  # of images at the upper left
        rows, columns = mask[:, :, 0].sum(1).tolist(), mask[:, 0].sum(1).tolist()
        targets = [
            example_targets(example, size, canvas)
            for example, size in zip(examples, zip(rows, columns, strict=True), strict=True)
        ]
        batch["mask_labels"], batch["class_labels"], ignored = (list(column) for column in zip(*targets, strict=True))
        if any(mask.any() for mask in ignored):
            batch["ignore_masks"] = ignored
        return batch


def example_targets(example: Example, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of an example that was resized to `size` and padded to `canvas`.

    Returns:
        masks (N, H, W) uint8, labels (N,) int64, and (H, W) bool, True where nothing is stated.

    Raises:
        ValueError: for an id in the map without a segment.
    """
    present = {number for number in count_ids(example.layers)[0] if number > 0}
    if unknown := present - {segment["id"] for segment in example.segments}:
        raise ValueError(
            f"segmentation of {example.name} has the ids {sorted(unknown)[:10]} that segments_info does not describe: "
            "add them, or use 0 for pixels without a statement and -1 for background"
        )
    if example.size != size:
        example = example.moved(None, np.stack([resize_nearest(layer, size) for layer in example.layers]))
    height, width = size
    masks = np.zeros((len(example.objects), *canvas), dtype=bool)
    example.masks(example.objects, out=masks[:, :height, :width])
    ignored = np.zeros(canvas, dtype=bool)
    ignored[:height, :width] = example.void() | example.masks(example.crowds).any(0)
    ignored &= ~masks.any(0)  # an object in front of a crowd is a statement
    labels = torch.tensor([segment["category_id"] for segment in example.objects], dtype=torch.int64)
    return torch.from_numpy(masks.view(np.uint8)), labels, torch.from_numpy(ignored)


def processor_for(classes: ClassTable, shortest_edge: int, longest_edge: int, **fields) -> Mask2FormerImageProcessor:
    """An image processor for inference at a size, that knows which labels are stuff.

    Args:
        fields: others of `Mask2FormerImageProcessor`, such as the backbone's `image_mean` and `image_std`.
    """
    return Mask2FormerImageProcessor(
        size={"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        label_ids_to_fuse=list(classes.stuff_label_ids),
        **fields,
    )


def on_device(batch: dict, device) -> dict:
    """A batch with its tensors, and those of its lists, on a device."""
    return {
        name: [x.to(device) for x in value] if isinstance(value, list) else value.to(device)
        for name, value in batch.items()
    }
