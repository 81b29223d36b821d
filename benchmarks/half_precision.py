"""What bfloat16 on a CPU does to results: metrics, and the share of pixels that keep their class.

    python benchmarks/half_precision.py scenes CHECKPOINT [--images 100]
    python benchmarks/half_precision.py camvid CHECKPOINT --data DATA
    python benchmarks/half_precision.py nuclei CHECKPOINT --data DATA

DATA holds `camvid` and `nuclei_dsb2018`. `weights` is a model in bfloat16, as `--dtype bfloat16` runs it, `autocast`
one of float32 weights in autocast, as `evaluate --bf16` does. Metrics in percent. "same" is the share of pixels with
the class of float32: of an instance result the class of the best instance there, or none.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from common import Record, machine

from mask2former_hf.data.folders import InstanceMaps, LabelMaps
from mask2former_hf.data.scenes import HELD_OUT_SEED, ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate, forward_in, headline
from mask2former_hf.inference.loading import load_model, load_processor
from mask2former_hf.inference.segmenter import Segmenter

VARIANTS = {"float32": (torch.float32, None), "weights": (torch.bfloat16, None), "autocast": (None, torch.bfloat16)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=("scenes", "camvid", "nuclei"))
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=100, help="images at most (default: 100)")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    dataset = read(arguments.set, arguments.data, arguments.images)
    processor = load_processor(arguments.checkpoint)
    full = load_model(arguments.checkpoint, dtype=torch.float32)
    record, expected = Record(arguments.json), None
    print(f"{arguments.set}, {len(dataset)} images, {machine()}")
    for name, (dtype, autocast) in VARIANTS.items():
        model = full if dtype is None else copy.deepcopy(full).to(dtype)
        figures = headline(evaluate(model, processor, dataset, batch_size=1, progress=False, autocast=autocast))
        with forward_in(autocast, model, torch.device("cpu")):
            maps = class_maps(Segmenter.of(model, processor), dataset)
        expected = expected or maps
        same = sum((a == b).sum() for a, b in zip(maps, expected, strict=True)) / sum(a.size for a in maps)
        record.add({"set": arguments.set, "images": len(dataset), "variant": name, "same": float(same), **figures})
        shown = "".join(f"{key:>10}{100 * value:7.2f}" for key, value in figures.items())
        print(f"{name:9}{shown}      same{100 * same:7.2f}", flush=True)


def read(name: str, data: Path | None, images: int):
    if name == "scenes":
        return ScenesDataset(images, size=128, seed=HELD_OUT_SEED)
    if name == "camvid":
        folder = data / "camvid"
        dataset = LabelMaps(folder / "images" / "val", folder / "labels" / "val", folder / "classes.json")
    else:
        folder = data / "nuclei_dsb2018"
        dataset = InstanceMaps(folder / "images" / "val", folder / "instance_labels" / "val", ["nucleus"])
    return torch.utils.data.Subset(dataset, range(min(images, len(dataset))))


def class_maps(segmenter: Segmenter, dataset) -> list[np.ndarray]:
    """Of each image the class of each pixel, -1 for none."""
    maps = []
    for number in range(len(dataset)):
        example = dataset[number]
        result = segmenter(example["image"] if isinstance(example, dict) else example.image)
        classes = np.full(result.size, -1)
        for segment, mask in reversed(list(zip(result.segments, result.masks, strict=True))):
            classes[mask] = segment.label_id
        maps.append(classes)
    return maps


if __name__ == "__main__":
    main()
