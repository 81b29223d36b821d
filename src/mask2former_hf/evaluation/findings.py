"""What a report shows of the images besides the metrics: what was taken for what, which sizes were found, the best and
the worst images. Small, and merged between processes as the metrics are."""

import math
from collections.abc import Hashable, Mapping

import numpy as np

from ..data.example import Example
from .kept_pictures import Kept
from .mean_iou import MeanIoU
from .object_matching import NOBODY, Overlaps, instance_overlaps, panoptic_overlaps, partners
from .panoptic_quality import PanopticQuality, count_pairs
from .truth import label_map, single_map, true_objects

TASKS = ("panoptic", "instance", "semantic")  # of several, the first is looked at
SURE = 0.5  # score of the instances that are looked at; average precision takes all
SIDES = 2.0 ** np.arange(1, 12)  # bounds of the sizes: the square root of the area, in pixels
SCORE_BINS = 100


class Findings:
    """Counts image by image, of one kind of results.

    Args:
        tasks: kinds of results that there are; panoptic goes before instance, and that before semantic.
        categories: class id -> `{"name", "isthing"}` of the model.

    Attributes:
        task: whose results are counted.
        categories: of these: for instances the things.
        confusion: (K + 1, K + 1) how often an object of the class of the row was found as the class of the column. In
            the last column it was missed, in the last row there was no object. Objects match at an IoU of 0.5, first
            within their class, so that diagonal, rows and columns are the metric's counts. Semantic: pixels.
        sizes: (S, 2) true objects by size (`SIDES`), found in their class or not; empty for semantic results.
        scores: (SCORE_BINS, 2) panoptic segments by score, right or wrong.
        qualities: image id -> (name, quality): for panoptic results the PQ, for semantic ones the mean IoU, of this
            image alone; for instances the formula of PQ on the objects above a score of 0.5, all classes as one. nan
            for images where there is nothing and nothing was found.
        kept: the worst and the best images, as pictures.
    """

    def __init__(self, tasks, categories: Mapping[int, Mapping]):
        self.task = next(task for task in TASKS if task in tasks)
        self.stuff = {label for label, category in categories.items() if not category["isthing"]}
        self.num_labels = len(categories)
        if self.task == "instance":
            categories = {label: category for label, category in categories.items() if category["isthing"]}
        self.categories = dict(categories)
        self._row = {label: row for row, label in enumerate(self.categories)}
        self.confusion = np.zeros((len(self._row) + 1,) * 2, dtype=np.int64)
        self.sizes = np.zeros((len(SIDES) + 1, 2), dtype=np.int64)
        self.scores = np.zeros((SCORE_BINS, 2), dtype=np.int64)
        self.qualities: dict[Hashable, tuple[str, float]] = {}
        self.kept = Kept()

    def update(self, results: Mapping, example: Example, image_id: Hashable):
        """Count one image: its results by task, and its truth."""
        result = results[self.task]
        count = {"panoptic": self._panoptic, "instance": self._instances, "semantic": self._semantic}[self.task]
        quality = count(result, example)
        name = example.file_name or f"image {image_id if example.image_id is None else example.image_id}"
        self.qualities[image_id] = (name, quality)
        sure = 0.0 if self.task != "instance" else SURE
        self.kept.offer(quality, image_id, name, example, result, self.stuff, sure)

    def merge(self, other: "Findings"):
        """Add the counts of other images, for example of another process."""
        if (self.task, self.categories) != (other.task, other.categories):
            raise ValueError("other looked at other results or categories: merge findings that were made alike")
        self.confusion += other.confusion
        self.sizes += other.sizes
        self.scores += other.scores
        self.qualities.update(other.qualities)
        self.kept.merge(other.kept)

    def confusions(self) -> list[dict]:
        """What is not 0 in `confusion`, the most frequent first; None stands for no object."""
        names = [category["name"] for category in self.categories.values()] + [None]
        rows, columns = np.nonzero(self.confusion)
        counts = self.confusion[rows, columns]
        cells = [(rows[n], columns[n], int(counts[n])) for n in np.argsort(-counts, kind="stable")]
        return [{"true": names[row], "predicted": names[column], "count": count} for row, column, count in cells]

    def ranked(self) -> list[tuple[str, float]]:
        """Names and qualities of the images, the worst first; of those that have one."""
        known = [(quality, str(image_id), name) for image_id, (name, quality) in self.qualities.items()]
        return [(name, quality) for quality, _, name in sorted(x for x in known if not math.isnan(x[0]))]

    def _panoptic(self, result, example: Example) -> float:
        pairs = count_pairs(single_map(example, "pq").ravel().astype(np.int64), result.map.ravel().astype(np.int64))
        segments = [{"id": s.id, "category_id": s.label_id, "score": s.score} for s in result.segments]
        found = panoptic_overlaps(pairs, segments, example.segments)
        right = self._count_objects(found, partners(found))
        judged = right | ~found.excused
        bins = (found.scores * SCORE_BINS).astype(int).clip(0, SCORE_BINS - 1)
        np.add.at(self.scores, (bins[judged], (~right[judged]).astype(int)), 1)
        quality = PanopticQuality(self.categories)
        quality.count(pairs, segments, example.segments)
        figures = quality.compute()["all"]
        return figures["pq"] if figures["n"] else math.nan

    def _instances(self, result, example: Example) -> float:
        entries = [e for e in result.to_coco() if e["score"] >= SURE and e["category_id"] in self._row]
        found = instance_overlaps(entries, true_objects(example, self.stuff))
        partner = partners(found)
        right = self._count_objects(found, partner)
        errors = (~right & ~found.excused).sum() + len(found.true_labels) - right.sum()
        if not right.sum() + errors:
            return math.nan
        ious = found.ious[np.flatnonzero(right), partner[right]]
        return float(ious.sum() / (right.sum() + errors / 2))

    def _semantic(self, result, example: Example) -> float:
        image = MeanIoU(self.categories, ignore_index=self.num_labels)
        image.update(result.map, label_map(example, self.num_labels))
        self.confusion[:-1, :-1] += image.confusion
        return image.compute()["mIoU"]

    def _count_objects(self, found: Overlaps, partner: np.ndarray) -> np.ndarray:
        """Add an image's objects to the counts; (D,) which segments are right."""
        rows, true_rows = (
            np.array([self._row[label] for label in labels.tolist()], dtype=int)
            for labels in (found.labels, found.true_labels)
        )
        nothing, matched = len(self._row), partner != NOBODY
        of_true = np.full(len(true_rows), nothing)
        of_true[partner[matched]] = rows[matched]
        np.add.at(self.confusion, (true_rows, of_true), 1)
        alarms = ~matched & ~found.excused
        np.add.at(self.confusion, (np.full(alarms.sum(), nothing), rows[alarms]), 1)
        bins = np.searchsorted(SIDES, np.sqrt(found.areas), side="right")
        np.add.at(self.sizes, (bins, (of_true != true_rows).astype(int)), 1)
        right = matched.copy()
        right[matched] = true_rows[partner[matched]] == rows[matched]
        return right
