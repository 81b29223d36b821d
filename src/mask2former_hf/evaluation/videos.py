"""Measure a segmenter of videos on annotated videos."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..data.videos import Video, VideoReader
from ..inference.segmentation import Segmentation
from ..inference.video_results import TrackCollector
from ..inference.video_segmenter import VideoSegmenter
from .evaluator import merge_processes, own_share
from .identity_switches import IdentitySwitches
from .matching_classes import labels_in_model
from .video_average_precision import VideoAveragePrecision
from .video_panoptic_quality import VideoPanopticQuality

SURE = 0.5  # score of the objects among which ids are counted


class VideoEvaluator:
    """The metrics of a segmenter: average precision of its tracks or, of panoptic results, VPQ; and identity switches.

    Ids are counted among the things above a score of 0.5, which is what one would look at; the many weak ones that
    average precision wants would take over and give back ids.

    Args:
        segmenter: whose `task` decides; its model and processor are called.
        classes: of the videos, a `ClassTable`; found in the model by name.
        class_agnostic: take all classes, of the videos and of the results, for one. For data that have no classes.
        numbers: see `VideoSegmenter.stream`; of instances all count, unless there is a threshold among them.

    Attributes:
        metrics: by name, each to be merged with others.

    Raises:
        ValueError: for semantic results, of which nothing is followed, and classes that the model does not have.
    """

    def __init__(self, segmenter: VideoSegmenter, classes, *, class_agnostic: bool = False, **numbers):
        if segmenter.task == "semantic" or (class_agnostic and segmenter.task == "panoptic"):
            raise ValueError(
                f"task={segmenter.task!r}{' with class_agnostic=True' if class_agnostic else ''}: videos are measured "
                "by instance results, or by panoptic ones with their classes"
            )
        self.segmenter, self.class_agnostic = segmenter, class_agnostic
        rules = segmenter.rules(**numbers)
        self.stuff = set(rules.stuff_label_ids)
        self.numbers = {"threshold": 0.0} | numbers if segmenter.task == "instance" else numbers
        if class_agnostic:
            self.labels, categories = dict.fromkeys(classes.id2label, 0), {0: {"name": "object", "isthing": True}}
        else:
            self.labels = labels_in_model(segmenter.model.config, classes)
            categories = {n: {"name": name, "isthing": n not in self.stuff} for n, name in rules.id2label.items()}
        if segmenter.task == "instance":
            self.metrics = {"ap": VideoAveragePrecision(categories)}
        else:
            self.metrics = {"vpq": VideoPanopticQuality(categories)}
        self.metrics["switches"] = IdentitySwitches()

    def count(self, video: Video, number: int):
        """Segment a video and count it; `number` is unique over all processes."""
        stream, collector = self.segmenter.stream(**self.numbers), TrackCollector()
        results = self._results(video, stream, collector)
        if "vpq" in self.metrics:
            self.metrics["vpq"].update(
                (result.map, _segments(result), *self._true_map(video, frame)) for frame, result in enumerate(results)
            )
        else:
            for _ in results:
                pass
        tracks, objects = collector.tracks(stream), self._objects(video)
        if self.class_agnostic:  # classes of the truth are 0 already, whatever label that is of the model's
            tracks = [track | {"category_id": 0} for track in tracks if track["category_id"] not in self.stuff]
            things = objects
        else:
            tracks, things = ([x for x in side if x["category_id"] not in self.stuff] for side in (tracks, objects))
        if "ap" in self.metrics:
            self.metrics["ap"].update(tracks, things, video_id=number)
        sure = [track for track in tracks if track["score"] >= SURE]
        self.metrics["switches"].update(sure, things)

    @property
    def parts(self) -> dict:
        """What is merged with other evaluators', by name."""
        return self.metrics

    def compute(self) -> dict:
        """The figures of all metrics in one mapping."""
        return {name: value for metric in self.metrics.values() for name, value in metric.compute().items()}

    def _results(self, video: Video, stream, collector: TrackCollector) -> Iterator[Segmentation]:
        for frame in range(video.length):
            for result in stream.push(video.frame(frame)):
                collector.add(result)
                yield result
        for result in stream.finish():
            collector.add(result)
            yield result

    def _objects(self, video: Video) -> list[dict]:
        return [thing | {"category_id": self.labels[thing["category_id"]]} for thing in objects_of(video)]

    def _true_map(self, video: Video, frame: int) -> tuple[np.ndarray, list[dict]]:
        """Ids of a frame, 0 where nothing is annotated, and its segments."""
        ids, segments = np.zeros(video.size, dtype=np.int64), []
        for number, thing in enumerate(video.objects, start=1):
            mask = thing.mask(frame, video.size)
            if not mask.any():
                continue
            if ids[mask].any():
                raise ValueError(
                    f"video {video.id!r}: objects overlap in frame {frame}, and panoptic quality is not defined for "
                    "them; measure instance results (task='instance')"
                )
            ids[mask] = number
            segments.append({"id": number, "category_id": self.labels[thing.label], "iscrowd": thing.iscrowd})
        return ids, segments


def _segments(result: Segmentation) -> list[dict]:
    return [{"id": segment.id, "category_id": segment.label_id} for segment in result.segments]


def objects_of(video: Video) -> list[dict]:
    """The truth of a video as the metrics take it."""
    return [
        {
            "category_id": thing.label,
            "iscrowd": thing.iscrowd,
            "segmentations": [
                None if thing.segmentations[frame] is None else thing.mask(frame, video.size)
                for frame in range(video.length)
            ],
        }
        for thing in video.objects
    ]


def evaluate_videos(
    segmenter: VideoSegmenter,
    videos: VideoReader,
    *,
    class_agnostic: bool = False,
    progress: Callable[[Iterable], Iterable] = iter,
    **numbers,
) -> dict:
    """Figures of a segmenter; under `torch.distributed` every process measures its share and gets the whole.

    Args:
        videos: with `classes`, which are found in the segmenter's model by name.
        progress: wraps the numbered videos of this process, such as `tqdm.tqdm`.
        class_agnostic, numbers: see `VideoEvaluator`.

    Returns:
        of instances the figures of `VideoAveragePrecision.compute`, of panoptic results those of
        `VideoPanopticQuality.compute`; and those of `IdentitySwitches.compute`.
    """
    evaluator = VideoEvaluator(segmenter, videos.classes, class_agnostic=class_agnostic, **numbers)
    for number, video in progress(own_share(videos)):
        evaluator.count(video, number)
    return merge_processes(evaluator).compute()


def headline_of_videos(figures: dict) -> dict[str, float]:
    """The usual figures of `evaluate_videos`, flat: all in [0, 1] but `switches`, which is a number."""
    names = ("AP", "AP50", "AP75", "AR1", "AR10", "vpq", "vpq_things", "vpq_stuff", "found", "switches")
    return {name.lower(): figures[name] for name in names if name in figures}
