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

from .coco_json import FILE_NAME, ID, PIXELS, SEGMENTS, Rule, read_entry
from .images import IMAGE_SUFFIXES
from .object_files import ObjectFiles, ObjectRecord, image_beside, missing_images
from .paths import files_by_name
from .polygons import fill_polygons

NOT_CLASSES = ("__ignore__", "_background_")  # of labelme's own exports
_FARTHEST = 1e9  # pixels: what is larger is damaged
logger = logging.getLogger(__name__)


def _points(value) -> list[list[float]]:
    points = np.array(value, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not (np.abs(points) < _FARTHEST).all():
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


class LabelmeFiles(ObjectFiles):
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

    def __init__(self, annotations: str | Path, images: str | Path | None = None, classes=None):
        folder = Path(annotations)
        below = {} if images is None else files_by_name(Path(images), "images", IMAGE_SUFFIXES)
        records, missing = [], []
        for name, file in files_by_name(folder, "json files", (".json",)).items():
            content = read_file(folder / file)
            if content is None:  # classes.json and the like
                continue
            image = Path(images) / below[name] if name in below else _image_of(folder / file, content)
            if image is None:
                missing.append(f"{file} ({content.get('imagePath')})")
                continue
            size = content.get("imageHeight"), content.get("imageWidth")
            records.append(ObjectRecord(name, image, None if None in size else size, content["shapes"], folder / file))
        if missing:
            raise missing_images(folder, missing, len(records) + len(missing))
        super().__init__(records, labels_of(record.objects for record in records), classes, folder)

    def draw(self, objects, size, source):
        found = {}
        for number, shape in enumerate(objects):
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
        return [(*key[:2], mask) for key, mask in found.items()]


def _image_of(file: Path, content: dict) -> Path | None:
    named = file.parent / content.get("imagePath", "").replace("\\", "/")
    return named if named.is_file() else image_beside(file, IMAGE_SUFFIXES)


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


def labels_of(images: Iterable[list[dict]]) -> set[str]:
    """The labels of all shapes, without those that stand for no class."""
    return {shape["label"] for shapes in images for shape in shapes} - {*NOT_CLASSES}


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
