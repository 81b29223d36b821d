"""Reader of labelme's json files."""

import base64
import binascii
import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from .annotations import instance_annotation
from .class_forms import class_table
from .coco_json import FILE_NAME, ID, PIXELS, SEGMENTS, Rule, read_entry
from .example import Example
from .images import IMAGE_SUFFIXES, read_size
from .paths import files_by_name
from .polygons import fill_polygons
from .reader import FileReader, PackedRecords

NOT_CLASSES = ("__ignore__", "_background_")  # of labelme's own exports
logger = logging.getLogger(__name__)


def _points(value) -> list[list[float]]:
    points = np.array(value, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError
    return points.tolist()


def _mapping(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError
    return value


_TEXT = FILE_NAME._replace(text="a text")
_FILE = {
    "shapes": SEGMENTS._replace(text="a list of shapes"),
    "imagePath": _TEXT.optional(),
    "imageHeight": PIXELS.optional(),
    "imageWidth": PIXELS.optional(),
}
_SHAPE = {
    "label": _TEXT,
    "points": Rule(_points, "a list of points [x, y]"),
    "shape_type": _TEXT.optional(),
    "group_id": ID.optional(),
    "flags": Rule(_mapping, "a mapping").optional(),
    "mask": _TEXT.optional(),
}


class LabelmeFiles(FileReader):
    """A folder of labelme's json files, one per image, with their images.

    Shapes with one label and `group_id` are one object, and one with the flag "crowd" is a crowd. Read are polygons,
    rectangles, circles and masks; lines and points have no area and are left out with a warning. A pixel belongs to a
    shape if its centre lies inside; labelme's own exports count the outline in, up to a pixel more on the right and
    below. See `Example`.

    Args:
        annotations: folder of the json files, searched with its subfolders.
        images: folder of the images, with the same paths; None for where the files say, or beside them.
        classes: any form of `class_forms.class_table`; None for all labels, by the alphabet.

    Raises:
        FileNotFoundError: for images that are not there.
        ValueError: for an empty folder, and for what is wrong with a file.
    """

    task = "instance"

    def __init__(self, annotations: str | Path, images: str | Path | None = None, classes=None):
        self.annotations = Path(annotations)
        self.images = self.annotations if images is None else Path(images)
        files = files_by_name(self.annotations, "json files", (".json",))
        below = {} if images is None else files_by_name(self.images, "images", IMAGE_SUFFIXES)
        records, missing = [], []
        for name, file in files.items():
            content = read_file(self.annotations / file)
            if content is None:  # classes.json and the like
                continue
            path = self.images / below[name] if name in below else self._image_of(file, content)
            if path is None:
                missing.append(f"{file} ({content.get('imagePath')})")
            records.append((name, file, path, content))
        if not records:
            raise ValueError(f"{self.annotations}: no file of labelme's, a json with shapes")
        if missing:
            raise FileNotFoundError(
                f"{self.annotations}: the images of {len(missing)} of {len(records)} files are not there: "
                f"{', '.join(missing[:5])}; put them beside the files, or give their folder"
            )
        names = class_names(record[3] for record in records)
        if classes is None and not names:
            raise ValueError(f"{self.annotations}: no shape has a label; give classes=")
        self.classes = class_table(names if classes is None else classes, instances=True)
        self._names = [record[0] for record in records]
        self._records = PackedRecords(records)

    def _image_of(self, file: str, content: dict) -> Path | None:
        here = (self.annotations / file).parent
        named = [] if "imagePath" not in content else [here / content["imagePath"].replace("\\", "/")]
        beside = [(self.annotations / file).with_suffix(ending) for ending in IMAGE_SUFFIXES]
        return next((path for path in (*named, *beside) if path.is_file()), None)

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images, relative to the json files, with the extension of the image."""
        return [f"{name}{self.image_path(index).suffix}" for index, name in enumerate(self._names)]

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        name, file, path, content = self._records[index]
        source, size = self.annotations / file, self._annotated_size(index)
        self.check_header(index)  # the file's size is how much memory its masks take
        masks, entries = [], []
        for (label, is_crowd), mask in _objects(content["shapes"], size, source):
            masks.append(mask)
            entries.append({"category_id": label, "iscrowd": int(is_crowd)})
        names = {"image_id": name, "file_name": f"{name}{path.suffix}"}
        return instance_annotation(masks, entries, size, self.classes, source, **names)

    def image_path(self, index: int) -> Path:
        return self._records[index][2]

    def _annotated_size(self, index: int) -> tuple[int, int]:
        content = self._records[index][3]
        if "imageHeight" in content and "imageWidth" in content:
            return content["imageHeight"], content["imageWidth"]
        return read_size(self.image_path(index))


def read_file(path: Path) -> dict | None:
    """What a json of labelme's says, checked; None for a json of something else.

    Raises:
        ValueError: names file, shape and field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a json file ({error})") from None
    if not isinstance(content, dict) or "shapes" not in content:
        return None
    found = read_entry(content, _FILE, str(path))
    found["shapes"] = [
        read_entry(shape, _SHAPE, f"{path}: shapes[{number}]") for number, shape in enumerate(found["shapes"])
    ]
    return found


def class_names(contents: Iterable[dict]) -> list[str]:
    """The labels of all shapes, by the alphabet, without those that stand for no class."""
    return sorted({shape["label"] for content in contents for shape in content["shapes"]} - {*NOT_CLASSES})


def _objects(shapes: list[dict], size: tuple[int, int], source: Path):
    """((label, is crowd), (H, W) bool) of each object: its shapes together, in the order of the first ones."""
    found = {}
    for number, shape in enumerate(shapes):
        if shape["label"] in NOT_CLASSES:
            continue
        mask = _mask(shape, size, f"{source}: shapes[{number}]")
        if mask is None:
            kind = shape["shape_type"]
            logger.warning("%s: shapes[%s] is a %s, which has no area: left out", source, number, kind)
            continue
        is_crowd = bool(shape.get("flags", {}).get("crowd"))
        key = shape["label"], is_crowd, shape.get("group_id", f"shape {number}")
        found[key] = found[key] | mask if key in found else mask
    return [(key[:2], mask) for key, mask in found.items()]


def _mask(shape: dict, size: tuple[int, int], where: str) -> np.ndarray | None:
    kind, points = shape.get("shape_type", "polygon"), np.array(shape["points"])
    needed = {"polygon": 3, "oriented_rectangle": 4, "rectangle": 2, "circle": 2, "mask": 2}.get(kind)
    if needed is None:
        return None
    if len(points) < needed:
        raise ValueError(f"{where}: a {kind} of {len(points)} points; it has {needed} or more, correct or remove it")
    if kind == "circle":
        (x, y), (radius_x, radius_y) = points[0], points[1] - points[0]
        row, column = np.ogrid[0.5 : size[0], 0.5 : size[1]]
        return (column - x) ** 2 + (row - y) ** 2 <= radius_x**2 + radius_y**2
    if kind == "mask":
        return _pasted(shape, points, size, where)
    if kind == "rectangle":
        (left, top), (right, bottom) = points[:2]
        points = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return fill_polygons([points], size)


def _pasted(shape: dict, points: np.ndarray, size: tuple[int, int], where: str) -> np.ndarray:
    """A mask that labelme keeps as the PNG of its box, of which both corners belong to it."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
            part = np.asarray(image.convert("L")) > 0
    except (KeyError, binascii.Error, OSError) as error:
        raise ValueError(f"{where}: its mask is no PNG in base64 ({error}); remove the shape") from None
    (left, top), (right, bottom) = points[:2].astype(int)
    H, W = size
    fits = part.shape == (bottom - top + 1, right - left + 1) and 0 <= top <= bottom < H and 0 <= left <= right < W
    if not fits:
        raise ValueError(
            f"{where}: a mask of {part.shape} pixels between {points[0].tolist()} and {points[1].tolist()} in an "
            f"image of height and width {[H, W]}; they do not belong together, remove the shape"
        )
    mask = np.zeros(size, dtype=bool)
    mask[top : bottom + 1, left : right + 1] = part
    return mask


def recognise_labelme(folder: Path, files: dict[Path, list[str]], split_of) -> dict:
    """Settings for labelme's files in a folder: the splits that `split_of` sees in their paths, and all labels."""
    found, contents = {}, []
    for place in sorted(files, key=lambda place: len(place.parts)):
        names = [name for name in files[place] if name.endswith(".json")]
        split = split_of(*place.relative_to(folder).parts)
        if split is None or not names or not _is_labelme(place / names[0]) and not _is_labelme(place / names[-1]):
            continue
        if any(place.is_relative_to(taken) for taken in found.values()):
            continue
        found.setdefault(f"{split}_annotations", place)
        contents += [content for name in names if (content := read_file(place / name)) is not None]
    return {"data": "labelme", **found, "classes": class_names(contents)} if found else {}


def _is_labelme(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content
