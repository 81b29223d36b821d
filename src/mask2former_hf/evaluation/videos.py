"""Measure a segmenter of videos on annotated videos."""

from collections.abc import Callable, Iterable

from ..data.videos import Video, VideoReader
from ..inference.video_results import TrackCollector
from ..inference.video_segmenter import VideoSegmenter
from .identity_switches import IdentitySwitches
from .video_average_precision import VideoAveragePrecision


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
    videos: VideoReader | Iterable[Video],
    *,
    threshold: float = 0.0,
    progress: Callable[[Iterable], Iterable] = iter,
    **numbers,
) -> dict:
    """Average precision of tracks, and how often ids change.

    Ids are counted among the objects above a score of 0.5 (`IdentitySwitches`), which is what one would look at; the
    many weak ones that average precision wants would take over and give back ids.

    Args:
        videos: with the classes of the segmenter's checkpoint.
        threshold: lowest score that counts, 0 for average precision.
        progress: wraps the videos, such as `tqdm.tqdm`.
        numbers: see `VideoSegmenter.stream`.

    Returns:
        the figures of `VideoAveragePrecision.compute` and of `IdentitySwitches.compute`.
    """
    names = segmenter.model.config.id2label
    if dict(videos.classes.id2label) != {int(label): name for label, name in names.items()}:
        raise ValueError(
            f"videos have the classes {list(videos.classes.id2label.values())[:5]} ... and the model "
            f"{list(names.values())[:5]} ...: they must be the same, in the same order"
        )
    precision, switches = VideoAveragePrecision({label: {"name": names[label]} for label in names}), IdentitySwitches()
    for number, video in enumerate(progress(videos)):
        stream, collector = segmenter.stream(threshold=threshold, **numbers), TrackCollector()
        for frame in range(video.length):
            for result in stream.push(video.frame(frame)):
                collector.add(result)
        for result in stream.finish():
            collector.add(result)
        tracks, objects = collector.tracks(stream), objects_of(video)
        precision.update(tracks, objects, video_id=number)
        switches.update([track for track in tracks if track["score"] >= 0.5], objects)
    return precision.compute() | switches.compute()
