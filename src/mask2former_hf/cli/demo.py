"""`mask2former-hf demo`: the whole path from data to pictures, without a download."""

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..data.example import Example
from ..data.json_files import write_json
from ..data.scenes import HELD_OUT_SEED, Scenes, ScenesDataset
from ..evaluation.evaluator import evaluate
from ..inference.drawing import draw_panoptic, side_by_side
from ..inference.loading import default_device
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..training.backbones import new_model
from ..training.collation import SegmentationCollator, on_device
from ..training.optimization import FROM_RANDOM, parameter_groups, polynomial_schedule
from ..training.threads import fewer_threads
from . import demo_video
from .device import add_device_argument
from .main import UserError

SIZE = 128


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for checkpoint and pictures")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 1200, with --video 2000)")
    parser.add_argument("--batch-size", type=int, help="images per step (default: 4), or frames (8)")
    parser.add_argument("--eval-images", type=int, help="held-out scenes (default: 100), or videos (40)")
    parser.add_argument("--video", action="store_true", help="videos: a model of clips, moving scenes, tracks")
    parser.add_argument("--pictures", type=int, default=8, help="pictures to draw (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=FROM_RANDOM["learning_rate"], help="(default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and their order (default: 0)")
    add_device_argument(parser)
    parser.set_defaults(device=default_device())


def run(arguments: argparse.Namespace) -> int:
    defaults = {"steps": 1200, "batch_size": 4, "eval_images": 100}
    if arguments.video:
        defaults = {"steps": 2000, "batch_size": 8, "eval_images": 40}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("steps", "batch_size", "eval_images"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    transformers_logging.disable_progress_bar()  # of writing one file
    if arguments.video:
        return demo_video.run(arguments, train, save)
    arguments.output.mkdir(parents=True, exist_ok=True)  # now, and not after minutes of training
    torch.manual_seed(arguments.seed)
    processor = Mask2FormerImageProcessor(size={"height": SIZE, "width": SIZE})
    model = new_model("tiny", Scenes.classes, "panoptic").to(arguments.device)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"Training {millions:.1f} M parameters from scratch on {SIZE}x{SIZE} scenes, device {arguments.device}")
    with fewer_threads(model, SIZE, arguments.batch_size) as said:
        if said:
            print(said)
        return _demo(model, processor, arguments)


def _demo(model, processor, arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    dataset = ScenesDataset(arguments.steps * arguments.batch_size, size=SIZE, seed=arguments.seed)
    loader = DataLoader(
        dataset,
        batch_size=arguments.batch_size,
        sampler=RandomSampler(dataset, generator=torch.Generator().manual_seed(arguments.seed)),
        collate_fn=SegmentationCollator(processor),
    )
    done = train(model, loader, arguments)
    trained = time.perf_counter() - start
    save(model, processor, arguments.output)
    held_out = ScenesDataset(arguments.eval_images, size=SIZE, seed=arguments.seed + HELD_OUT_SEED)
    pictures = PictureWriter(arguments.output / "pictures", arguments.pictures, model.config.id2label)
    summary = evaluate(model, processor, held_out, on_result=pictures)["pq"]
    report(summary)
    results = {"steps": done, "train_seconds": round(trained, 1), "panoptic_quality": summary}
    write_json(arguments.output / "results.json", results)
    print(
        f"{done} steps in {trained:.0f} s. Checkpoint: {arguments.output}; pictures: {arguments.output / 'pictures'}\n"
        f"Next: mask2former-hf predict IMAGE --model {arguments.output} --output predictions"
    )
    return 0


def train(model, batches: Iterable, arguments) -> int:
    """Train in place, a step per batch; returns the steps done, fewer than asked for after Ctrl-C.

    Not by `TrainingRun`: that needs Accelerate, which a bare installation lacks, and after Ctrl-C it ends, to be
    resumed, where the demo goes on with what was learned.
    """
    groups = parameter_groups(model, arguments.learning_rate, backbone_multiplier=FROM_RANDOM["backbone_multiplier"])
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    schedule = polynomial_schedule(optimizer, arguments.steps)
    model.train()
    done = 0
    try:
        with tqdm(batches, desc="training", unit="step", total=arguments.steps) as progress:
            for batch in progress:
                batch = on_device(batch, arguments.device)
                output = model(**batch)
                optimizer.zero_grad()
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), FROM_RANDOM["clip"])
                optimizer.step()
                schedule.step()
                done += 1
                if done % 10 == 0:
                    progress.set_postfix(loss=f"{output.loss.item():.1f}")
    except KeyboardInterrupt:
        print(f"Interrupted after {done} of {arguments.steps} steps; keeping what was learned")
    return done


def save(model, processor, folder: Path):
    """Write the checkpoint beside the target and move it there, so that no half-written one is ever found."""
    staging = folder / ".saving"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        for path in staging.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class PictureWriter:
    """Draws image, truth and prediction of the first examples side by side."""

    def __init__(self, folder: Path, count: int, id2label: dict[int, str]):
        self.folder, self.count, self.id2label, self.written = folder, count, id2label, 0
        if count:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, example: Example, result: dict):
        if self.written >= self.count:
            return
        truth = [{"id": s["id"], "label_id": s["category_id"]} for s in example.segments]
        panels = [
            draw_panoptic(example.image, example.segmentation * 0, [], self.id2label, void=False),
            draw_panoptic(example.image, example.segmentation, truth, self.id2label),
            result["panoptic"].plot(example.image),
        ]
        side_by_side(panels, ["image", "truth", "prediction"]).save(self.folder / f"{self.written:03d}.png")
        self.written += 1


def report(summary: dict):
    """Print panoptic quality for all classes, things, stuff, and each class."""
    print(f"{'':12}{'PQ':>7}{'SQ':>7}{'RQ':>7}")
    rows = [(name, summary[name]) for name in ("all", "things", "stuff")]
    rows += [(f"  {row['name']}", row) for row in summary["per_class"].values()]
    for name, row in rows:
        print(f"{name:12}{row['pq']:7.3f}{row['sq']:7.3f}{row['rq']:7.3f}")
