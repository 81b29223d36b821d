"""`mask2former-hf predict VIDEO`: an overlay with colours that stay, and YouTube-VIS' results."""

import argparse
import sys
from collections.abc import Callable
from functools import partial

from tqdm import tqdm

from ..inference.loading import LoadingError
from ..inference.video_files import VideoSource, load_av
from ..inference.video_prediction import best_score, predict_video
from ..inference.video_segmenter import VideoSegmenter
from .main import UserError


def run(arguments: argparse.Namespace, remove_earlier: Callable[[], None]) -> int:
    """`remove_earlier` takes away an earlier run's results, once nothing stands in the way of new ones."""
    given = {"refine": arguments.refine, "tta": arguments.tta, "tile": arguments.tile, "overlap": arguments.overlap}
    given |= {"tolerance": arguments.tolerance, "batch-size": arguments.batch_size > 1}
    given |= {"num-workers": arguments.num_workers is not None, "num-shards": arguments.num_shards is not None}
    given |= {"shard": arguments.shard is not None, "no-overlays": arguments.no_overlays}
    given |= {name: getattr(arguments, name) is not None for name in ("root", "split", "column", "effort")}
    given |= {"format": arguments.format != ["coco"], "level": arguments.level != 0}
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
    bar = partial(tqdm, desc="predicting", unit="frame", total=source.length)
    found = predict_video(segmenter, source, stream, arguments.output, progress=bar)
    if found.problem:
        print(f"mask2former-hf predict: {found.problem}", file=sys.stderr)
    print(f"{found.length} frames, {len(found.tracks)} objects: {arguments.output}")
    if found.length and not found.tracks and segmenter.task != "semantic":
        print(
            f"0 objects are above the threshold of {stream.rules.threshold:g}; best score of the first frames "
            f"{best_score(segmenter, source, **numbers):.2f}; try --threshold"
        )
    return 2 if found.problem else 0


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
