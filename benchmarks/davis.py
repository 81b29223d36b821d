"""Real videos: the model of `demo --video`, trained further on a few clips of DAVIS, on frames that it has not seen.

    python benchmarks/davis.py CHECKPOINT --images JPEGImages/480p --maps Annotations/480p --held-out halves|videos

`halves` trains on the first half of every video and measures on the second: the model has seen this very object.
`videos` leaves one video out after the other: the model has seen neither object nor place. J is DAVIS' measure, the
intersection over union of masks, averaged over the frames of a video; of the track with the best score. Nothing is
chosen by what is measured: the model is the one after the last step.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mask2former_hf import DavisFolders, VideoSegmenter
from mask2former_hf.data.videos import Video, VideoReader
from mask2former_hf.evaluation.videos import evaluate_videos
from mask2former_hf.training.settings import TrainingSettings
from mask2former_hf.training.video_run import VideoRun


class Videos(VideoReader):
    """A list of videos, as a reader."""

    classes = DavisFolders.classes

    def __init__(self, videos: list[Video]):
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Video:
        return self.videos[index]


@dataclass(frozen=True)
class Trial:
    """What is trained on, and what is measured on."""

    name: str
    train: list[Video]
    test: list[Video]


def part(video: Video, first: int, end: int) -> Video:
    """Some frames of a video."""
    objects = tuple(replace(thing, segmentations=thing.segmentations[first:end]) for thing in video.objects)
    return replace(video, length=end - first, objects=objects, read=lambda frame: video.read(first + frame))


def trials(videos: VideoReader, held_out: str) -> Iterator[Trial]:
    videos = [videos[index] for index in range(len(videos))]
    if held_out == "halves":
        halves = [(part(v, 0, v.length // 2), part(v, v.length // 2, v.length)) for v in videos]
        yield Trial("second halves", *map(list, zip(*halves, strict=True)))
        return
    for left_out in videos:
        yield Trial(f"without {left_out.id}", [v for v in videos if v is not left_out], [left_out])


def truth(video: Video, frame: int) -> np.ndarray:
    return np.logical_or.reduce([thing.mask(frame, video.size) for thing in video.objects])


def mean_iou(masks: list[np.ndarray], video: Video) -> float:
    """J of a video: intersection over union, averaged over its frames; 1 where neither has a pixel."""
    ious = []
    for frame, mask in enumerate(masks):
        true = truth(video, frame)
        union = (mask | true).sum()
        ious.append((mask & true).sum() / union if union else 1.0)
    return float(np.mean(ious))


def best_track(segmenter: VideoSegmenter, video: Video) -> tuple[list[np.ndarray], float]:
    """Masks per frame of the object that is most surely there, and its score."""
    stream, results = segmenter.stream(threshold=0.0), []
    for frame in range(video.length):
        results += stream.push(video.frame(frame))
    results += stream.finish()
    best = max(stream.seen, key=lambda number: stream.seen[number].score)
    masks = []
    for result in results:
        found = [mask for segment, mask in zip(result.segments, result.masks, strict=True) if segment.id == best]
        masks.append(found[0] if found else np.zeros(video.size, bool))
    return masks, stream.seen[best].score


def run(trial: Trial, arguments) -> VideoSegmenter:
    """A model trained on a trial's videos."""
    settings = TrainingSettings(
        output=arguments.output / trial.name.replace(" ", "_"),
        model=str(arguments.checkpoint),
        data="davis",
        steps=arguments.steps,
        eval_every=arguments.steps,  # else the best of several by the measured videos would be taken
        batch_size=len(trial.train),
        short_sides=[arguments.side],
        test_size=[arguments.side],
        learning_rate=arguments.learning_rate,
        backbone_multiplier=1.0,
        log_every=50,
        cpu=True,
    )
    training = VideoRun(settings, Videos(trial.train), Videos(trial.test))
    training.train()
    return VideoSegmenter.of(training.trainer.model, training.processor)


def report(trial: Trial, segmenter: VideoSegmenter):
    figures = evaluate_videos(segmenter, Videos(trial.test), class_agnostic=True)
    print(f"{trial.name}: AP {figures['AP']:.3f}  AP50 {figures['AP50']:.3f}")
    for video in trial.test:
        masks, score = best_track(segmenter, video)
        line = f"  {video.id:14}J {mean_iou(masks, video):.3f}  score {score:.2f}"
        seen = next((other for other in trial.train if other.id == video.id), None)
        if seen is not None:
            still = [truth(seen, seen.length - 1)] * video.length
            line += f"  J of the last mask trained on, left where it is {mean_iou(still, video):.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of mask2former-hf demo --video")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--maps", type=Path, required=True)
    parser.add_argument("--held-out", choices=("halves", "videos"), default="halves")
    parser.add_argument("--output", type=Path, default=Path("davis"))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--side", type=int, default=120, help="shorter side of a frame in pixels (default: 120)")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for trial in trials(DavisFolders(arguments.images, arguments.maps), arguments.held_out):
        report(trial, run(trial, arguments))
