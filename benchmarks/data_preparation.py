"""Where the time of preparing training data goes: reading, every step of the augmentation, collation; of one thread.

    python benchmarks/data_preparation.py --data coco_panoptic [--images 32] [--crop 1024] [--repeats 3]

DATA has COCO's panoptic photos, maps and json (`train/`, `panoptic_train/`, `annotations/panoptic_train.json`).
Milliseconds of processor time per image, median of the repeats, for the augmentations of the original's recipes: of
COCO panoptic and instances (large-scale jitter), and semantic (resize, crop, colours), on the same photos.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from common import machine

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.augmentation import augmentation_for
from mask2former_hf.data.coco import CocoPanoptic
from mask2former_hf.data.images import read_image
from mask2former_hf.model.result_defaults import TASKS
from mask2former_hf.training.collation import SegmentationCollator, example_targets

BATCH = 2


class Clock:
    """Seconds by name."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def __call__(self, name: str, function, *values):
        start = time.thread_time()
        result = function(*values)
        self.seconds[name] += time.thread_time() - start
        return result


def prepare(reader: CocoPanoptic, pipeline, images: int, crop: int) -> dict[str, float]:
    """Milliseconds per image of every stage."""
    clock, rng = Clock(), np.random.default_rng(0)
    collate = SegmentationCollator(Mask2FormerImageProcessor(), resize=False)
    for first in range(0, images, BATCH):
        batch = []
        for index in range(first, first + BATCH):
            example = clock("read image and map", lambda index: reader[index], index % len(reader))
            clock("(of it the photo)", read_image, reader.image_path(index % len(reader)))
            for step in pipeline.steps:
                example = clock(type(step).__name__, step, example, rng)
            batch.append(example)
        clock("collate", collate, batch)
        for example in batch:
            clock("(of it the targets)", example_targets, example, example.size, (crop, crop))
    return {name: 1000 * seconds / images for name, seconds in clock.seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--crop", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.data
    reader = CocoPanoptic(folder / "train", folder / "annotations" / "panoptic_train.json", folder / "panoptic_train")
    print(f"{machine()}; {arguments.images} images, crop {arguments.crop}, ms per image")
    for name in TASKS:
        pipeline = augmentation_for(name, arguments.crop)
        runs = [prepare(reader, pipeline, arguments.images, arguments.crop) for _ in range(arguments.repeats)]
        figures = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
        whole = sum(value for stage, value in figures.items() if not stage.startswith("("))
        print(f"\n{name}: {whole:.1f}")
        for stage, value in figures.items():
            print(f"  {stage:24}{value:8.1f}")


if __name__ == "__main__":
    main()
