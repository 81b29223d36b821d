"""Which segment of a result is which true object of an image, also where their classes differ."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ..data.rle import coco_tools
from .panoptic_quality import VOID

NOBODY = -1


class Overlaps(NamedTuple):
    """An image's segments and true objects. Letters: `D` segments found, `G` true objects that are no crowds.

    Args:
        labels, scores: (D,) of the segments.
        true_labels: (G,); areas: (G,) pixels of the true objects.
        ious: (D, G), 0 where it is too small for a match.
        excused: (D,) whether a segment that matches nothing is no error: it lies on void or on crowds of its class.
    """

    labels: np.ndarray
    scores: np.ndarray
    true_labels: np.ndarray
    areas: np.ndarray
    ious: np.ndarray
    excused: np.ndarray


def partners(found: Overlaps) -> np.ndarray:
    """(D,) the true object of each segment, or `NOBODY`.

    The segments choose, the surest first, the free object that they overlap most: first among those of their own
    class, as the metrics match, and what then is left on both sides among all classes.
    """
    partner = np.full(len(found.labels), NOBODY)
    free = np.ones(len(found.true_labels), dtype=bool)
    same_class = found.labels[:, None] == found.true_labels
    for allowed in (same_class, ~same_class & ~found.excused[:, None]):
        for segment in np.argsort(-found.scores, kind="stable"):
            ious = np.where(free & allowed[segment], found.ious[segment], 0)
            if partner[segment] == NOBODY and ious.any():
                partner[segment] = ious.argmax()
                free[partner[segment]] = False
    return partner


def panoptic_overlaps(
    pairs: Mapping[tuple[int, int], int], segments: Iterable[Mapping], true_segments: Iterable[Mapping]
) -> Overlaps:
    """By the rules of panoptic quality: IoU above 0.5, in whose union pixels on void do not count.

    Args:
        pairs: of `panoptic_quality.count_pairs`, true ids first.
        segments: `id`, `category_id` and `score` of the result.
        true_segments: `id`, `category_id` and maybe `iscrowd`.
    """
    segments, true_segments = list(segments), list(true_segments)
    objects = [segment for segment in true_segments if not segment.get("iscrowd")]
    rows = {segment["id"]: row for row, segment in enumerate(segments)}
    columns = {segment["id"]: column for column, segment in enumerate(objects)}
    shared = np.zeros((len(rows), len(columns)))
    area, on_void, on_crowd = np.zeros((3, len(rows)))
    true_area = np.zeros(len(columns))
    crowds = {segment["id"]: segment["category_id"] for segment in true_segments if segment.get("iscrowd")}
    for (true, predicted), pixels in pairs.items():
        if true in columns:
            true_area[columns[true]] += pixels
        if predicted == VOID:
            continue
        row = rows[predicted]
        area[row] += pixels
        on_void[row] += pixels * (true == VOID)
        on_crowd[row] += pixels * (crowds.get(true) == segments[row]["category_id"])
        if true in columns:
            shared[row, columns[true]] += pixels
    union = (area - on_void)[:, None] + true_area - shared
    ious = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return Overlaps(
        *(np.array([segment[name] for segment in segments], dtype=kind) for name, kind in _FOUND),
        np.array([segment["category_id"] for segment in objects], dtype=int),
        true_area,
        np.where(ious > 0.5, ious, 0),
        (on_void + on_crowd) / np.maximum(area, 1) > 0.5,
    )


_FOUND = (("category_id", int), ("score", float))


def instance_overlaps(found: list[Mapping], truth: list[Mapping]) -> Overlaps:
    """By COCO's rules at an IoU of 0.5.

    Args:
        found: `category_id`, `score` and `segmentation` (RLE) of the objects found.
        truth: of `truth.true_objects`.
    """
    mask = coco_tools().mask
    objects = [thing for thing in truth if not thing["iscrowd"]]
    crowds = [thing for thing in truth if thing["iscrowd"]]
    codes = [thing["segmentation"] for thing in found]
    labels, scores = (np.array([thing[name] for thing in found], dtype=kind) for name, kind in _FOUND)
    ious, inside = (
        np.reshape(mask.iou(codes, [thing["segmentation"] for thing in side], [is_crowd] * len(side)), (-1, len(side)))
        if codes and side
        else np.zeros((len(codes), len(side)))
        for side, is_crowd in ((objects, 0), (crowds, 1))
    )
    own_crowd = labels[:, None] == np.array([thing["category_id"] for thing in crowds], dtype=int)
    return Overlaps(
        labels,
        scores,
        np.array([thing["category_id"] for thing in objects], dtype=int),
        np.array([mask.area([thing["segmentation"]])[0] for thing in objects], dtype=float),
        np.where(ious >= 0.5, ious, 0),
        ((inside >= 0.5) & own_crowd).any(1),
    )
