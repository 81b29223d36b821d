"""Mean intersection over union and pixel accuracies of label maps, from one confusion matrix."""

import math
from collections.abc import Mapping

import numpy as np

from ..data.rle import to_numpy


class MeanIoU:
    """Counts pixels by true and predicted class; `compute` gives the figures of detectron2's `SemSegEvaluator`.

    Args:
        categories: class id in the maps -> `{"name", ...}`.
        ignore_index: id of true pixels that do not count; None if all pixels count.

    Raises:
        ValueError: for negative ids, no classes, and an `ignore_index` that is a class.
    """

    def __init__(self, categories: Mapping[int, Mapping], ignore_index: int | None = 255):
        check_categories(categories, ignore_index)
        self.categories = dict(categories)
        self.ignore_index = ignore_index
        self.confusion = np.zeros((len(self.categories), len(self.categories)), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray):
        """Count one image.

        Args:
            prediction, truth: (H, W) integer maps of class ids.

        Raises:
            ValueError: for maps of different size, and ids that are neither classes nor `ignore_index` in the truth.
        """
        predicted, true = row_maps(prediction, truth, self.categories, self.ignore_index)
        classes = len(self.categories)
        cells = true * classes + predicted  # ignored pixels fall into a last row
        counts = np.bincount(cells.ravel(), minlength=(classes + 1) * classes).reshape(classes + 1, classes)
        self.confusion += counts[:-1]

    def merge(self, other: "MeanIoU"):
        """Add the counts of other images, for example of another process."""
        if (self.categories, self.ignore_index) != (other.categories, other.ignore_index):
            raise ValueError("other counts other categories: merge metrics that were made with the same ones")
        self.confusion += other.confusion

    def compute(self) -> dict:
        """Fractions in [0, 1] over the classes that occur in the truth; figures of other classes are nan.

        Returns:
            `{"mIoU", "fwIoU" (weighted by true pixels), "mACC" (mean of class accuracies), "pACC" (of pixels),
            "per_class": {id: {"name", "iou", "accuracy", "pixels"}}}`, where pixels counts the truth.
        """
        correct, true, predicted = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        present = true > 0
        iou, accuracy = np.full(len(true), math.nan), np.full(len(true), math.nan)
        iou[present] = correct[present] / (true + predicted - correct)[present]
        accuracy[present] = correct[present] / true[present]
        figures = dict.fromkeys(("mIoU", "fwIoU", "mACC", "pACC"), math.nan)
        if present.any():
            figures["mIoU"] = float(iou[present].mean())
            figures["fwIoU"] = float((iou[present] * true[present]).sum() / true.sum())
            figures["mACC"] = float(accuracy[present].mean())
            figures["pACC"] = float(correct.sum() / true.sum())
        figures["per_class"] = {
            category: {
                "name": self.categories[category]["name"],
                "iou": float(iou[row]),
                "accuracy": float(accuracy[row]),
                "pixels": int(true[row]),
            }
            for row, category in enumerate(self.categories)
        }
        return figures


def check_categories(categories: Mapping[int, Mapping], ignore_index: int | None):
    """Raise a ValueError unless there are classes, with ids from 0 on, and `ignore_index` is none of them."""
    if not categories or min(categories) < 0:
        raise ValueError(f"categories has the ids {sorted(categories)}: at least one is needed, from 0 on")
    if ignore_index in categories:
        raise ValueError(f"ignore_index={ignore_index} is a class in categories: leave it out there, or pass None")


def row_maps(prediction, truth, categories: Mapping[int, Mapping], ignore_index: int | None):
    """`class_rows` of the prediction, where all pixels count, and of the truth.

    Raises:
        ValueError: for maps of different size, and unknown ids.
    """
    prediction, truth = to_numpy(prediction), to_numpy(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape} and truth is {truth.shape}: resize the prediction")
    true = class_rows(truth, "truth", categories, ignore_index)
    return class_rows(prediction, "prediction", categories, None), true


def class_rows(ids: np.ndarray, name: str, categories: Mapping[int, Mapping], ignore_index: int | None) -> np.ndarray:
    """(H, W) map of class ids -> map of their positions in `categories`, and of their number for ignored pixels.

    Raises:
        ValueError: for ids that are neither classes nor `ignore_index`.
    """
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise ValueError(f"{name} is {ids.dtype} of shape {ids.shape}: it must be an (H, W) map of integer ids")
    rows = {category: row for row, category in enumerate(categories)}
    if ignore_index is not None:
        rows[ignore_index] = len(categories)
    low, high = min(rows), max(rows)
    known = not ids.size or (ids.min() >= low and ids.max() <= high)
    if known:
        table = np.full(high - low + 1, -1, dtype=np.int64)
        table[np.array(list(rows)) - low] = list(rows.values())
        found = table[ids.astype(np.int64) - low]
        known = (found >= 0).all()
    if not known:
        unknown = sorted(set(np.unique(ids).tolist()) - set(rows))
        also = "" if ignore_index is None else f" and {ignore_index} to ignore"
        raise ValueError(f"{name} has the ids {unknown}: known are {sorted(categories)}{also}")
    return found
