"""Average precision of objects in videos by YouTube-VIS' rules: a track counts by its masks in all frames at once.

The rules are those of the official evaluation (`YTVOSeval`, which the original calls): COCO's with three differences.
The overlap of two tracks is the sum of intersections over the sum of unions of their frames; an object is small,
medium or large by its mean area over the frames where it is to be seen, with limits 128² and 256² pixels; crowds are
left out of the count, but overlap is measured with them as with others.

Letters: `D` tracks and `G` true objects of one class in one video, `T` IoU thresholds, `A` ranges of area.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..data.rle import coco_tools, to_rle

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 128**2), "medium": (128**2, 256**2), "large": (256**2, 1e10)}


class _Matches(NamedTuple):
    """What is kept of one class in one video, tracks by falling score."""

    scores: np.ndarray  # (D,)
    matched: np.ndarray  # (A, T, D) bool
    ignored: np.ndarray  # (A, T, D) bool
    counted: np.ndarray  # (A,) true objects


class VideoAveragePrecision:
    """Compares the tracks of a video with its objects when it comes, and keeps which were right.

    Pickle the object to send it to another process; the result does not depend on the order of updates and merges.

    Args:
        categories: class id -> `{"name", ...}`.
        max_detections: rising numbers n; only the n best tracks of a class count in a video, the largest n for AP,
            each n for its AR.

    Raises:
        ValueError: for `max_detections` that do not rise.
        ImportError: without a COCO package.
    """

    def __init__(self, categories: Mapping[int, Mapping], max_detections: Sequence[int] = (1, 10, 100)):
        coco_tools()  # now, and not after the first videos
        self.categories, self.max_detections = dict(categories), tuple(max_detections)
        if not self.max_detections or sorted({*self.max_detections, 0}) != [0, *self.max_detections]:
            raise ValueError(
                f"max_detections={max_detections}: must be rising numbers from 1, for example (1, 10, 100)"
            )
        self.videos: dict[Hashable, dict[int, _Matches]] = {}

    def update(self, tracks: Iterable[Mapping], objects: Iterable[Mapping], *, video_id: Hashable):
        """Count one video; also one without tracks or without objects.

        Args:
            tracks: a mapping per track with `category_id`, `score`, and `segmentations`: per frame an RLE or an (H, W)
                bool mask, None where it has no pixel. The entries of a YouTube-VIS result file are such mappings.
            objects: the truth, likewise without `score`; optionally `iscrowd` and `areas`, per frame in pixels, of
                which the mean decides whether it is small, medium or large; by default the masks' pixels are counted.
            video_id: any hashable that means the same in all processes.

        Raises:
            ValueError: for a video that was counted before, unknown classes, scores that are not finite, and tracks or
                objects with different numbers of frames or sizes.
        """
        if video_id in self.videos:
            raise ValueError(f"video_id={video_id!r} was counted before: update once per video")
        tracks, objects = list(tracks), list(objects)
        lengths = {len(entry["segmentations"]) for entry in (*tracks, *objects)}
        if len(lengths) > 1:
            raise ValueError(
                f"video {video_id!r} has tracks or objects of {sorted(lengths)} frames: give segmentations for every "
                "frame, None where there is no pixel"
            )
        unknown = {entry["category_id"] for entry in (*tracks, *objects)} - set(self.categories)
        if unknown:
            raise ValueError(
                f"video {video_id!r} has the classes {sorted(unknown)}: known are {list(self.categories)}"
            )
        if not all(math.isfinite(track["score"]) for track in tracks):
            raise ValueError(f"scores of video {video_id!r} are nan or infinite: a confidence must be finite")
        self.videos[video_id] = {
            category: matches
            for category in self.categories
            if (matches := self._match(*(_of(category, side, video_id) for side in (tracks, objects)))) is not None
        }

    def _match(self, tracks: list["_Track"], objects: list["_Track"]) -> _Matches | None:
        if not tracks and not objects:
            return None
        tracks = sorted(tracks, key=lambda track: -track.score)[: self.max_detections[-1]]
        overlaps = track_overlaps(tracks, objects)
        shape = (len(AREAS), len(THRESHOLDS), len(tracks))
        matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
        counted = np.zeros(len(AREAS), np.int64)
        for a, (low, high) in enumerate(AREAS.values()):
            left_out = np.array([o.iscrowd or not low <= o.area <= high for o in objects], dtype=bool)
            counted[a] = (~left_out).sum()
            outside = np.array([not low <= track.area <= high for track in tracks], dtype=bool)
            order = np.argsort(left_out, kind="stable")  # objects that count come first
            crowds = np.array([objects[g].iscrowd for g in order], dtype=bool)
            for t, threshold in enumerate(THRESHOLDS):
                chosen = _assign(overlaps[:, order], left_out[order], crowds, threshold)
                matched[a, t] = chosen >= 0
                ignored[a, t] = np.where(chosen >= 0, left_out[order][chosen] if len(objects) else False, outside)
        return _Matches(np.array([track.score for track in tracks]), matched, ignored, counted)

    def merge(self, other: "VideoAveragePrecision"):
        """Add the videos of another metric, for example of another process."""
        for name in ("categories", "max_detections"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other has another {name}: merge metrics that were made alike")
        twice = sorted(map(repr, self.videos.keys() & other.videos.keys()))
        if twice:
            raise ValueError(
                f"{len(twice)} videos were counted in both metrics, for example {', '.join(twice[:3])}: give each "
                "video to one process"
            )
        self.videos.update(other.videos)

    def compute(self) -> dict:
        """Figures in [0, 1], nan where there is no such object in the truth (the official evaluation prints -1).

        Returns:
            `{"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "per_class": {id:
            {"name", "AP", "AP50"}}}`, where AR's numbers are `max_detections`.
        """
        order = sorted(self.videos, key=lambda video: (type(video).__name__, video))  # between equal scores
        best = self.max_detections[-1]
        rows = {
            category: [self.videos[video][category] for video in order if category in self.videos[video]]
            for category in self.categories
        }
        curves = {
            (area, count): [_curve(rows[category], a, count) for category in self.categories]
            for a, area in enumerate(AREAS)
            for count in (self.max_detections if area == "all" else (best,))
        }
        every = [precision for precision, _ in curves["all", best]]  # (T, 101) per class, nan without objects
        figures = {"AP": _mean(every), "AP50": _mean([p[0] for p in every]), "AP75": _mean([p[5] for p in every])}
        figures |= {f"AP{area[0]}": _mean([p for p, _ in curves[area, best]]) for area in list(AREAS)[1:]}
        figures |= {f"AR{n}": _mean([recall for _, recall in curves["all", n]]) for n in self.max_detections}
        figures |= {f"AR{area[0]}": _mean([recall for _, recall in curves[area, best]]) for area in list(AREAS)[1:]}
        figures["per_class"] = {
            category: {"name": row["name"], "AP": _mean([precision]), "AP50": _mean([precision[0]])}
            for (category, row), precision in zip(self.categories.items(), every, strict=True)
        }
        return figures


class _Track(NamedTuple):
    codes: list[dict | None]  # per frame, None without a pixel
    areas: np.ndarray  # (frames,) pixels
    area: float  # mean over the frames where there is a pixel
    score: float
    iscrowd: bool


def _of(category: int, entries: Iterable[Mapping], video_id) -> list[_Track]:
    tracks, sizes = [], set()
    for entry in entries:
        if entry["category_id"] != category:
            continue
        codes = [None if mask is None else to_rle(mask) for mask in entry["segmentations"]]
        sizes |= {tuple(code["size"]) for code in codes if code is not None}
        areas = np.array([0 if code is None else int(coco_tools().mask.area([code])[0]) for code in codes])
        given = entry.get("areas")
        told = areas[areas > 0] if given is None else np.array([area for area in given if area])
        area = float(told.mean()) if len(told) else 0.0
        tracks.append(_Track(codes, areas, area, float(entry.get("score", 0)), bool(entry.get("iscrowd"))))
    if len(sizes) > 1:
        raise ValueError(f"video {video_id!r} has masks of the sizes {sorted(sizes)} (height, width): one is needed")
    return tracks


def track_overlaps(tracks: list[_Track], objects: list[_Track]) -> np.ndarray:
    """(D, G) sum of the frames' intersections over the sum of their unions; 0 where neither has a pixel."""
    shared = np.zeros((len(tracks), len(objects)))
    total = np.array([[d.areas.sum() + g.areas.sum() for g in objects] for d in tracks], float).reshape(shared.shape)
    for frame in range(len(tracks[0].codes) if tracks and objects else 0):
        rows = [n for n, track in enumerate(tracks) if track.areas[frame]]
        columns = [n for n, thing in enumerate(objects) if thing.areas[frame]]
        if not rows or not columns:
            continue
        here = [[side[n].codes[frame] for n in some] for side, some in ((tracks, rows), (objects, columns))]
        overlap = coco_tools().mask.iou(*here, [0] * len(columns))  # i / (a + b - i)
        areas = [[side[n].areas[frame] for n in some] for side, some in ((tracks, rows), (objects, columns))]
        both = np.add.outer(*areas)
        shared[np.ix_(rows, columns)] += np.rint(overlap * both / (1 + overlap))  # whole pixels again
    union = total - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _assign(overlaps: np.ndarray, left_out: np.ndarray, crowds: np.ndarray, threshold: float) -> np.ndarray:
    """(D,) the object of each track, -1 for none: the best tracks choose first, objects that count are preferred."""
    chosen, taken = np.full(len(overlaps), -1), np.zeros(overlaps.shape[1], bool)
    for d, row in enumerate(overlaps):
        free = (row >= min(threshold, 1 - 1e-10)) & (~taken | crowds)
        for group in (free & ~left_out, free & left_out):
            if group.any():
                values = np.where(group, row, -1)
                chosen[d] = len(values) - 1 - values[::-1].argmax()  # the last of equal ones, as COCO's loop takes it
                taken[chosen[d]] = True
                break
    return chosen


def _curve(rows: list[_Matches], a: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, 101) at the recalls and the final recall (T,) of a class; nan without objects."""
    precision, recall = np.zeros((len(THRESHOLDS), len(RECALLS))), np.zeros(len(THRESHOLDS))
    counted = sum(int(row.counted[a]) for row in rows)
    if not counted:
        return precision * math.nan, recall * math.nan
    scores = np.concatenate([row.scores[:count] for row in rows])
    order = np.argsort(-scores, kind="stable")
    matched = np.concatenate([row.matched[a, :, :count] for row in rows], axis=1)[:, order]
    ignored = np.concatenate([row.ignored[a, :, :count] for row in rows], axis=1)[:, order]
    right, wrong = (matched & ~ignored).cumsum(1), (~matched & ~ignored).cumsum(1)
    for t in range(len(THRESHOLDS)):
        recalls = right[t] / counted
        precisions = right[t] / (right[t] + wrong[t] + np.spacing(1))
        precisions = np.maximum.accumulate(precisions[::-1])[::-1]
        places = np.searchsorted(recalls, RECALLS, side="left")
        reached = places < len(recalls)
        precision[t, reached] = precisions[places[reached]]
        recall[t] = recalls[-1] if len(recalls) else 0
    return precision, recall


def _mean(values: list[np.ndarray]) -> float:
    """Over all that is not nan: classes without objects do not count."""
    flat = np.concatenate([np.ravel(value) for value in values]) if values else np.zeros(0)
    flat = flat[~np.isnan(flat)]
    return float(flat.mean()) if flat.size else math.nan
