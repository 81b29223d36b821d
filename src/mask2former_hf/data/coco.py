"""Readers of COCO's two annotation formats: panoptic PNGs with a json, and instances as polygons or RLE."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .annotations import decode_mask, instance_annotation, panoptic_annotation
from .class_forms import class_table
from .coco_json import (
    AREA,
    BOX,
    IS_CROWD,
    MASK,
    PNG_ID,
    SEGMENTS,
    categories_table,
    load_coco,
    same_id,
    say_if_mixed,
)
from .example import Example
from .fields import FILE_NAME, ID, PIXELS, read_entry
from .images import read_panoptic_ids, read_size
from .paths import locate
from .reader import FileReader, PackedRecords

_SEGMENT = {"id": PNG_ID, "category_id": ID, "iscrowd": IS_CROWD.optional()}
_OBJECT = {
    "id": ID.optional(),
    "iscrowd": IS_CROWD.optional(),
    "area": AREA.optional(),
    "bbox": BOX.optional(),
    "segmentation": MASK.optional(),
}
logger = logging.getLogger(__name__)


class CocoPanoptic(FileReader):
    """COCO panoptic annotations (also ADE20K's, Cityscapes' and Mapillary's): an example per entry of `annotations`.

    Segments keep their ids of the PNG. See `Example`.

    Args:
        images: folder of the images.
        annotations: the json, with `images`, `annotations` and `categories`.
        segmentation: folder of the PNGs with id = red + 256 green + 65536 blue.
        classes: instead of the json's categories, for example those of the training data: a `ClassTable` or any form
            of `class_forms.class_table`, which must not contradict the json's.

    Raises:
        FileNotFoundError: for images or PNGs that are not there.
        ValueError: for an empty or inconsistent json.
    """

    task = "panoptic"

    def __init__(self, images: str | Path, annotations: str | Path, segmentation: str | Path, classes=None):
        self.images, self.segmentation, self.source = Path(images), Path(segmentation), Path(annotations)
        data = load_coco(
            self.source,
            {
                "images": {"id": ID, "file_name": FILE_NAME},
                "annotations": {"image_id": ID, "segments_info": SEGMENTS, "file_name": FILE_NAME.optional()},
            },
        )
        if not data["annotations"]:
            raise ValueError(f"{self.source}: annotations is empty, there is nothing to read")
        categories = [category for category in data["categories"] if isinstance(category, dict)]
        if classes is None and any(category.get("isthing") is None for category in categories):
            raise ValueError(f"{self.source}: categories without isthing; add it (1 or 0), or give classes=")
        for position, entry in enumerate(data["annotations"]):
            where = f"{self.source}: annotations[{position}], segments_info"
            entry["segments_info"] = [
                read_entry(segment, _SEGMENT, f"{where}[{number}]")
                for number, segment in enumerate(entry["segments_info"])
            ]
        segments = [segment for entry in data["annotations"] for segment in entry["segments_info"]]
        images_by_id = _by_id(data["images"], self.source)
        _check_references(data["annotations"], images_by_id, self.source)
        self.classes = _classes(classes, data, segments, self.source)
        _check_once([entry["image_id"] for entry in data["annotations"]], self.source)
        entries = [(images_by_id[entry["image_id"]], entry) for entry in data["annotations"]]
        files = [image["file_name"] for image, _ in entries]
        names = locate(self.images, "images", files, self.source, not_below=self.segmentation)
        pngs = [entry.get("file_name") or os.path.splitext(image["file_name"])[0] + ".png" for image, entry in entries]
        pngs = locate(self.segmentation, "panoptic maps", pngs, self.source)
        self._records = PackedRecords(
            (image["id"], name, png, entry["segments_info"])
            for (image, entry), name, png in zip(entries, names, pngs, strict=True)
        )

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder."""
        return [record[1] for record in self._records]

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        image_id, name, png, segments = self._records[index]
        path = self.segmentation / png
        ids, names = read_panoptic_ids(path), {"image_id": image_id, "file_name": name}
        return panoptic_annotation(ids, segments, self.classes, path, **names)

    def image_path(self, index: int) -> Path:
        return self.images / self._records[index][1]

    def map_path(self, index: int) -> Path:
        """The panoptic PNG."""
        return self.segmentation / self._records[index][2]

    def segment_ids(self, index: int) -> set[int]:
        """The ids that the json lists for an image."""
        return {segment["id"] for segment in self._records[index][3]}

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return read_size(self.map_path(index), upright=False)


class CocoInstances(FileReader):
    """COCO instance annotations, which may overlap: an example per entry of `images`.

    Segments are numbered 1, 2, ... in an image; `annotation_id` and `bbox` (x, y, width, height of the original image)
    are those of the json, as is `area`. See `Example`.

    Args:
        images: folder of the images.
        annotations: the json: `images`, `annotations` (polygons, compressed or uncompressed RLE) and `categories`.
        classes: instead of the json's categories, as in `CocoPanoptic`; things unless they say otherwise.
        skip_empty: leave out images without an object that is no crowd, as the original does in training.
        strict: refuse annotations without a segmentation, such as bare boxes, that are otherwise left out with a
            warning.

    Raises:
        FileNotFoundError: for images that are not there.
        ValueError: for an empty or inconsistent json.
    """

    task = "instance"

    def __init__(
        self,
        images: str | Path,
        annotations: str | Path,
        classes=None,
        skip_empty: bool = False,
        strict: bool = False,
    ):
        self.images, self.source = Path(images), Path(annotations)
        data = load_coco(
            self.source,
            {
                "images": {"id": ID, "file_name": FILE_NAME, "height": PIXELS, "width": PIXELS},
                "annotations": {"image_id": ID, "category_id": ID, **_OBJECT},
            },
        )
        annotations = self._with_masks(data["annotations"], strict)
        images_by_id = _by_id(data["images"], self.source)
        _check_references(annotations, images_by_id, self.source)
        self.classes = _classes(classes, data, annotations, self.source, isthing=True)
        objects = {image: [] for image in images_by_id}
        for entry in annotations:
            objects[entry.pop("image_id")].append(entry)
        kept = [
            number
            for number in images_by_id
            if not skip_empty or any(not entry.get("iscrowd") for entry in objects[number])
        ]
        if not kept:
            crowds = f": all {len(annotations)} annotations are crowds (iscrowd is 1)" if annotations else ""
            raise ValueError(
                f"{self.source}: no image{' with an object' if skip_empty else ''}, there is nothing to read{crowds}; "
                "a json for training lists images, and objects that are no crowds"
            )
        self.left_out = len(images_by_id) - len(kept)
        images = [images_by_id[number] for number in kept]
        names = locate(self.images, "images", [image["file_name"] for image in images], self.source)
        self._records = PackedRecords(
            (image["id"], name, (image["height"], image["width"]), objects[number])
            for number, image, name in zip(kept, images, names, strict=True)
        )

    def _with_masks(self, annotations: list[dict], strict: bool) -> list[dict]:
        kept = [entry for entry in annotations if "segmentation" in entry]
        boxes = [entry.get("id") for entry in annotations if "segmentation" not in entry]
        if boxes and (strict or not kept):
            raise ValueError(
                f"{self.source}: {len(boxes)} annotations have no segmentation, such as the ids {boxes[:5]}; masks "
                "cannot be made from boxes, take these annotations out"
            )
        if boxes:
            logger.warning(
                "%s: %s of %s annotations have no segmentation, such as the ids %s: they are left out (strict=True "
                "refuses them)",
                self.source,
                len(boxes),
                len(annotations),
                boxes[:5],
            )
        return kept

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder."""
        return [record[1] for record in self._records]

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        self.check_header(index)  # the json's size is how much memory its masks take
        image_id, name, size, objects = self._records[index]
        masks = [
            decode_mask(entry["segmentation"], size, f"{self.source}, annotation {entry.get('id')}")
            for entry in objects
        ]
        names = {"image_id": image_id, "file_name": name}
        return instance_annotation(masks, objects, size, self.classes, self.images / name, **names)

    def image_path(self, index: int) -> Path:
        return self.images / self._records[index][1]

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return self._records[index][2]


def _check_once(image_ids: list, source: Path):
    if len(set(image_ids)) < len(image_ids):
        double = next(image for image, count in Counter(image_ids).items() if count > 1)
        raise ValueError(f"{source}: annotations has the image_id {double} twice; give every image one entry")


def _by_id(images: list, source: Path) -> dict:
    """What ids are compared by -> image."""
    found = {same_id(image["id"]): image for image in images}
    if len(found) < len(images):
        raise ValueError(f"{source}: {len(images) - len(found)} image ids occur twice; give every image its own id")
    return found


def _check_references(annotations: list, images_by_id: Mapping, source: Path):
    """Give each annotation's `image_id` the form in which ids are compared, and refuse those of no image."""
    images = [image["id"] for image in images_by_id.values()]
    say_if_mixed(source, "image ids", images, [entry["image_id"] for entry in annotations])
    for entry in annotations:
        entry["image_id"] = same_id(entry["image_id"])
    unknown = sorted({str(entry["image_id"]) for entry in annotations if entry["image_id"] not in images_by_id})
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{source}: annotations have the image_id {shown}, which images does not list; add the images or take the "
            "annotations out"
        )


def _classes(given, data: dict, entries: list[dict], source: Path, isthing: bool | None = None):
    """The class table, and the entries' `category_id` in the form in which ids are compared.

    Raises:
        ValueError: for a category_id that is not among the classes.
    """
    listed = [category.get("id") for category in data["categories"] if isinstance(category, dict)]
    known = [number for number in listed if isinstance(number, int | str)]
    say_if_mixed(source, "category ids", known, [entry["category_id"] for entry in entries])
    for entry in entries:
        entry["category_id"] = same_id(entry["category_id"])
    used = {entry["category_id"] for entry in entries}
    if given is None:
        classes = categories_table(data["categories"], used, source, isthing)
    else:
        own = {c["id"]: c["name"] for c in data["categories"] if isinstance(c, dict) and {"id", "name"} <= {*c}}
        things = [c["id"] for c in data["categories"] if isinstance(c, dict) and c.get("isthing") and "id" in c]
        classes = class_table(given, bool(isthing), own, things, source)
    unknown = {number for number in used if not classes.has(number)}
    if unknown:
        example = next(entry.get("id") for entry in entries if entry["category_id"] in unknown)
        raise ValueError(
            f"{source}: category_id {sorted(unknown, key=str)} (for example in the annotation or segment with the id "
            f"{example}) is not among the categories; add it there. {classes}"
        )
    return classes
