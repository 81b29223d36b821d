"""Average precision of objects in videos by YouTube-VIS' rules: a track counts by its masks in all frames at once.

The rules are those of the official evaluation (`YTVOSeval`, which the original calls): COCO's with three differences.
The overlap of two tracks is the sum of intersections over the sum of unions of their frames; an object is small,
medium or large by its mean area over the frames where it is to be seen, with limits 128² and 256² pixels; crowds are
left out of the count, but overlap is measured with them as with others.

Letters: `D` tracks and `G` true objects of a video.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..data.rle import coco_tools, to_rle
from .coco_matching import Matches, best_of_class, checked_limits, match, summary

AREAS = {"all": (0, 1e10), "small": (0, 128**2), "medium": (128**2, 256**2), "large": (256**2, 1e10)}


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
        self.categories, self.max_detections = dict(categories), checked_limits(max_detections)
        self.videos: dict[Hashable, Matches] = {}
        self._row = {category: row for row, category in enumerate(self.categories)}

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
        kept = best_of_class([t["score"] for t in tracks], [t["category_id"] for t in tracks], self.max_detections[-1])
        found = self._tracks([tracks[index] for index in kept], video_id)
        self.videos[video_id] = self._match(found, self._tracks(objects, video_id))

    def _tracks(self, entries: list[Mapping], video_id) -> list["_Track"]:
        tracks = [_track(entry, self._row[entry["category_id"]]) for entry in entries]
        sizes = {tuple(code["size"]) for track in tracks for code in track.codes if code is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"video {video_id!r} has masks of the sizes {sorted(sizes)} (height, width): one is needed"
            )
        return tracks

    def _match(self, tracks: list["_Track"], objects: list["_Track"]) -> Matches:
        labels, true_labels = (np.array([track.row for track in side], dtype=int) for side in (tracks, objects))
        overlaps = np.zeros((len(tracks), len(objects)))
        for row in np.intersect1d(labels, true_labels):
            own, true = np.flatnonzero(labels == row), np.flatnonzero(true_labels == row)
            overlaps[np.ix_(own, true)] = track_overlaps([tracks[d] for d in own], [objects[g] for g in true])
        return match(
            labels,
            np.array([track.score for track in tracks]),
            np.array([track.area for track in tracks]),
            true_labels,
            np.array([thing.area for thing in objects]),
            np.array([thing.iscrowd for thing in objects], dtype=bool),
            overlaps,
            AREAS,
        )

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
            {"name", "AP", "AP50", "APs", "APm", "APl"}}}`, where AR's numbers are `max_detections`.
        """
        return summary(self.videos, self.categories, self.max_detections)


class _Track(NamedTuple):
    row: int  # of its class
    codes: list[dict | None]  # per frame, None without a pixel
    areas: np.ndarray  # (frames,) pixels
    area: float  # mean over the frames where there is a pixel
    score: float
    iscrowd: bool


def _track(entry: Mapping, row: int) -> _Track:
    codes = [None if mask is None else to_rle(mask) for mask in entry["segmentations"]]
    areas = np.array([0 if code is None else int(coco_tools().mask.area([code])[0]) for code in codes])
    given = entry.get("areas")
    told = areas[areas > 0] if given is None else np.array([area for area in given if area])
    area = float(told.mean()) if len(told) else 0.0
    return _Track(row, codes, areas, area, float(entry.get("score", 0)), bool(entry.get("iscrowd")))


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
