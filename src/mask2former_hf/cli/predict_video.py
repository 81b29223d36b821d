"""`mask2former-hf predict VIDEO`: an overlay with colours that stay, and YouTube-VIS' results."""

import argparse
import sys
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from ..data.json_files import write_json
from ..inference.drawing import draw_tracks
from ..inference.loading import LoadingError
from ..inference.video_files import VideoSource, VideoWriter, load_av
from ..inference.video_results import TrackCollector, for_json
from ..inference.video_segmenter import VideoSegmenter
from .main import UserError

ASKED_AGAIN = 10  # frames of which the best score is looked for if no object was above the threshold
RESULTS = ("video.mp4", "tracks.json", "categories.json")


def run(arguments: argparse.Namespace, remove_earlier: Callable[[], None]) -> int:
    """`remove_earlier` takes away an earlier run's results, once nothing stands in the way of new ones."""
    given = {"refine": arguments.refine, "tta": arguments.tta, "tile": arguments.tile, "overlap": arguments.overlap}
    given |= {"tolerance": arguments.tolerance, "batch-size": arguments.batch_size > 1}
    given |= {"num-workers": arguments.num_workers is not None, "num-shards": arguments.num_shards is not None}
    given |= {"shard": arguments.shard is not None, "no-overlays": arguments.no_overlays}
    given |= {name: getattr(arguments, name) is not None for name in ("root", "split", "column", "effort")}
    given["format"] = arguments.format != ["coco"]
    for flag, value in given.items():
        if value:
            raise UserError(f"--{flag}: is for images; leave it out for a video")
    name = str(arguments.images[0])
    try:
        source = VideoSource(name)
        load_av()  # for what is written; now, and not after the first frames
    except (OSError, ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    segmenter, numbers = _segmenter(arguments)
    try:
        stream = segmenter.stream(**numbers)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('stuff_label_ids', 'stuff')}") from error
    remove_earlier()
    arguments.output.mkdir(parents=True, exist_ok=True)
    problem, collector = None, TrackCollector()
    try:
        with VideoWriter(arguments.output / "video.mp4", source.rate) as writer:
            for image, result in _results(source, stream):
                collector.add(result)
                shown = result.plot(image) if segmenter.task == "semantic" else draw_tracks(image, result)
                writer.add(np.asarray(shown))
    except (OSError, ValueError) as error:  # of the source: what was predicted is kept
        problem = str(error)
    except KeyboardInterrupt:
        problem = f"interrupted after {collector.length} frames"
    finally:
        tracks = collector.tracks(stream)
        write_json(arguments.output / "tracks.json", for_json(tracks, name), indent=None)
        names = segmenter.model.config.id2label
        write_json(arguments.output / "categories.json", [{"id": n, "name": name} for n, name in names.items()])
    if problem:
        print(f"mask2former-hf predict: {problem}", file=sys.stderr)
    print(f"{collector.length} frames, {len(tracks)} objects: {arguments.output}")
    if collector.length and not tracks and segmenter.task != "semantic":
        print(
            f"0 objects are above the threshold of {stream.rules.threshold:g}; best score of the first frames "
            f"{best_score(segmenter, source, numbers):.2f}; try --threshold"
        )
    return 2 if problem else 0


def _segmenter(arguments) -> tuple[VideoSegmenter, dict]:
    given = {"threshold": arguments.threshold, "stuff_label_ids": arguments.stuff}
    try:
        segmenter = VideoSegmenter(
            arguments.model, task=arguments.task, device=arguments.device, dtype=arguments.dtype
        )
    except LoadingError as error:
        raise UserError(f"--model {error}") from error
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return segmenter, {name: value for name, value in given.items() if value is not None}


def best_score(segmenter: VideoSegmenter, source: VideoSource, numbers: dict) -> float:
    """Of any object in the first frames, however small it is."""
    stream = segmenter.stream(**numbers | {"threshold": 0.0})
    try:
        for image, _ in zip(source, range(ASKED_AGAIN), strict=False):
            stream.push(image)
        stream.finish()
    except (OSError, ValueError):  # a damaged file: what was seen before counts
        pass
    return max((seen.score for seen in stream.seen.values()), default=0.0)


def _results(source: VideoSource, stream):
    """Frames with their results, which may come some frames later."""
    waiting = []
    for image in tqdm(source, desc="predicting", unit="frame", total=source.length):
        waiting.append(image)
        for result in stream.push(image):
            yield waiting.pop(0), result
    for result in stream.finish():
        yield waiting.pop(0), result
