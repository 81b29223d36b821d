"""Reader of labelme's json files."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .bands import to_pixels
from .embedded import read_embedded
from .fields import FILE_NAME, FLAG, ID, LIST, MAPPING, NAME, PIXELS, TEXT, Rule, points, read_entry
from .images import to_rgb
from .object_files import FileContent, FoundObject, ObjectFiles, records_of_files
from .polygons import fill_polygons
from .text_files import read_json

NOT_CLASSES = ("__ignore__", "_background_")  # of labelme's own exports
_NEEDED_POINTS = {"polygon": 3, "oriented_rectangle": 4, "rectangle": 2, "circle": 2, "mask": 2}
logger = logging.getLogger(__name__)

_FILE = {
    "shapes": LIST._replace(text="a list of shapes"),
    "imagePath": FILE_NAME._replace(text="a path").optional(),
    "imageData": TEXT._replace(text="an image in base64").optional(),
    "imageHeight": PIXELS.optional(),
    "imageWidth": PIXELS.optional(),
}
_SHAPE = {
    "label": NAME,
    "points": Rule(points, "a list of points [x, y]"),
    "shape_type": NAME.optional(),
    "group_id": ID.optional(),
    "flags": MAPPING.optional(),
    "mask": TEXT.optional(),
}
_FLAGS = {"crowd": FLAG.optional()}


class LabelmeFiles(ObjectFiles):
    """A folder of labelme's json files, one per image, with their images.

    Shapes with one label and `group_id` are one object, and one with the flag "crowd" is a crowd. Read are polygons,
    rectangles, circles and masks; lines and points have no area and are left out with a warning. A pixel belongs to a
    shape if its centre lies inside; labelme's own exports count the outline in, up to a pixel more on the right and
    below. Where no file of an image is found, the one that the json itself holds (`imageData`) is read. See `Example`.

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
        super().__init__(records_of_files(folder, images, "json files", (".json",), read_file), classes, folder)

    def draw(self, outline, size, where):
        return np.logical_or.reduce([_mask(shape, size, f"{where}[{number}]") for number, shape in outline])

    def read_image(self, index: int) -> np.ndarray:
        if self.image_path(index):
            return super().read_image(index)
        return self._embedded(index, lambda image, where: to_pixels(image, where, self.channels))

    def image_size(self, index: int) -> tuple[int, int]:
        if self.image_path(index):
            return super().image_size(index)
        return self._embedded(index, lambda image, where: to_rgb(image, where).shape[:2])

    def _embedded(self, index: int, convert):
        source = self._records[index].source
        text = read_entry(read_json(source), {"imageData": _FILE["imageData"]}, str(source)).get("imageData", "")
        return read_embedded(text, f"{source}: imageData", convert)


def read_file(path: Path) -> FileContent | None:
    """What a json of labelme's says, checked; None for a json of something else.

    Raises:
        ValueError: names file, shape and field.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "shapes" not in content:
        return None
    found = read_entry(content, _FILE, str(path))
    size = found.get("imageHeight"), found.get("imageWidth")
    objects = _objects(found["shapes"], path)
    return FileContent(objects, None if None in size else size, found.get("imagePath"), "imageData" in found)


def _objects(shapes: Iterable, path: Path) -> list[FoundObject]:
    """Shapes of one group as one object, each shape with its number."""
    groups = {}
    for number, entry in enumerate(shapes):
        where = f"{path}: shapes[{number}]"
        shape = read_entry(entry, _SHAPE, where)
        flags = read_entry(shape.get("flags", {}), _FLAGS, f"{where}, flags,")
        kind = shape.setdefault("shape_type", "polygon")
        if shape["label"] in NOT_CLASSES:
            continue
        if kind not in _NEEDED_POINTS:
            logger.warning("%s is a %s, which has no area: left out", where, kind)
            continue
        if len(shape["points"]) < _NEEDED_POINTS[kind]:
            raise ValueError(
                f"{where}: a {kind} of {len(shape['points'])} points; it has {_NEEDED_POINTS[kind]} or more, correct "
                "or remove it"
            )
        key = shape["label"], bool(flags.get("crowd")), shape.get("group_id", f"shape {number}")
        outline = {name: shape[name] for name in ("shape_type", "points", "mask") if name in shape}
        groups.setdefault(key, []).append((number, outline))
    return [FoundObject(*key[:2], outline, "shapes") for key, outline in groups.items()]


def _mask(shape: dict, size: tuple[int, int], where: str) -> np.ndarray:
    kind, corners = shape["shape_type"], shape["points"]
    if kind == "circle":
        (x, y), (radius_x, radius_y) = corners[0], corners[1] - corners[0]
        row, column = np.ogrid[0.5 : size[0], 0.5 : size[1]]
        return (column - x) ** 2 + (row - y) ** 2 <= radius_x**2 + radius_y**2
    if kind == "mask":
        return _pasted(shape, size, where)
    if kind == "rectangle":
        (left, top), (right, bottom) = corners[:2]
        corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
    return fill_polygons([corners], size)


def _pasted(shape: dict, size: tuple[int, int], where: str) -> np.ndarray:
    """A mask that labelme keeps as the PNG of its box, of which both corners belong to it."""
    (left, top), (right, bottom) = shape["points"][:2].astype(int).tolist()
    H, W = size
    if not (0 <= top <= bottom < H and 0 <= left <= right < W):
        raise ValueError(
            f"{where}: a mask between {[left, top]} and {[right, bottom]} in an image of height and width {[H, W]}; "
            "they do not belong together, remove the shape"
        )
    place, mask = (bottom - top + 1, right - left + 1), np.zeros(size, dtype=bool)
    part = read_embedded(
        shape.get("mask", ""), f"{where}: its mask", lambda image, _: np.asarray(image.convert("L")) > 0, place
    )
    mask[top : bottom + 1, left : right + 1] = part
    return mask
