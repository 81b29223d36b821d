"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4) by panopticapi's rules."""

from collections.abc import Iterable, Mapping

import numpy as np

from ..data.rle import to_numpy

VOID = 0
MAX_ID = 2**31 - 1  # pairs of ids are counted as one 64-bit key
ONE = 2**53  # an IoU above 0.5, as a float, is a whole number of 2**-53: whole numbers add up alike in any order


class PanopticQuality:
    """Counts matches image by image; `compute` gives PQ = SQ x RQ for all classes, things, stuff and each class.

    A predicted and a true segment of one class match if their IoU exceeds 0.5, where predicted pixels on void do not
    count to the union. Crowd segments are never matched; a prediction that lies by more than half on void and on
    crowds of its class is not an error.

    Args:
        categories: class id -> `{"name", "isthing"}`.
    """

    def __init__(self, categories: Mapping[int, Mapping]):
        self.categories = dict(categories)
        self._row = {category: row for row, category in enumerate(self.categories)}
        self._iou = [0] * len(self._row)
        self.tp, self.fp, self.fn = (np.zeros(len(self._row), dtype=np.int64) for _ in range(3))

    @property
    def iou(self) -> np.ndarray:
        """Sum of the matched segments' IoU per class, in the order of `categories`."""
        return np.array([total / ONE for total in self._iou], dtype=np.float64)

    def update(
        self,
        prediction: np.ndarray,
        predicted_segments: Iterable[Mapping],
        truth: np.ndarray,
        segments: Iterable[Mapping],
    ):
        """Count one image.

        Args:
            prediction, truth: (H, W) integer maps of segment ids, 0 for void.
            predicted_segments: a mapping with `id` and `category_id` per segment of the prediction.
            segments: the same for the truth, and optionally `iscrowd`.

        Raises:
            ValueError: for maps of different size, ids that are in a map or a list only, and unknown classes.
        """
        prediction, truth = to_map(prediction, "prediction"), to_map(truth, "truth")
        if prediction.shape != truth.shape:
            raise ValueError(f"prediction is {prediction.shape} and truth is {truth.shape}: resize the prediction")
        self.count(count_pairs(truth.ravel(), prediction.ravel()), predicted_segments, segments)

    def count(
        self,
        overlap: Mapping[tuple[int, int], int],
        predicted_segments: Iterable[Mapping],
        segments: Iterable[Mapping],
    ):
        """Count one image, or whatever else has segments that overlap.

        Args:
            overlap: pixels by pairs of ids, of the truth and of the prediction, as `count_pairs` gives them.
            predicted_segments, segments: as in `update`.
        """
        predicted, true = self._index(predicted_segments, "predicted_segments"), self._index(segments, "segments")
        true_area, predicted_area = {}, {}
        for (t, p), n in overlap.items():
            true_area[t] = true_area.get(t, 0) + n
            predicted_area[p] = predicted_area.get(p, 0) + n
        _check_ids(predicted_area, predicted, "prediction", "predicted_segments")
        _check_ids(true_area, true, "truth", "segments", must_appear=False)

        matched_true, matched_predicted = set(), set()
        for (t, p), n in overlap.items():
            if t == VOID or p == VOID or true[t]["crowd"] or true[t]["row"] != predicted[p]["row"]:
                continue
            union = true_area[t] + predicted_area[p] - n - overlap.get((VOID, p), 0)
            if n / union > 0.5:
                self.tp[true[t]["row"]] += 1
                self._iou[true[t]["row"]] += int(n / union * ONE)
                matched_true.add(t)
                matched_predicted.add(p)
        crowds = {}
        for t, segment in true.items():
            if segment["crowd"]:
                crowds.setdefault(segment["row"], []).append(t)
            elif t not in matched_true:
                self.fn[segment["row"]] += 1
        for p, segment in predicted.items():
            if p in matched_predicted:
                continue
            excused = overlap.get((VOID, p), 0) + sum(overlap.get((t, p), 0) for t in crowds.get(segment["row"], ()))
            if excused / predicted_area[p] <= 0.5:
                self.fp[segment["row"]] += 1

    def merge(self, other: "PanopticQuality"):
        """Add the counts of other images, for example of another process."""
        if self.categories != other.categories:
            raise ValueError("other counts other categories: merge metrics that were made with the same ones")
        self._iou = [ours + theirs for ours, theirs in zip(self._iou, other._iou, strict=True)]
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn

    def compute(self) -> dict:
        """PQ, SQ and RQ in [0, 1].

        Returns:
            `{"all", "things", "stuff": {"pq", "sq", "rq", "n"}, "per_class": {id: {"name", "pq", "sq", "rq", "tp",
            "fp", "fn"}}}`; n is the number of classes that occur in truth or prediction, the means are over these.
        """
        rows, iou = {}, self.iou
        for category, row in self._row.items():
            tp, errors = int(self.tp[row]), (int(self.fp[row]) + int(self.fn[row])) / 2
            sq = float(iou[row]) / tp if tp else 0.0
            rq = tp / (tp + errors) if tp + errors else 0.0
            counts = {"tp": tp, "fp": int(self.fp[row]), "fn": int(self.fn[row])}
            rows[category] = {"name": self.categories[category]["name"], "pq": sq * rq, "sq": sq, "rq": rq, **counts}
        summary = {}
        for name, chosen in (("all", (0, 1)), ("things", (1,)), ("stuff", (0,))):
            present = [
                row
                for category, row in rows.items()
                if int(self.categories[category]["isthing"]) in chosen and row["tp"] + row["fp"] + row["fn"]
            ]
            means = {
                key: float(np.mean([row[key] for row in present])) if present else 0.0 for key in ("pq", "sq", "rq")
            }
            summary[name] = {**means, "n": len(present)}
        return {**summary, "per_class": rows}

    def _index(self, segments: Iterable[Mapping], name: str) -> dict[int, dict]:
        indexed = {}
        for segment in segments:
            if segment["category_id"] not in self._row:
                raise ValueError(
                    f"{name} has category_id {segment['category_id']} in segment {segment['id']}: known are "
                    f"{sorted(self._row)}"
                )
            number = int(segment["id"])
            if number in indexed or number == VOID:
                fault = "is void" if number == VOID else "stands there twice"
                raise ValueError(f"{name} has the id {number}, which {fault}: give every segment its own id above 0")
            indexed[number] = {
                "row": self._row[segment["category_id"]],
                "crowd": bool(segment.get("iscrowd", 0)),
            }
        return indexed


def to_map(value, name: str) -> np.ndarray:
    """(H, W) int64 of a map of ids; raises ValueError for what is none."""
    array = to_numpy(value)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}: it must be an (H, W) map of integer ids")
    if array.size and not 0 <= array.min() <= array.max() <= MAX_ID:
        raise ValueError(f"{name} has ids from {array.min()} to {array.max()}: they must be from 0 to {MAX_ID}")
    return array.astype(np.int64)


def count_pairs(truth: np.ndarray, prediction: np.ndarray) -> dict[tuple[int, int], int]:
    """Pixels per pair of ids; sorts runs of equal pairs, of which segments have few, instead of pixels."""
    if not truth.size:
        return {}
    keys = truth << 32 | prediction
    starts = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
    pairs, of_run = np.unique(keys[starts], return_inverse=True)
    counts = np.bincount(of_run, weights=np.diff(starts, append=keys.size)).astype(np.int64)
    return {(key >> 32, key & MAX_ID): n for key, n in zip(pairs.tolist(), counts.tolist(), strict=True)}


def _check_ids(areas: dict, listed: dict, map_name: str, list_name: str, must_appear: bool = True):
    unlisted = sorted(set(areas) - set(listed) - {VOID})
    if unlisted:
        raise ValueError(
            f"{map_name} has the ids {unlisted} that {list_name} does not describe: add them, or use 0 for void"
        )
    absent = sorted(set(listed) - set(areas)) if must_appear else []
    if absent:
        raise ValueError(f"{list_name} describes the ids {absent} that {map_name} does not have: remove them")
