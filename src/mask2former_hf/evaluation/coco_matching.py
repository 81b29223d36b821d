"""COCO's rules of average precision: how an image's detections meet its true objects, and the figures over all images.

The rules of videos are the same, with tracks for detections and other ranges of areas.

Written after `COCOeval.evaluateImg` and `accumulate` of pycocotools. Letters: `D` detections, `G` true objects, `K`
classes, `A` ranges of areas, `T` IoU thresholds, `R` recalls, `M` limits of detections.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # pixels
FLAGS = len(AREAS) * len(THRESHOLDS)


class Matches(NamedTuple):
    """What is kept of an image: 22 bytes a detection, whatever its mask.

    Args:
        labels: (D,) rows of the classes.
        scores: (D,), falling.
        hits: (D, A * T) bits: whether the detection is matched with an object that counts.
        counted: (D, A * T) bits: whether it is a hit or a false alarm, and not left out.
        truth: (k, 1 + A) row of a class that the image has, and how many of its objects count.
    """

    labels: np.ndarray
    scores: np.ndarray
    hits: np.ndarray
    counted: np.ndarray
    truth: np.ndarray


def match(
    labels: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    true_labels: np.ndarray,
    true_areas: np.ndarray,
    crowds: np.ndarray,
    ious: np.ndarray,
    ranges: Mapping[str, tuple[float, float]] = AREAS,
) -> Matches:
    """Give each detection, the best first, the free object of its class that it overlaps most.

    Crowds and objects outside the range of areas do not count, nor do the detections that find only those, nor
    detections outside the range that find nothing. An object that counts goes before one that does not; crowds stay
    free.

    Args:
        labels, scores, areas: (D,) of the detections, by falling score.
        true_labels, true_areas, crowds: (G,) of the true objects.
        ious: (D, G), 0 where the classes differ.
        ranges: of areas, four by name, both ends belong to them.
    """
    ignored = crowds | ~_in_range(true_areas, ranges)  # (A, G)
    hits, lost = np.zeros((2, len(labels), len(AREAS), len(THRESHOLDS)), dtype=bool)
    free = np.ones((*hits.shape[1:], len(true_labels)), dtype=bool)
    for detection in np.flatnonzero((ious >= THRESHOLDS[0]).any(1)):
        near = np.flatnonzero(ious[detection] >= THRESHOLDS[0])
        overlaps = ious[detection, near]
        possible = free[..., near] & (overlaps >= THRESHOLDS[:, None])  # (A, T, g)
        # Above 2 if it counts; IoUs of boxes may exceed 1 by rounding.
        rank = np.where(possible, overlaps + 2 * ~ignored[:, None, near], 0)
        best = len(near) - 1 - rank[..., ::-1].argmax(-1)  # the last of equal ones, as in pycocotools
        rank = np.take_along_axis(rank, best[..., None], -1)[..., 0]  # (A, T)
        hits[detection], lost[detection] = rank > 2, (rank > 0) & (rank < 2)
        area, threshold = np.nonzero(rank)
        taken = near[best[area, threshold]]
        free[area, threshold, taken] = crowds[taken]
    counted = hits | (_in_range(areas, ranges).T[:, :, None] & ~lost)
    present = np.unique(true_labels)
    counts = [(~ignored[:, true_labels == label]).sum(1) for label in present]
    return Matches(
        labels.astype(np.int32),
        scores.astype(np.float64),
        *(np.packbits(flags.reshape(-1, FLAGS), axis=1) for flags in (hits, counted)),
        np.column_stack([present, np.reshape(counts, (-1, len(AREAS)))]).astype(np.int32),
    )


def curves(images: Sequence[Matches], num_classes: int, limits: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Precision of the best `limits[-1]` detections of a class in an image, and recall of each of the limits.

    Args:
        images: whose order decides between equal scores.

    Returns:
        (T, R, K, A) and (T, K, A, M); nan where no object counts.
    """
    truth = np.zeros((num_classes, len(AREAS)), dtype=np.int64)
    for image in images:
        truth[image.truth[:, 0]] += image.truth[:, 1:]
    precision = np.full((len(THRESHOLDS), len(RECALLS), *truth.shape), np.nan)
    recall = np.full((len(THRESHOLDS), *truth.shape, len(limits)), np.nan)
    if not images:
        return precision, recall
    owner = np.repeat(np.arange(len(images)), [len(image.labels) for image in images])
    labels, scores, hits, counted = (np.concatenate(parts) for parts in list(zip(*images, strict=True))[:4])
    for row in np.flatnonzero(truth.any(1)):
        own = np.flatnonzero(labels == row)
        place = np.arange(len(own)) - np.searchsorted(owner[own], owner[own])  # in the class and the image
        order = np.argsort(-scores[own], kind="stable")
        own, place = own[order], place[order]
        for area in np.flatnonzero(truth[row]):
            found, counts = (_flags(bits[own], area) for bits in (hits, counted))  # (n, T)
            for m, limit in enumerate(limits):
                recall[:, row, area, m] = found[place < limit].sum(0) / truth[row, area]
            kept = place < limits[-1]
            right, wrong = (flags[kept].cumsum(0) for flags in (found, counts & ~found))
            precision[:, :, row, area] = _precision_at_recalls(right, wrong, truth[row, area])
    return precision, recall


def curves_of(matches: Mapping[Hashable, Matches], num_classes: int, limits: Sequence[int]):
    """`curves` of images by their ids, whose order decides between equal scores."""
    return curves([matches[number] for number in _sort_ids(matches)], num_classes, limits)


def summary(matches: Mapping[Hashable, Matches], categories: Mapping[int, Mapping], limits: Sequence[int]) -> dict:
    """COCO's figures of images, or videos, by their ids; nan where there is no such object in the truth.

    Args:
        categories: class id -> `{"name", ...}`, in the order of the rows.
        limits: rising numbers of detections.
    """
    precision, recall = curves_of(matches, len(categories), limits)
    figures = {"AP": _mean(precision[..., 0])}
    figures |= {"AP50": _mean(precision[0, ..., 0]), "AP75": _mean(precision[5, ..., 0])}
    figures |= {f"AP{name[0]}": _mean(precision[..., i]) for i, name in enumerate(AREAS) if i}
    figures |= {f"AR{n}": _mean(recall[..., 0, i]) for i, n in enumerate(limits)}
    figures |= {f"AR{name[0]}": _mean(recall[..., i, -1]) for i, name in enumerate(AREAS) if i}
    figures["per_class"] = {
        category: {
            "name": described["name"],
            "AP": _mean(precision[:, :, row, 0]),
            "AP50": _mean(precision[0, :, row, 0]),
            **{f"AP{name[0]}": _mean(precision[:, :, row, i]) for i, name in enumerate(AREAS) if i},
        }
        for row, (category, described) in enumerate(categories.items())
    }
    return figures


def scores_and_hits(matches: Mapping[Hashable, Matches]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all detections that are a hit or a false alarm, and which are hits, at an IoU of 0.5."""
    parts = [(np.zeros(0), np.zeros(0, dtype=bool))]
    for image in (matches[number] for number in _sort_ids(matches)):
        hits, counted = (_flags(bits, 0)[:, 0] for bits in (image.hits, image.counted))
        parts.append((image.scores[counted], hits[counted]))
    scores, hits = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(hits)


def checked_limits(max_detections: Sequence[int]) -> tuple[int, ...]:
    """Refuse numbers that do not rise."""
    limits = tuple(max_detections)
    if not limits or sorted({*limits, 0}) != [0, *limits]:
        raise ValueError(f"max_detections={max_detections}: must be rising numbers from 1, for example (1, 10, 100)")
    return limits


def best_of_class(scores: np.ndarray, labels: Sequence[Hashable], most: int) -> list[int]:
    """Detections by falling score, of each class the best `most`."""
    kept, count = [], {}
    for index in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist():
        count[labels[index]] = count.get(labels[index], 0) + 1
        if count[labels[index]] <= most:
            kept.append(index)
    return kept


def _sort_ids(ids: Iterable[Hashable]) -> list:
    ids = list(ids)
    for kind in ((int, np.integer), str):
        if all(isinstance(image_id, kind) for image_id in ids):
            return sorted(ids)
    return sorted(ids, key=lambda image_id: (type(image_id).__name__, repr(image_id)))


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]  # of classes without truth
    return float(values.mean()) if values.size else math.nan


def _precision_at_recalls(right: np.ndarray, wrong: np.ndarray, truth: int) -> np.ndarray:
    """(T, R) best precision at each recall or a larger one, of (n, T) rising numbers of hits and false alarms."""
    precision = right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    precision = np.concatenate([precision, np.zeros((1, len(THRESHOLDS)))])  # of recalls that are not reached
    return np.stack([p[np.searchsorted(r, RECALLS)] for p, r in zip(precision.T, right.T / truth, strict=True)])


def _flags(bits: np.ndarray, area: int) -> np.ndarray:
    """(n, T) of a range of areas."""
    flags = np.unpackbits(bits, axis=1, count=FLAGS).reshape(-1, len(AREAS), len(THRESHOLDS))
    return flags[:, area].astype(bool)


def _in_range(areas: np.ndarray, ranges: Mapping) -> np.ndarray:
    """(A, n) which of n areas lie in each range; the ends belong to it."""
    low, high = np.array(list(ranges.values())).T[:, :, None]
    return (low <= areas) & (areas <= high)
