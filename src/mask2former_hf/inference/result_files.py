"""A folder of results: overlays, and COCO's formats or those of other tools. NumPy and Pillow alone, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.formats.writers import TOOL_WRITERS, FormatWriter, ImageFile
from ..data.image_lists import Found
from ..data.json_files import write_json
from .segmentation import Segmentation

COCO = "coco"
OVERLAYS = "overlays"
RESULTS = (OVERLAYS, "panoptic", "semantic", "panoptic.json", "instances.json", "categories.json", *TOOL_WRITERS)
PNG_LEVEL = 1  # of zlib; 6, Pillow's own, takes an overlay of a photo three times as long and saves 5 % of its bytes


@dataclass(frozen=True)
class OutputSettings:
    """What is written for each image.

    Args:
        task: "panoptic", "instance" or "semantic".
        id2label: names of the classes.
        stuff_label_ids: classes that are stuff.
        formats: "coco" and names of `TOOL_WRITERS`.
        overlays: whether to draw each result on its image.
        tolerance: of polygons; see `data.polygons.polygons_of`.
        annotated_by: name of the model, for formats that say it.
        show_bands: of images of bands: those of the overlays' red, green and blue, or one.
    """

    task: str
    id2label: Mapping[int, str]
    stuff_label_ids: tuple[int, ...]
    formats: tuple[str, ...] = (COCO,)
    overlays: bool = True
    tolerance: float = 0.0
    annotated_by: str | None = None
    show_bands: tuple[int, ...] | None = None

    def check_packages(self):
        """Fail before the first image if a package that a format needs is missing."""
        for name in self.formats:
            if name != COCO:
                TOOL_WRITERS[name].check_packages()


class ResultFolder:
    """Results of images in files.

    Other processes may `write`, with a `ResultFolder` of their own, what one of them then collects and closes.

    Args:
        folder: to write into.
        settings: what to write.
        place: where the folder will be in the end; None where it is.

    Raises:
        ImportError: for formats whose package is missing.
    """

    def __init__(self, folder: Path, settings: OutputSettings, place: Path | None = None):
        self.folder, self.settings, self.place = Path(folder), settings, folder if place is None else place
        self.folder.mkdir(parents=True, exist_ok=True)
        if settings.overlays:
            (self.folder / OVERLAYS).mkdir(exist_ok=True)
        self.writers = [self._writer(name) for name in dict.fromkeys(settings.formats)]

    def _writer(self, name: str):
        if name == COCO:
            return COCO_WRITERS[self.settings.task](self.folder, self.settings)
        return ToolWriter(name, self.folder, self.place, self.settings)

    def write(self, found: Found, result: Segmentation, image) -> list:
        """Write the files of an image; returns what `collect` takes.

        Args:
            image: anything that `Segmentation.plot` takes; None where there are no overlays.
        """
        if self.settings.overlays:
            result.plot(image, self.settings.show_bands).save(self._overlay(found), compress_level=PNG_LEVEL)
        return [writer.write(found, result) for writer in self.writers]

    def remove(self, found: Found):
        """Take back the overlay of an image whose other files could not be written."""
        if self.settings.overlays:
            self._overlay(found).unlink(missing_ok=True)

    def _overlay(self, found: Found) -> Path:
        return self.folder / OVERLAYS / f"{found.stem}.png"

    def collect(self, parts: list):
        """Take what `write` returned, in the order of the images."""
        for writer, part in zip(self.writers, parts, strict=True):
            writer.collect(part)

    def close(self):
        """Write what belongs to all images together."""
        for writer in self.writers:
            writer.close()


class CocoWriter:
    """Results in COCO's form; see `FormatWriter` for what `write`, `collect` and `close` do."""

    folder: str | None = None

    def __init__(self, output: Path, settings: OutputSettings):
        self.output, self.settings = output, settings
        if self.folder:
            (output / self.folder).mkdir(exist_ok=True)

    def write(self, found: Found, result: Segmentation):
        raise NotImplementedError

    def collect(self, part):
        raise NotImplementedError

    def close(self):
        raise NotImplementedError

    def categories(self) -> list[dict]:
        stuff = self.settings.stuff_label_ids
        return [
            {"id": label, "name": name, "isthing": int(label not in stuff)}
            for label, name in self.settings.id2label.items()
        ]

    def save(self, picture: Image.Image, found: Found):
        picture.save(self.output / self.folder / f"{found.stem}.png")

    def write_json(self, name: str, content):
        write_json(self.output / name, content, indent=None)


class PanopticWriter(CocoWriter):
    """COCO panoptic: a PNG per image whose colour is the segment's id, and one json."""

    folder = "panoptic"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.images, self.annotations = [], []

    def write(self, found, result):
        picture, segments = result.to_coco_panoptic()
        self.save(picture, found)
        height, width = result.size
        entry = {"id": found.image_id, "file_name": found.name, "height": height, "width": width}
        name = f"{found.stem}.png"
        return entry, {"image_id": found.image_id, "file_name": name, "segments_info": segments}

    def collect(self, part):
        image, annotation = part
        self.images.append(image)
        self.annotations.append(annotation)

    def close(self):
        content = {"images": self.images, "annotations": self.annotations, "categories": self.categories()}
        self.write_json("panoptic.json", content)


class InstanceWriter(CocoWriter):
    """COCO results: a list of scored run-length encoded masks; `categories.json` names the labels."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.results = []

    def write(self, found, result):
        return [{**entry, "file_name": found.name} for entry in result.to_coco(found.image_id)]

    def collect(self, part):
        self.results += part

    def close(self):
        self.write_json("instances.json", self.results)
        self.write_json("categories.json", self.categories())


class SemanticWriter(CocoWriter):
    """A PNG of label ids per image; `categories.json` names them."""

    folder = "semantic"

    def write(self, found, result):
        labels = result.map.astype(np.uint8 if len(self.settings.id2label) <= 256 else np.uint16)
        self.save(Image.fromarray(labels), found)

    def collect(self, part):
        pass  # an image's file is all of it

    def close(self):
        self.write_json("categories.json", self.categories())


COCO_WRITERS = {"panoptic": PanopticWriter, "instance": InstanceWriter, "semantic": SemanticWriter}


class ToolWriter:
    """The format of another tool, in a folder of its name; see `FormatWriter`."""

    def __init__(self, name: str, output: Path, place: Path, settings: OutputSettings):
        self.writer: FormatWriter = TOOL_WRITERS[name](
            output / name,
            settings.id2label,
            settings.stuff_label_ids,
            tolerance=settings.tolerance,
            annotated_by=settings.annotated_by,
            place=place / name,
        )
        self.collect, self.close = self.writer.collect, self.writer.close

    def write(self, found: Found, result: Segmentation):
        image = ImageFile(found.path, found.name, found.stem, result.size, found.image_id, result.georeference)
        return self.writer.write(image, result.labelled_masks())
