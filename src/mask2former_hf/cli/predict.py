"""`mask2former-hf predict`: images in, overlays and results in COCO's formats out."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.images import read_image
from ..inference.drawing import draw_instances, draw_panoptic, draw_semantic
from ..inference.results import METHODS, check_refinement, segment_image
from ..model.configuration_mask2former import TASKS
from ..model.postprocessing import masks_to_coco_rle
from .files import write_json
from .loading import load
from .main import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files or folders of images")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--task", help=f"{', '.join(TASKS)} (default: what the checkpoint says, else panoptic)")
    parser.add_argument("--threshold", type=float, help="lowest score (default: panoptic 0.8, instance 0.5)")
    parser.add_argument(
        "--stuff", type=int, nargs="*", metavar="LABEL", help="labels that are stuff (default: by checkpoint)"
    )
    parser.add_argument(
        "--refine", choices=METHODS, help="a threshold per mask (otsu), or a dense CRF over the image (crf)"
    )
    parser.add_argument("--tta", action="store_true", help="average over six sizes and their mirror images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(arguments: argparse.Namespace) -> int:
    if arguments.task not in (None, *TASKS):
        raise UserError(f"--task {arguments.task}: must be one of {', '.join(TASKS)}")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold}: must be between 0 and 1")
    images, problems = find_images(arguments.images)
    if not images:
        raise UserError("; ".join(problems))
    model, processor = load(arguments.model, arguments.device)
    task = arguments.task or model.config.task or "panoptic"
    try:
        check_refinement(task, arguments.refine)
    except (ImportError, ValueError) as error:
        raise UserError(f"--refine {arguments.refine}: {error}") from error
    stuff = model.config.stuff_label_ids if arguments.stuff is None else arguments.stuff
    unknown = [label for label in stuff or () if label not in model.config.id2label]
    if unknown:
        raise UserError(f"--stuff {unknown}: the checkpoint has labels 0 to {model.config.num_labels - 1}")
    if task == "panoptic" and stuff is None:
        print(
            "The checkpoint does not say which labels are stuff; none is fused (--stuff names them)", file=sys.stderr
        )
    thing_threshold = {"panoptic": 0.8, "instance": 0.5, "semantic": 0.0}[task]
    threshold = thing_threshold if arguments.threshold is None else arguments.threshold
    options = {
        "threshold": threshold,
        "stuff_label_ids": set(stuff or ()),
        "resize_masks_first": model.config.task != "semantic",
    }
    writer = WRITERS[task](arguments.output, model.config, options["stuff_label_ids"])
    try:
        for image_id, (path, name) in enumerate(tqdm(images, desc="predicting", unit="image"), start=1):
            try:
                image = read_image(path)
            except (OSError, ValueError) as error:
                problems.append(str(error))
                continue
            result = segment_image(
                model, processor, image, task, arguments.refine, arguments.tta, progress=True, **options
            )
            writer.add(image_id, name, image, result)
    finally:  # also after Ctrl-C: what was predicted is kept
        writer.close()
    for problem in problems:
        print(f"mask2former-hf predict: {problem}", file=sys.stderr)
    print(f"{writer.count} of {writer.count + len(problems)} images: {arguments.output}")
    return 2 if problems else 0


def find_images(paths: list[Path]) -> tuple[list[tuple[Path, str]], list[str]]:
    """Files and the images of folders, each with a unique output name; and a line per path that does not exist."""
    files, problems = [], []
    for path in paths:
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.suffix.lower() in SUFFIXES)
            if not found:
                problems.append(f"{path}: the folder has no images ({', '.join(sorted(SUFFIXES))})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            problems.append(f"{path}: no such file")
    named, used = [], set()
    for path in files:
        name, number = path.stem, 1
        while name in used:
            number += 1
            name = f"{path.stem}_{number}"
        used.add(name)
        named.append((path, name))
    return named, problems


class Writer:
    """Collects results; `close` writes what belongs to all images together."""

    folder: str | None = None

    def __init__(self, output: Path, config, stuff: set[int]):
        self.output, self.config, self.stuff, self.count = output, config, stuff, 0
        try:
            (output / "overlays").mkdir(parents=True, exist_ok=True)
            if self.folder:
                (output / self.folder).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be created ({error.strerror})") from error

    def categories(self) -> list[dict]:
        return [
            {"id": label, "name": name, "isthing": int(label not in self.stuff)}
            for label, name in self.config.id2label.items()
        ]

    def write_json(self, name: str, content):
        write_json(self.output / name, content, indent=None)


class PanopticWriter(Writer):
    """COCO panoptic: a PNG per image whose colour is the segment's id, R + 256 G + 65536 B, and one json."""

    folder = "panoptic"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.images, self.annotations = [], []

    def add(self, image_id, name, image, result):
        ids = result["segmentation"].cpu().numpy()
        segments = []
        for segment in result["segments_info"]:
            rows, columns = np.nonzero(ids == segment["id"])
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            score = round(segment["score"], 6)
            label = segment["label_id"]
            segments.append(
                {"id": segment["id"], "category_id": label, "area": len(rows), "bbox": box, "score": score}
            )
        colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(self.output / self.folder / f"{name}.png")
        overlay = draw_panoptic(image, ids, result["segments_info"], self.config.id2label)
        overlay.save(self.output / "overlays" / f"{name}.png")
        self.images.append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        self.annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
        self.count += 1

    def close(self):
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories()}
        self.write_json("panoptic.json", content)


class InstanceWriter(Writer):
    """COCO results: a list of scored run-length encoded masks; `categories.json` names the labels."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.results = []

    def add(self, image_id, name, image, result):
        masks, labels, scores, boxes = (result[key] for key in ("masks", "labels", "scores", "boxes"))
        for rle, label, score, (left, top, right, bottom) in zip(
            masks_to_coco_rle(masks), labels.tolist(), scores.tolist(), boxes.tolist(), strict=True
        ):
            box = [left, top, right - left, bottom - top]
            entry = {"image_id": image_id, "category_id": label, "segmentation": rle, "score": score, "bbox": box}
            self.results.append(entry | {"file_name": name})
        overlay = draw_instances(image, masks.cpu().numpy(), labels.tolist(), scores.tolist(), self.config.id2label)
        overlay.save(self.output / "overlays" / f"{name}.png")
        self.count += 1

    def close(self):
        self.write_json("instances.json", self.results)
        self.write_json("categories.json", self.categories())


class SemanticWriter(Writer):
    """A PNG of label ids per image; `categories.json` names them."""

    folder = "semantic"

    def add(self, image_id, name, image, result):
        labels = result.cpu().numpy().astype(np.uint8 if self.config.num_labels <= 256 else np.uint16)
        Image.fromarray(labels).save(self.output / self.folder / f"{name}.png")
        draw_semantic(image, labels, self.config.id2label).save(self.output / "overlays" / f"{name}.png")
        self.count += 1

    def close(self):
        self.write_json("categories.json", self.categories())


WRITERS = {"panoptic": PanopticWriter, "instance": InstanceWriter, "semantic": SemanticWriter}
