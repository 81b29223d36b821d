"""`mask2former-hf demo --video`: a model of clips learns generated moving scenes, is measured, and draws a video."""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
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
from ..training.clips import ClipCollator, video_model
from ..training.threads import fewer_threads
from .main import UserError

SIZE, FRAMES, RATE = 96, 16, 6  # pixels, of a video, and a second
SCENES = {"num_frames": FRAMES, "size": SIZE, "num_things": (2, 4), "radius": (0.14, 0.26)}
QUERIES = 12  # three times the things of a scene
SINGLE = 0.6  # of the steps, the first, learn single frames: as many scenes again as of clips of two
STRIP = 6  # frames of a picture
BY_OVERLAP = {"look": 0.0, "same_label": 0.0, "likeness": 2.0}  # of `Tracker`: no embedding counts


def run(arguments: argparse.Namespace, train: Callable, save: Callable) -> int:
    """`train` and `save` as the demo of images has them."""
    try:
        coco_tools()  # now, and not after minutes of training
    except ImportError as error:
        raise UserError(str(error)) from error
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    processor = Mask2FormerVideoProcessor(size={"shortest_edge": SIZE, "longest_edge": SIZE})
    images = new_model("tiny", MovingScenes.classes, "instance", num_queries=QUERIES)
    model = video_model(images).to(arguments.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"Training {millions:.1f} M parameters from scratch on clips of {SIZE}x{SIZE}, device {arguments.device}")
    with fewer_threads(model, SIZE, arguments.batch_size) as said:
        if said:
            print(said)
        start = time.perf_counter()
        done = train(model, batches(processor, arguments), arguments)
        trained = time.perf_counter() - start
        save(model, processor, arguments.output)
        figures = measure(model, processor, arguments, {"steps": done, "train_seconds": round(trained, 1)})
    write_json(arguments.output / "results.json", figures)
    print(
        f"{done} steps in {trained:.0f} s. Checkpoint: {arguments.output}; pictures: {arguments.output / 'pictures'}\n"
        f"Next: mask2former-hf predict VIDEO --model {arguments.output} --output predictions"
    )
    return 0


def batches(processor: Mask2FormerVideoProcessor, arguments) -> Iterator[dict]:
    """First single frames, then clips of two, of the same number of frames a batch; no scene comes twice.

    A model of clips that starts from images is the original's way. Objects keep their class also where they are not
    annotated in the last frame: that rule of the original would cost a sixth of these labels.
    """
    single = int(SINGLE * arguments.steps)
    collate = ClipCollator(processor, len(MovingScenes.classes.id2label))
    loaders = []
    for seed, steps, frames in ((0, single, 1), (1, arguments.steps - single, 2)):
        clips = max(1, arguments.batch_size // frames)
        scenes = MovingScenes(steps * clips, **SCENES, seed=2 * arguments.seed + seed)
        recipe = ClipRecipe(frames, FRAMES // 2, [SIZE], label_of="any")
        loaders.append(DataLoader(ClipDataset(scenes, recipe), clips, num_workers=1, collate_fn=collate))
    return chain(*loaders)


def measure(model, processor, arguments, figures: dict) -> dict:
    """Add the figures of held-out scenes, of clips and of frames linked by overlap; report, and draw some scenes."""
    held_out = MovingScenes(arguments.eval_images, **SCENES, seed=arguments.seed + HELD_OUT_SEED)
    segmenter = VideoSegmenter.of(model, processor)
    ways = {"clips": evaluate_videos(segmenter, held_out, progress=tqdm)}
    image_model = Mask2FormerForUniversalSegmentation(model.config).to(arguments.device)
    image_model.load_state_dict(model.state_dict())
    by_overlap = VideoSegmenter.of(
        image_model, Mask2FormerImageProcessor(size=dict(processor.size)), tracking=BY_OVERLAP
    )
    ways["frames linked by overlap"] = evaluate_videos(by_overlap, held_out, threshold=0.5, progress=tqdm)
    report(ways)
    draw(segmenter, held_out, arguments.output / "pictures", arguments.pictures)
    return figures | ways


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
