"""Readers of COCO's two annotation formats: panoptic PNGs with a json, and instances as polygons or RLE."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from .annotations import decode_mask, instance_annotation, panoptic_annotation
from .class_forms import class_table
from .classes import ClassTable
from .readers import FileReader, PackedRecords, locate, read_panoptic_ids


class CocoPanoptic(FileReader):
    """COCO panoptic annotations (also ADE20K's, Cityscapes' and Mapillary's): an example per entry of `annotations`.

    Segments keep their ids of the PNG. See `Reader` for the example.

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
        data = _load(self.source, {"images": ("id", "file_name"), "annotations": ("image_id", "segments_info")})
        categories = data.get("categories") or []
        if classes is None and any(isinstance(entry, dict) and "isthing" not in entry for entry in categories):
            raise ValueError(f"{self.source}: categories without isthing; add it (1 or 0), or give classes=")
        self.classes = classes = _table(categories, self.source, declared=classes)
        images_by_id = _by_id(data["images"], self.source)
        if not data["annotations"]:
            raise ValueError(f"{self.source}: annotations is empty, there is nothing to read")
        _check_references(data["annotations"], images_by_id, self.source)
        _check_categories(
            (segment for entry in data["annotations"] for segment in entry["segments_info"]), classes, self.source
        )
        _check_once([entry["image_id"] for entry in data["annotations"]], self.source)
        entries = [(images_by_id[entry["image_id"]], entry) for entry in data["annotations"]]
        files = [image["file_name"] for image, _ in entries]
        names = locate(self.images, "images", files, self.source, not_below=self.segmentation)
        pngs = [entry.get("file_name") or os.path.splitext(image["file_name"])[0] + ".png" for image, entry in entries]
        pngs = locate(self.segmentation, "panoptic maps", pngs, self.source)
        self._records = PackedRecords(
            (
                image["id"],
                name,
                png,
                [_only(segment, ("id", "category_id", "iscrowd")) for segment in entry["segments_info"]],
            )
            for (image, entry), name, png in zip(entries, names, pngs, strict=True)
        )

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder."""
        return [record[1] for record in self._records]

    def annotation(self, index: int) -> dict:
        self._check_index(index)
        image_id, name, png, segments = self._records[index]
        path = self.segmentation / png
        found = panoptic_annotation(read_panoptic_ids(path), segments, self.classes, path)
        return {**found, "image_id": image_id, "file_name": name}

    def _image_path(self, index: int) -> Path:
        return self.images / self._records[index][1]


class CocoInstances(FileReader):
    """COCO instance annotations, which may overlap: an example per entry of `images`.

    Segments are numbered 1, 2, ... in an image; `annotation_id` and `bbox` (x, y, width, height of the original image)
    are those of the json, as is `area`. See `Reader` for the example.

    Args:
        images: folder of the images.
        annotations: the json: `images`, `annotations` (polygons, compressed or uncompressed RLE) and `categories`.
        classes: instead of the json's categories, as in `CocoPanoptic`; things unless they say otherwise.
        skip_empty: leave out images without an object that is no crowd, as the original does in training.

    Raises:
        FileNotFoundError: for images that are not there.
        ValueError: for an empty or inconsistent json.
    """

    task = "instance"

    def __init__(self, images: str | Path, annotations: str | Path, classes=None, skip_empty: bool = False):
        self.images, self.source = Path(images), Path(annotations)
        needed = {"images": ("id", "file_name", "height", "width"), "annotations": ("image_id", "category_id")}
        data = _load(self.source, needed)
        self.classes = _table(data.get("categories") or [], self.source, instances=True, declared=classes)
        images_by_id = _by_id(data["images"], self.source)
        _check_references(data["annotations"], images_by_id, self.source)
        _check_categories(data["annotations"], self.classes, self.source)
        boxes = [entry.get("id") for entry in data["annotations"] if not entry.get("segmentation")]
        if boxes:
            raise ValueError(
                f"{self.source}: {len(boxes)} annotations have no segmentation, such as the ids {boxes[:5]}; "
                "masks cannot be made from boxes, take these annotations out"
            )
        objects = {image: [] for image in images_by_id}
        fields = ("id", "category_id", "iscrowd", "area", "bbox", "segmentation")
        for entry in data["annotations"]:
            objects[entry["image_id"]].append(_only(entry, fields))
        kept = [
            image
            for image in data["images"]
            if not skip_empty or any(not entry.get("iscrowd") for entry in objects[image["id"]])
        ]
        if not kept:
            raise ValueError(
                f"{self.source}: no image{' with an object' if skip_empty else ''}, there is nothing to read"
            )
        names = locate(self.images, "images", [image["file_name"] for image in kept], self.source)
        self._records = PackedRecords(
            (image["id"], name, (image["height"], image["width"]), objects[image["id"]])
            for image, name in zip(kept, names, strict=True)
        )

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder."""
        return [record[1] for record in self._records]

    def annotation(self, index: int) -> dict:
        self._check_index(index)
        image_id, name, size, objects = self._records[index]
        masks = [
            decode_mask(entry["segmentation"], size, f"{self.source}, annotation {entry.get('id')}")
            for entry in objects
        ]
        found = instance_annotation(masks, objects, size, self.classes, self.images / name)
        return {**found, "image_id": image_id, "file_name": name}

    def _image_path(self, index: int) -> Path:
        return self.images / self._records[index][1]


def _load(path: Path, fields: Mapping[str, tuple[str, ...]]) -> dict:
    """A json of the lists that `fields` names, whose entries have the given fields."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a json file ({error})") from None
    for name, needed in fields.items():
        if not isinstance(data, dict) or not isinstance(data.get(name), list):
            raise ValueError(f"{path}: not a COCO json, which has the lists {', '.join(fields)}; there is no {name}")
        for position, entry in enumerate(data[name]):
            _check_entry(entry, needed, f"{path}: {name}[{position}]")
            for number, segment in enumerate(entry.get("segments_info") or ()):
                _check_entry(segment, ("id", "category_id"), f"{path}: {name}[{position}], segments_info[{number}]")
    return data


def _check_entry(entry, needed: tuple[str, ...], where: str):
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}; it must have the fields {', '.join(needed)}")
    missing = [field for field in needed if field not in entry]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}; add it")
    for field, value in entry.items():
        kind, rule = _FIELDS.get(field, (None, None))
        if kind is None or (value is None and field not in needed):
            continue
        number = isinstance(value, int | float) and (kind is not int or isinstance(value, int))
        if not isinstance(value, kind) or (number and not 0 <= value < math.inf):
            raise ValueError(f"{where} has {field}={value!r}; it must be {rule}")


_FIELDS = {  # the type of what is read, numbers of which are not negative
    "file_name": (str, "a path"),
    "height": (int, "a whole number of pixels"),
    "width": (int, "a whole number of pixels"),
    "area": (int | float, "a number of pixels"),
    "segments_info": (list, "a list of segments"),
    "iscrowd": (int, "0 or 1"),
}


def _check_once(image_ids: list, source: Path):
    if len(set(image_ids)) < len(image_ids):
        double = next(image for image, count in Counter(image_ids).items() if count > 1)
        raise ValueError(f"{source}: annotations has the image_id {double} twice; give every image one entry")


def _table(categories: list, source: Path, instances: bool = False, declared=None) -> ClassTable:
    """The declared classes, checked against the json's categories, or those."""
    if declared is not None:
        good = [entry for entry in categories if isinstance(entry, dict) and {"id", "name"} <= {*entry}]
        own, things = {entry["id"]: entry["name"] for entry in good}, [e["id"] for e in good if e.get("isthing")]
        return class_table(declared, instances, own, things, source)
    if not categories:
        raise ValueError(f"{source}: no categories; add them to the json, or give classes=")
    try:
        return ClassTable.from_categories(categories, True if instances else None)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _by_id(images: list, source: Path) -> dict:
    found = {image["id"]: image for image in images}
    if len(found) < len(images):
        raise ValueError(f"{source}: {len(images) - len(found)} image ids occur twice; give every image its own id")
    return found


def _check_references(annotations: list, images_by_id: Mapping, source: Path):
    unknown = sorted({str(entry["image_id"]) for entry in annotations if entry["image_id"] not in images_by_id})
    if unknown:
        shown = ", ".join(unknown[:5]) + (" ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{source}: annotations have the image_id {shown}, which images does not list; add the images or take the "
            "annotations out"
        )


def _check_categories(entries: Iterable[Mapping], classes: ClassTable, source: Path):
    unknown = {}
    for entry in entries:
        if not classes.has(entry["category_id"]):
            unknown.setdefault(entry["category_id"], entry.get("id"))
    if unknown:
        raise ValueError(
            f"{source}: category_id {sorted(unknown)} (for example in the annotation or segment with the id "
            f"{next(iter(unknown.values()))}) is not among the categories; add it there. {classes}"
        )


def _only(entry: Mapping, keys: tuple[str, ...]) -> dict:
    return {key: entry[key] for key in keys if key in entry}
