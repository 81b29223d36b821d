"""Boundary IoU (Cheng et al., CVPR 2021): intersection over union of the pixels near the outlines."""

import math
from collections.abc import Mapping

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from ..data.rle import to_numpy
from .mean_iou import check_categories, row_maps

DILATION_RATIO = 0.02  # of the image's diagonal, the paper's choice


def label_boundaries(labels: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """Pixels whose distance to another label or to the outside of the image is at most the boundary's width.

    The width is `dilation_ratio` of the diagonal, rounded, at least 1 pixel; the distance is the larger one of the
    horizontal and the vertical one. For a bool mask this is the mask minus its erosion together with the same of the
    background.

    Args:
        labels: (H, W) integers or bool.

    Returns:
        (H, W) bool.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(f"labels is {labels.dtype} of shape {labels.shape}: it must be (H, W) of integers or bool")
    if not 0 < dilation_ratio < 1:
        raise ValueError(f"dilation_ratio={dilation_ratio}: must be a part of the image's diagonal, for example 0.02")
    width = max(1, round(dilation_ratio * math.hypot(*labels.shape)))
    size = 2 * width + 1
    boundary = minimum_filter(labels, size, mode="nearest") != maximum_filter(labels, size, mode="nearest")
    for side in (np.s_[:width], np.s_[-width:]):
        boundary[side] = boundary[:, side] = True
    return boundary


def boundary_iou(a: np.ndarray, b: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> float:
    """IoU of the inner boundaries of two (H, W) masks of bool or 0 and 1; nan if both are empty."""
    a, b = to_numpy(a), to_numpy(b)
    for name, mask in (("a", a), ("b", b)):
        if mask.dtype.kind not in "biu":
            raise ValueError(f"{name} is {mask.dtype}: it must be a mask of bool or 0 and 1; take {name} > 0.5")
    a, b = a.astype(bool), b.astype(bool)
    if a.shape != b.shape:
        raise ValueError(f"a is {a.shape} and b is {b.shape}: resize one of them")
    a, b = a & label_boundaries(a, dilation_ratio), b & label_boundaries(b, dilation_ratio)
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else math.nan


class MeanBoundaryIoU:
    """Boundary IoU per class of label maps, over the pixels of all images; the mean is over classes in the truth.

    Args:
        categories: class id in the maps -> `{"name", ...}`.
        ignore_index: id of true pixels that do not count; None if all pixels count. Such a region ends the true and
            the predicted segments alike, so its outline is no error.
        dilation_ratio: width of the boundaries as a part of the image's diagonal.

    Raises:
        ValueError: for negative ids, no classes, and an `ignore_index` that is a class.
    """

    def __init__(
        self,
        categories: Mapping[int, Mapping],
        ignore_index: int | None = 255,
        dilation_ratio: float = DILATION_RATIO,
    ):
        check_categories(categories, ignore_index)
        self.categories = dict(categories)
        self.ignore_index, self.dilation_ratio = ignore_index, dilation_ratio
        self.intersection, self.true, self.predicted = np.zeros((3, len(self.categories)), dtype=np.int64)

    def update(self, prediction: np.ndarray, truth: np.ndarray):
        """Count one image, given as (H, W) integer maps of class ids.

        Raises:
            ValueError: for maps of different size, and ids that are neither classes nor `ignore_index` in the truth.
        """
        predicted, true = row_maps(prediction, truth, self.categories, self.ignore_index)
        ignored = len(self.categories)
        predicted[true == ignored] = ignored
        near_true, near_predicted = (label_boundaries(rows, self.dilation_ratio) for rows in (true, predicted))
        both = near_true & near_predicted & (true == predicted)
        for counts, rows in (
            (self.intersection, true[both]),
            (self.true, true[near_true]),
            (self.predicted, predicted[near_predicted]),
        ):
            counts += np.bincount(rows, minlength=ignored + 1)[:ignored]

    def merge(self, other: "MeanBoundaryIoU"):
        """Add the counts of other images, for example of another process."""
        for name in ("categories", "ignore_index", "dilation_ratio"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other has another {name}: merge metrics that were made alike")
        self.intersection += other.intersection
        self.true += other.true
        self.predicted += other.predicted

    def compute(self) -> dict:
        """Fractions in [0, 1]; nan for classes that the truth lacks.

        Returns:
            `{"mean_boundary_iou", "per_class": {id: {"name", "boundary_iou"}}}`.
        """
        present = self.true > 0
        iou = np.full(len(present), math.nan)
        iou[present] = (self.intersection / np.maximum(self.true + self.predicted - self.intersection, 1))[present]
        return {
            "mean_boundary_iou": float(iou[present].mean()) if present.any() else math.nan,
            "per_class": {
                category: {"name": self.categories[category]["name"], "boundary_iou": float(iou[row])}
                for row, category in enumerate(self.categories)
            },
        }
