"""A video into a folder: an overlay with colours that stay, YouTube-VIS' results, and the names of their labels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.json_files import write_json
from .drawing import draw_tracks
from .segmentation import Segmentation
from .video_files import VideoSource, VideoWriter
from .video_results import TrackCollector, for_json
from .video_segmenter import FrameStream, VideoSegmenter, WindowStream

OVERLAY, TRACKS, CATEGORIES = RESULTS = ("video.mp4", "tracks.json", "categories.json")
ASKED_AGAIN = 10  # frames of which the best score is looked for if no object was above the threshold


@dataclass(frozen=True)
class PredictedVideo:
    """What became of a video.

    Args:
        length: frames that were segmented.
        tracks: of `TrackCollector.tracks`.
        problem: why it ended before the source did; "" if it did not.
        cut: the source has more frames than were asked for.
    """

    length: int
    tracks: list[dict]
    problem: str = ""
    cut: bool = False


def predict_video(
    segmenter: VideoSegmenter,
    source: VideoSource,
    stream: FrameStream | WindowStream,
    folder: Path,
    *,
    video_id: str | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
    most_frames: int | None = None,
) -> PredictedVideo:
    """Segment a video and write `RESULTS`; where it is damaged, or on Ctrl-C, what came before is written.

    Args:
        stream: of the segmenter, new.
        folder: that exists.
        video_id: in the json; None for the source's name.
        progress: wraps the frames, such as tqdm.
        most_frames: the first so many; None for all.

    Raises:
        ImportError: without PyAV.
    """
    collector, problem, cut = TrackCollector(), "", False
    frames = iter(source)
    try:
        with VideoWriter(folder / OVERLAY, source.rate) as writer:
            for image, result in _results(progress(islice(frames, most_frames)), stream):
                collector.add(result)
                shown = result.plot(image) if segmenter.task == "semantic" else draw_tracks(image, result)
                writer.add(np.asarray(shown))
        cut = most_frames is not None and next(frames, None) is not None
    except (OSError, ValueError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = f"interrupted after {collector.length} frames"
    finally:
        tracks = collector.tracks(stream)
        names = segmenter.model.config.id2label
        write_json(folder / TRACKS, for_json(tracks, source.name if video_id is None else video_id), indent=None)
        write_json(folder / CATEGORIES, [{"id": n, "name": name} for n, name in names.items()])
    return PredictedVideo(collector.length, tracks, problem, cut)


def _results(frames: Iterable, stream) -> Iterator[tuple[np.ndarray, Segmentation]]:
    """Frames with their results, which may come some frames later: where the frames end too soon, before the error."""
    waiting, problem = [], None
    try:
        for image in frames:
            waiting.append(image)
            for result in stream.push(image):
                yield waiting.pop(0), result
    except (OSError, ValueError) as error:
        problem = error
    for result in stream.finish():
        yield waiting.pop(0), result
    if problem is not None:
        raise problem


def best_score(segmenter: VideoSegmenter, source: VideoSource, **numbers) -> float:
    """Of any object in the first frames, however small it is; `numbers` as for `VideoSegmenter.stream`."""
    stream = segmenter.stream(**numbers | {"threshold": 0.0})
    try:
        for image in islice(source, ASKED_AGAIN):
            stream.push(image)
        stream.finish()
    except (OSError, ValueError):  # a damaged file: what was seen before counts
        pass
    return max((seen.score for seen in stream.seen.values()), default=0.0)
