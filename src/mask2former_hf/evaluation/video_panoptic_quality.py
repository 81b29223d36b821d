"""Panoptic quality of videos (Kim et al., "Video Panoptic Segmentation", CVPR 2020, section 4): tubes for segments.

A tube is what a segment is in some consecutive frames. Over all such windows of a video, tubes are matched as panoptic
quality matches segments, by the overlap in all frames of the window together; so an id that changes costs what a wrong
segment costs. VPQ is the mean over windows of several lengths.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .panoptic_quality import PanopticQuality, count_pairs, to_map

WINDOWS = (1, 2, 3, 4)  # frames; the paper's k = 0, 5, 10, 15 at one annotated frame of five


class VideoPanopticQuality:
    """Counts matches window by window; of a video no more frames than the longest window has are kept.

    Args:
        categories: class id -> `{"name", "isthing"}`.
        windows: numbers of frames; a video counts for those that it is long enough for.

    Raises:
        ValueError: for windows that are not rising numbers from 1.
    """

    def __init__(self, categories: Mapping[int, Mapping], windows: Sequence[int] = WINDOWS):
        if not windows or sorted({*windows, 0}) != [0, *windows]:
            raise ValueError(f"windows={windows}: must be rising numbers of frames from 1, for example (1, 2, 3, 4)")
        self.categories = dict(categories)
        self.qualities = {length: PanopticQuality(categories) for length in windows}

    def update(self, frames: Iterable[tuple[np.ndarray, Iterable[Mapping], np.ndarray, Iterable[Mapping]]]):
        """Count one video.

        Args:
            frames: per frame the arguments of `PanopticQuality.update`: the map of the prediction and its segments,
                the map of the truth and its segments. An id is one object in all frames.

        Raises:
            ValueError: as `PanopticQuality.update`; also for frames of different sizes.
        """
        recent = deque(maxlen=max(self.qualities))
        size = None
        for prediction, predicted_segments, truth, segments in frames:
            prediction, truth = to_map(prediction, "prediction"), to_map(truth, "truth")
            size = size or prediction.shape
            if prediction.shape != truth.shape or prediction.shape != size:
                raise ValueError(
                    f"a frame's prediction is {prediction.shape}, its truth {truth.shape}, the first frame {size}: "
                    "resize the predictions, and give videos of one size"
                )
            recent.append((count_pairs(truth.ravel(), prediction.ravel()), [*predicted_segments], [*segments]))
            for length, quality in self.qualities.items():
                if len(recent) >= length:
                    _count(quality, list(recent)[-length:])

    def merge(self, other: "VideoPanopticQuality"):
        """Add the counts of other videos, for example of another process."""
        if self.qualities.keys() != other.qualities.keys():
            raise ValueError("other has other windows: merge metrics that were made alike")
        for length, quality in self.qualities.items():
            quality.merge(other.qualities[length])

    def compute(self) -> dict:
        """Figures in [0, 1].

        Returns:
            `{"vpq", "vpq_things", "vpq_stuff"}`, means over the windows, and `"windows": {length: the summary of
            PanopticQuality.compute}`.
        """
        windows = {length: quality.compute() for length, quality in self.qualities.items()}
        names = {"vpq": "all", "vpq_things": "things", "vpq_stuff": "stuff"}
        figures = {name: float(np.mean([w[part]["pq"] for w in windows.values()])) for name, part in names.items()}
        return {**figures, "windows": windows}


def _count(quality: PanopticQuality, frames: list[tuple]):
    """A window of frames, each with its pairs of ids and its segments."""
    pairs, predicted, true = Counter(), {}, {}
    for overlap, predicted_segments, segments in frames:
        pairs.update(overlap)
        predicted |= {int(segment["id"]): segment for segment in predicted_segments}
        true |= {int(segment["id"]): segment for segment in segments}
    seen = {number for number, _ in pairs}
    quality.count(pairs, predicted.values(), [segment for number, segment in true.items() if number in seen])
