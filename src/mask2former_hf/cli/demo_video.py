"""`mask2former-hf demo --video`: a model of clips learns generated moving scenes, is measured, and draws a video."""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .. import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, Mask2FormerVideoProcessor
from ..data.clips import ClipDataset, ClipRecipe
from ..data.json_files import write_json
from ..data.moving_scenes import MovingScenes
from ..data.rle import coco_tools
from ..data.scenes import HELD_OUT_SEED
from ..data.videos import Video
from ..evaluation.videos import evaluate_videos
from ..inference.drawing import draw_tracks, side_by_side
from ..inference.segmentation import Segmentation, instance_result
from ..inference.video_files import VideoWriter
from ..inference.video_segmenter import VideoSegmenter, with_ids
from ..training.backbones import new_model
from ..training.clips import train_clips, video_model
from ..training.optimization import FROM_RANDOM
from .main import UserError

SIZE, FRAMES, RATE = 96, 16, 6  # pixels, of a video, and a second
STRIP = 6  # frames of a picture
BY_OVERLAP = {"look": 0.0, "same_label": 0.0, "likeness": 2.0}  # of `Tracker`: no embedding counts


def run(arguments: argparse.Namespace, save) -> int:
    try:
        coco_tools()  # now, and not after minutes of training
    except ImportError as error:
        raise UserError(str(error)) from error
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    size = {"shortest_edge": SIZE, "longest_edge": SIZE}
    processor = Mask2FormerVideoProcessor(size=size)
    model = video_model(new_model("tiny", MovingScenes.classes, "instance")).to(arguments.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"Training {millions:.1f} M parameters from scratch on clips of {SIZE}x{SIZE}, device {arguments.device}")
    clips = ClipDataset(MovingScenes(2000, FRAMES, SIZE, seed=arguments.seed), ClipRecipe(2, FRAMES // 2, [SIZE]))
    start = time.perf_counter()
    with tqdm(total=arguments.steps, desc="training", unit="step") as bar:

        def on_step(step, loss):
            bar.update()
            bar.set_postfix(loss=f"{loss:.1f}", refresh=False)

        options = FROM_RANDOM | {"learning_rate": arguments.learning_rate, "seed": arguments.seed, "on_step": on_step}
        done = train_clips(model, clips, processor, steps=arguments.steps, batch_size=arguments.batch_size, **options)
    trained = time.perf_counter() - start
    if done < arguments.steps:
        print(f"Interrupted after {done} of {arguments.steps} steps; keeping what was learned")
    save(model, processor, arguments.output)
    held_out = MovingScenes(arguments.eval_images, FRAMES, SIZE, seed=arguments.seed + HELD_OUT_SEED)
    segmenter = VideoSegmenter.of(model, processor)
    figures = {"clips": evaluate_videos(segmenter, held_out, progress=tqdm)}
    image_model = Mask2FormerForUniversalSegmentation(model.config).to(arguments.device)
    image_model.load_state_dict(model.state_dict())
    by_overlap = VideoSegmenter.of(image_model, Mask2FormerImageProcessor(size=size), tracking=BY_OVERLAP)
    figures["frames linked by overlap"] = evaluate_videos(by_overlap, held_out, threshold=0.5, progress=tqdm)
    report(figures)
    write_json(arguments.output / "results.json", {"steps": done, "train_seconds": round(trained, 1)} | figures)
    draw(segmenter, held_out, arguments.output / "pictures", arguments.pictures)
    print(
        f"{done} steps in {trained:.0f} s. Checkpoint: {arguments.output}; pictures: {arguments.output / 'pictures'}\n"
        f"Next: mask2former-hf predict VIDEO --model {arguments.output} --output predictions"
    )
    return 0


def report(figures: dict):
    """Track AP, identity switches and the share of objects found, of each way to segment."""
    print(f"{'':26}{'AP':>7}{'AP50':>7}{'switches':>10}{'found':>7}")
    for name, row in figures.items():
        print(f"{name:26}{row['AP']:7.3f}{row['AP50']:7.3f}{row['switches']:10d}{row['found']:7.3f}")


def draw(segmenter: VideoSegmenter, videos: MovingScenes, folder: Path, count: int):
    """A strip of frames for some videos, truth above prediction, and the first of them as an mp4 if PyAV is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(min(count, len(videos))):
        video = videos[number]
        frames = [video.frame(t) for t in range(video.length)]
        results = list(segmenter(frames))
        shown = [draw_tracks(image, result) for image, result in zip(frames, results, strict=True)]
        truth = [draw_tracks(image, true_result(video, t)) for t, image in enumerate(frames)]
        chosen = np.linspace(0, len(frames) - 1, STRIP).round().astype(int).tolist()
        rows = [
            side_by_side([pictures[t] for t in chosen], [f"{title}, frame {t}" for t in chosen])
            for title, pictures in (("truth", truth), ("prediction", shown))
        ]
        sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        for place, row in enumerate(rows):
            sheet.paste(row, (0, place * row.height))
        sheet.save(folder / f"{number:03d}.png")
        if number == 0:
            try:
                writer = VideoWriter(folder / "000.mp4", RATE)
            except ImportError as error:
                print(f"No mp4: {error}")
                continue
            with writer:
                for left, right in zip(truth, shown, strict=True):
                    writer.add(np.asarray(side_by_side([left, right], ["truth", "prediction"])))


def true_result(video: Video, frame: int) -> Segmentation:
    """The annotation of a frame as a result, to be drawn alike."""
    things = [thing for thing in video.objects if thing.segmentations[frame] is not None]
    masks = (
        np.stack([thing.mask(frame, video.size) for thing in things]) if things else np.zeros((0, *video.size), bool)
    )
    labels, names = [thing.label for thing in things], MovingScenes.classes.id2label
    result = instance_result(masks, [1.0] * len(things), labels, names)
    return with_ids(result, [thing.id for thing in things])
