"""The numbers behind a report's figures and tables, from the states of metrics and findings."""

import math
from collections.abc import Mapping

import numpy as np

from .coco_matching import RECALLS, scores_and_hits
from .findings import SCORE_BINS

BINS = 10  # of the scores, in calibration


def scored(evaluator) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores of segments and whether they are right at an IoU of 0.5, of all images; None where there are no scores.

    Of instances those that average precision counts. Of panoptic segments each is put at the middle of its hundredth.
    """
    for name in ("ap", "box_ap"):
        if name in evaluator.metrics:
            return scores_and_hits(evaluator.metrics[name].matches)
    if evaluator.findings.task != "panoptic":
        return None
    counts = evaluator.findings.scores  # (bins, right or wrong)
    middles = (np.arange(SCORE_BINS) + 0.5) / SCORE_BINS
    scores = np.repeat(np.repeat(middles, 2), counts.ravel())
    return scores, np.repeat(np.tile([True, False], SCORE_BINS), counts.ravel())


def calibration(scores: np.ndarray, right: np.ndarray) -> dict:
    """How often segments of a score are right.

    Returns:
        `{"error", "bins": [{"score", "right", "count"}]}`: means of the scores and of what is right in `BINS` equal
        parts of [0, 1], nan in an empty one; the error is the mean distance of the two, weighted by the count (Guo et
        al., "On Calibration of Modern Neural Networks", ICML 2017), nan without segments.
    """
    part = (scores * BINS).astype(int).clip(0, BINS - 1)
    bins = []
    for number in range(BINS):
        own = part == number
        means = (float(scores[own].mean()), float(right[own].mean())) if own.any() else (math.nan, math.nan)
        bins.append({"score": means[0], "right": means[1], "count": int(own.sum())})
    gaps = [row["count"] * abs(row["score"] - row["right"]) for row in bins if row["count"]]
    return {"error": sum(gaps) / len(scores) if len(scores) else math.nan, "bins": bins}


def precision_recall(evaluator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curves by name: recall and precision.

    Of instances the mean over the classes at COCO's recalls, whose mean is AP50, AP75 or AP; of panoptic segments that
    of all classes together while the threshold of the score falls.
    """
    for name in ("ap", "box_ap"):
        if name in evaluator.metrics:
            precision = evaluator.metrics[name].precision_at_recalls()[..., 0]  # (T, R, K)
            precision = precision[:, :, ~np.isnan(precision).all((0, 1))]
            if not precision.shape[2]:
                return {}
            curves = {"IoU 0.5": precision[0], "IoU 0.75": precision[5], "IoU 0.5 to 0.95": precision.mean(0)}
            return {name: (RECALLS, curve.mean(-1)) for name, curve in curves.items()}
    truth = int(evaluator.findings.confusion[:-1].sum())
    if evaluator.findings.task != "panoptic" or not truth:
        return {}
    right, wrong = evaluator.findings.scores[::-1].cumsum(0).T
    some = right + wrong > 0
    return {"panoptic segments": (right[some] / truth, right[some] / (right + wrong)[some])}


def class_rows(summaries: Mapping[str, Mapping]) -> tuple[list[str], list[list], int]:
    """The table of classes: headings, rows of a name and figures, and how many classes occur nowhere."""
    columns = {
        "pq": {"pq": "PQ", "sq": "SQ", "rq": "RQ", "tp": "matched", "fp": "false", "fn": "missed"},
        "ap": {"AP": "AP", "AP50": "AP50", "APs": "AP small", "APm": "AP medium", "APl": "AP large"},
        "box_ap": {"AP": "box AP", "AP50": "box AP50", "APs": "box small", "APm": "box medium", "APl": "box large"},
        "miou": {"iou": "IoU", "accuracy": "accuracy", "pixels": "pixels"},
    }
    headings, classes = ["class"], {}
    for metric, summary in summaries.items():
        for label, row in summary["per_class"].items():
            seen = (
                row["tp"] + row["fp"] + row["fn"] > 0 if metric == "pq" else row[_FIRST[metric]] == row[_FIRST[metric]]
            )
            values = [row[key] if seen else math.nan for key in columns[metric]]
            own = classes.setdefault(label, [row["name"], *[math.nan] * (len(headings) - 1), False])
            own[-1:] = [*values, own[-1] or seen]
        headings += columns[metric].values()
        for own in classes.values():  # a metric of things has no row of stuff
            own[-1:-1] = [math.nan] * (len(headings) + 1 - len(own))
    rows = [row[:-1] for row in classes.values() if row[-1]]
    return headings, rows, len(classes) - len(rows)


_FIRST = {"ap": "AP", "box_ap": "AP", "miou": "iou"}
