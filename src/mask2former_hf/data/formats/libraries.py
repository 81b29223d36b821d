"""Segments as objects of other libraries: supervision's `Detections` and FiftyOne's labels."""

from collections.abc import Sequence

import numpy as np

from .labelled_mask import LabelledMask


def supervision_detections(masks: Sequence[LabelledMask], size: tuple[int, int]):
    """`supervision.Detections` with boxes, masks, classes, scores (unless they are semantic) and names.

    Args:
        size: (H, W) of the image.

    Raises:
        ImportError: without supervision.
    """
    try:
        import supervision
    except ImportError as error:
        raise ImportError("to_supervision needs supervision: pip install supervision") from error
    if not masks:
        return supervision.Detections.empty()
    scores, wholes = (
        [mask.score for mask in masks],
        np.zeros((len(masks), *size), dtype=bool),
    )  # as supervision has them
    for mask, whole in zip(masks, wholes, strict=True):
        mask.paint(whole)
    return supervision.Detections(
        xyxy=np.array([mask.box for mask in masks], dtype=np.float32),
        mask=wholes,
        confidence=None if None in scores else np.array(scores, dtype=np.float32),
        class_id=np.array([mask.label_id for mask in masks]),
        data={"class_name": np.array([mask.label for mask in masks])},
    )


def fiftyone_detections(masks: Sequence[LabelledMask], size: tuple[int, int]):
    """`fiftyone.Detections`: boxes in parts of width and height, each with the mask inside it.

    Args:
        size: (H, W) of the image.

    Raises:
        ImportError: without FiftyOne.
    """
    try:
        import fiftyone
    except ImportError as error:
        raise ImportError("to_fiftyone needs FiftyOne: pip install fiftyone") from error
    height, width = size
    found = []
    for mask in masks:
        left, top, right, bottom = mask.box
        box = [left / width, top / height, (right - left) / width, (bottom - top) / height]
        found.append(fiftyone.Detection(label=mask.label, bounding_box=box, mask=mask.mask, confidence=mask.score))
    return fiftyone.Detections(detections=found)
