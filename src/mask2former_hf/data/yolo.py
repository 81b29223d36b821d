"""Reader of YOLO segmentation, as Ultralytics documents it and annotation tools export it."""

import math
from pathlib import Path

import numpy as np

from .annotations import instance_annotation
from .class_forms import class_table
from .example import Example
from .images import IMAGE_SUFFIXES, read_size
from .paths import files_by_name
from .polygons import fill_polygons
from .reader import FileReader


class YoloSegments(FileReader):
    """Images and a text for each: a line "class x y x y ..." per object, in parts of width and height.

    An image without a text, or with an empty one, has no object. A pixel belongs to an object if its centre lies
    inside an odd number of times, so that holes and parts that were joined by cuts are as they were. See `Example`.

    Args:
        images, labels: the folders; texts are found by the images' paths.
        classes: `data.yaml`, or any form of `class_forms.class_table`; ids count from 0.

    Raises:
        FileNotFoundError: for a missing folder, or texts without an image.
        ValueError: for an empty folder.
    """

    task = "instance"

    def __init__(self, images: str | Path, labels: str | Path, classes):
        self.images, self.labels = Path(images), Path(labels)
        self.classes = class_table(classes, instances=True)
        found = files_by_name(self.images, "images", IMAGE_SUFFIXES)
        texts = files_by_name(self.labels, "labels", (".txt",))
        alone = [name for name in texts if name not in found and name not in ("classes", "labels")]
        if alone:
            raise FileNotFoundError(
                f"{len(alone)} of {len(texts)} texts in {self.labels} have no image in {self.images}, first "
                f"{texts[alone[0]]}; names must be equal up to the extension"
            )
        self._names, self._image_files = list(found), list(found.values())
        self._texts = [texts.get(name) for name in found]

    def __len__(self) -> int:
        return len(self._names)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder."""
        return list(self._image_files)

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        size, text = read_size(self.image_path(index)), self._texts[index]
        path = self.labels / (text or self._image_files[index])
        objects = [] if text is None else read_objects(path)
        masks = [fill_polygons([points * size[::-1]], size) for _, points in objects]
        entries = [{"category_id": number} for number, _ in objects]
        names = {"image_id": self._names[index], "file_name": self._image_files[index]}
        return instance_annotation(masks, entries, size, self.classes, path, **names)

    def image_path(self, index: int) -> Path:
        return self.images / self._image_files[index]

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return read_size(self.image_path(index))  # coordinates are parts of it, whatever it is


def read_objects(path: Path) -> list[tuple[int, np.ndarray]]:
    """(class, (N, 2) x and y in parts of width and height) of each line of a label file.

    Raises:
        ValueError: names file and line.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        try:
            label, *points = (float(word) for word in words)
        except ValueError:
            raise ValueError(f"{where}: {line[:40]!r} are not numbers; a line is a class and x y x y ...") from None
        if len(points) == 4:
            raise ValueError(
                f"{where}: has a box, of which no mask can be made; export segmentation, whose lines are a class and "
                "x y x y ..."
            )
        if len(points) < 6 or len(points) % 2 or not (label >= 0 and label.is_integer()):
            raise ValueError(
                f"{where}: {len(words)} numbers that begin with {words[0]}; a line is a class, a whole number, "
                "and x y of at least three points"
            )
        outside = [value for value in points if not -0.01 <= value <= 1.01]  # the tolerance of Ultralytics
        if outside or not all(map(math.isfinite, points)):
            raise ValueError(f"{where}: has the coordinate {outside[0]}; they are parts of width and height, 0 to 1")
        found.append((int(label), np.array(points).reshape(-1, 2)))
    return found


def labels_of(images: Path) -> Path:
    """The folder of the texts by Ultralytics' rule: the last folder "images" of the path is called "labels"."""
    parts = images.parts
    if "images" not in parts:
        return images  # texts beside the images
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])
