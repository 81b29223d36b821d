"""`mask2former-hf predict`: images in, overlays and results in COCO's formats or those of other tools out.

Videos are predict_video.py's.
"""

import argparse
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.errors import DataError, data_errors
from ..data.formats.writers import TOOL_WRITERS, ImageFile
from ..data.images import ARRAY_SUFFIX, IMAGE_SUFFIXES
from ..data.json_files import write_json
from ..data.pictures import shown_bands
from ..data.windows import ImageWindows
from ..inference.exported import is_exported
from ..inference.known_labels import stuff_of
from ..inference.rules import METHODS, Rules
from ..inference.segmentation import Segmentation
from ..inference.segmenter import Segmenter
from ..inference.video_files import is_video
from ..model.result_defaults import TASKS
from .main import UserError, in_flags
from .tiling import add_tile_arguments, overlap_of

COCO = "coco"
RESULTS = ("overlays", "panoptic", "semantic", "panoptic.json", "instances.json", "categories.json", *TOOL_WRITERS)
ASKED_AGAIN = 10  # images of which the best score is looked for if no segment was above the threshold


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image files or folders of images; or one video file, or webcam:0",
    )
    parser.add_argument("--video", action="store_true", help="the folder is one video, its images are the frames")
    parser.add_argument("--model", required=True, help="checkpoint folder, Hub id, or folder of an export")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace the results that are in --output")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=(COCO, *TOOL_WRITERS),
        default=[COCO],
        help="formats of the results (default: coco), each in a folder of its name; docs/formats.md describes them",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="PIXELS",
        help="simplify polygons by less than so many pixels (default: 0, exact; 0.5 has a third of the points)",
    )
    parser.add_argument("--task", help=f"{', '.join(TASKS)} (default: what the checkpoint is for)")
    parser.add_argument("--threshold", type=float, help="lowest score (default: panoptic mostly 0.8, instance 0.5)")
    parser.add_argument(
        "--stuff", type=int, nargs="*", metavar="LABEL", help="labels that are stuff (default: by checkpoint)"
    )
    parser.add_argument(
        "--refine", choices=METHODS, help="a threshold per mask (otsu), or a dense CRF over the image (crf)"
    )
    add_tile_arguments(parser)
    parser.add_argument(
        "--show-bands",
        nargs="+",
        type=int,
        metavar="BAND",
        help="of images of bands: three for red, green and blue of the overlays, or one (default: the first)",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="tiles per forward pass (default: %(default)s)")
    parser.add_argument("--tta", action="store_true", help="average over six sizes and their mirror images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if it is there, cpu for an export)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.task not in (None, *TASKS):
        raise UserError(f"--task {arguments.task}: must be one of {', '.join(TASKS)}")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise UserError(f"--threshold {arguments.threshold}: must be between 0 and 1")
    if not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance {arguments.tolerance}: must be 0 (exact) or more pixels")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
    overlap_of(arguments.tile, arguments.overlap)
    if arguments.video or any(is_video(path) for path in arguments.images):
        if len(arguments.images) > 1:
            raise UserError(f"{len(arguments.images)} inputs, of which one is a video: give one video at a time")
        from . import predict_video

        present = check_output(arguments, arguments.images, predict_video.RESULTS, "video.mp4")
        return predict_video.run(arguments, partial(remove, present))
    images, problems = find_images(arguments.images)
    if not images:
        raise UserError("; ".join(problems))
    present = check_output(arguments, [found.path for found in images], RESULTS, "overlays")
    segmenter, rules = _segmenter(arguments)
    show = bands_to_show(arguments.show_bands, segmenter.channels)
    remove(present)
    writer = Results(arguments, rules, show)
    try:
        for image_id, found in enumerate(tqdm(images, desc="predicting", unit="image"), start=1):
            try:
                with data_errors():
                    image = segmenter.open(found.path)
                result = segmenter.segment_windows(image, rules, arguments.batch_size, progress=True)
            except DataError as error:  # windows of a file are read with the tiles
                problems.append(str(error))
                continue
            writer.add(image_id, found, image, result)
    finally:  # also after Ctrl-C: what was predicted is kept
        writer.close()
    for problem in problems:
        print(f"mask2former-hf predict: {problem}", file=sys.stderr)
    _report(arguments, writer, segmenter, images, problems)
    return 2 if problems else 0


def _segmenter(arguments) -> tuple[Segmenter, Rules]:
    options = {name: getattr(arguments, name) for name in ("task", "refine", "tta", "tile")}
    try:
        options["overlap"] = overlap_of(arguments.tile, arguments.overlap)
        if is_exported(arguments.model):
            segmenter = Segmenter(arguments.model, device=arguments.device, **options)
            segmenter.model.check_batch(arguments.batch_size)
        else:
            try:
                from .loading import load  # imports torch, which an export does without
            except ModuleNotFoundError as error:
                raise UserError(
                    f"--model {arguments.model}: is no export, and checkpoints need torch ({error})"
                ) from error

            segmenter = Segmenter.of(*load(arguments.model, arguments.device), **options)
    except (ImportError, ValueError) as error:
        text = f"--refine {arguments.refine}: {error}" if arguments.refine else in_flags(str(error), ["batch_size"])
        raise UserError(text) from error
    config, processor = segmenter.model.config, segmenter.processor
    unknown = [label for label in arguments.stuff or () if not 0 <= label < config.num_labels]
    if unknown:
        raise UserError(f"--stuff {unknown}: the checkpoint has labels 0 to {config.num_labels - 1}")
    try:
        rules = segmenter.rules(threshold=arguments.threshold, stuff_label_ids=arguments.stuff)
    except ValueError as error:
        raise UserError(in_flags(str(error), ["threshold"])) from error
    if rules.task == "panoptic" and arguments.stuff is None and stuff_of(config, processor) is None:
        print(
            "The checkpoint does not say which labels are stuff; none is fused (--stuff names them)", file=sys.stderr
        )
    return segmenter, rules


def bands_to_show(given: list[int] | None, channels: int | None) -> Sequence[int] | None:
    """What --show-bands says, or the first bands; None for photos.

    Raises:
        UserError: for bands that the images do not have, and for photos.
    """
    if given is not None and channels is None:
        raise UserError(f"--show-bands {' '.join(map(str, given))}: the checkpoint is for photos; leave it out")
    try:
        return None if channels is None else shown_bands(channels, given)
    except ValueError as error:
        raise UserError(in_flags(str(error), ["show_bands"])) from error


def _report(arguments, writer: "Results", segmenter: Segmenter, images: list["Found"], problems: list[str]):
    total = writer.count + len(problems)
    print(f"{writer.count} of {total} images, {writer.segments} segments: {arguments.output}")
    if writer.count and not writer.segments:
        best = 0.0
        for found in images[:ASKED_AGAIN]:
            try:
                image = segmenter.open(found.path)
            except (OSError, ValueError):
                continue
            result = segmenter(image, threshold=0.0, overlap_threshold=0.0, stuff_label_ids=arguments.stuff)
            best = max([best, *(segment.score for segment in result.segments)])
        print(
            f"0 segments are above the threshold of {writer.rules.threshold:g}; best score {best:.2f}; try --threshold"
        )


class Found(NamedTuple):
    """An image file."""

    path: Path
    name: str  # in results, with its extension; with its folder where two have the same name
    stem: str  # of the files that belong to it, unique


def find_images(paths: list[Path]) -> tuple[list[Found], list[str]]:
    """Files and the images of folders; and a line per path that does not exist."""
    files, problems = [], []
    for path in paths:
        if path.is_dir():
            found = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
            pictures = {child.stem for child in found if child.suffix.lower() != ARRAY_SUFFIX}
            found = [child for child in found if child.suffix.lower() != ARRAY_SUFFIX or child.stem not in pictures]
            if not found:
                problems.append(f"{path}: the folder has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            problems.append(f"{path}: no such file")
    files = list(dict.fromkeys(files))
    counts, used, found = Counter(path.name for path in files), set(), []
    for path in files:
        stem, number = path.stem, 1
        while stem in used:
            number += 1
            stem = f"{path.stem}_{number}"
        used.add(stem)
        found.append(Found(path, path.name if counts[path.name] == 1 else path.as_posix(), stem))
    return found, problems


def check_output(arguments, inputs: list[Path], results: tuple[str, ...], always: str) -> list[Path]:
    """The results of an earlier run, which are to be removed before the first new one is written.

    Args:
        inputs: what is to be read.
        results: names of what a run may write.
        always: what every run writes: without it the others are not a run's.

    Raises:
        UserError: unless they may be overwritten, are those of a run, and none of them is an input.
    """
    output = arguments.output
    present = [name for name in results if (output / name).exists()]
    if present and not arguments.overwrite:
        raise UserError(
            f"--output {output}: has results of another run ({', '.join(present)}); name another folder, or add "
            "--overwrite to replace them"
        )
    if present and always not in present:
        raise UserError(
            f"--output {output}: {', '.join(present)} there are not of an earlier run, which would have left "
            f"{always}; name another folder"
        )
    paths = [output / name for name in present]
    removed = {path.resolve() for path in paths}
    for path in inputs:
        if removed & {path.resolve(), *path.resolve().parents}:
            raise UserError(f"--output {output}: --overwrite would remove {path}, which is to be read; name another")
    return paths


def remove(paths: list[Path]):
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Results:
    """Overlays, and the results in every format that was asked for."""

    def __init__(self, arguments: argparse.Namespace, rules: Rules, show_bands: Sequence[int] | None = None):
        self.output, self.rules, self.count, self.segments = arguments.output, rules, 0, 0
        self.show_bands = show_bands
        formats = dict.fromkeys(arguments.format)
        try:
            (self.output / "overlays").mkdir(parents=True, exist_ok=True)
            self.writers = [
                WRITERS[rules.task](self.output, rules) if name == COCO else ToolWriter(name, arguments, rules)
                for name in formats
            ]
        except OSError as error:
            raise UserError(f"--output {self.output}: cannot be created ({error.strerror})") from error
        except ImportError as error:
            raise UserError(f"--format {' '.join(formats)}: {error}") from error

    def add(self, image_id: int, found: Found, image: ImageWindows, result: Segmentation):
        for writer in self.writers:
            writer.write(image_id, found, result)
        result.plot(image, self.show_bands).save(self.output / "overlays" / f"{found.stem}.png")
        self.count += 1
        self.segments += len(result.segments)

    def close(self):
        for writer in self.writers:
            writer.close()


class Writer:
    """Collects results; `close` writes what belongs to all images together."""

    folder: str | None = None

    def __init__(self, output: Path, rules: Rules):
        self.output, self.rules = output, rules
        if self.folder:
            (output / self.folder).mkdir(exist_ok=True)

    def write(self, image_id: int, found: Found, result: Segmentation):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError

    def categories(self) -> list[dict]:
        return [
            {"id": label, "name": name, "isthing": int(label not in self.rules.stuff_label_ids)}
            for label, name in self.rules.id2label.items()
        ]

    def write_json(self, name: str, content):
        write_json(self.output / name, content, indent=None)


class ToolWriter(Writer):
    """The format of another tool, in a folder of its name."""

    def __init__(self, name: str, arguments: argparse.Namespace, rules: Rules):
        super().__init__(arguments.output, rules)
        self.writer = TOOL_WRITERS[name](
            self.output / name,
            rules.id2label,
            rules.stuff_label_ids,
            tolerance=arguments.tolerance,
            annotated_by=Path(arguments.model).name if Path(arguments.model).exists() else arguments.model,
        )

    def write(self, image_id, found, result):
        image = ImageFile(found.path, found.name, found.stem, result.size, image_id, result.georeference)
        self.writer.add(image, result.labelled_masks())

    def close(self):
        self.writer.close()


class PanopticWriter(Writer):
    """COCO panoptic: a PNG per image whose colour is the segment's id, and one json."""

    folder = "panoptic"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.images, self.annotations = [], []

    def write(self, image_id, found, result):
        picture, segments = result.to_coco_panoptic()
        picture.save(self.output / self.folder / f"{found.stem}.png")
        height, width = result.size
        self.images.append({"id": image_id, "file_name": found.name, "height": height, "width": width})
        self.annotations.append({"image_id": image_id, "file_name": f"{found.stem}.png", "segments_info": segments})

    def close(self):
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories()}
        self.write_json("panoptic.json", content)


class InstanceWriter(Writer):
    """COCO results: a list of scored run-length encoded masks; `categories.json` names the labels."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.results = []

    def write(self, image_id, found, result):
        self.results += [{**entry, "file_name": found.name} for entry in result.to_coco(image_id)]

    def close(self):
        self.write_json("instances.json", self.results)
        self.write_json("categories.json", self.categories())


class SemanticWriter(Writer):
    """A PNG of label ids per image; `categories.json` names them."""

    folder = "semantic"

    def write(self, image_id, found, result):
        labels = result.map.astype(np.uint8 if len(self.rules.id2label) <= 256 else np.uint16)
        Image.fromarray(labels).save(self.output / self.folder / f"{found.stem}.png")

    def close(self):
        self.write_json("categories.json", self.categories())


WRITERS = {"panoptic": PanopticWriter, "instance": InstanceWriter, "semantic": SemanticWriter}
