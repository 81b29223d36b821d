"""Reader of YOLO segmentation, as Ultralytics documents it and annotation tools export it."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .annotations import instance_annotation
from .class_forms import class_table
from .example import Example
from .fields import FILE_NAME, read_entry
from .images import IMAGE_SUFFIXES, read_size
from .paths import files_by_name
from .polygons import fill_polygons
from .reader import FileReader
from .text_files import read_text

LIST_ENDING = ".txt"  # of a file that lists images
_LINE = {"path": FILE_NAME._replace(text="the path of an image")}


class YoloSegments(FileReader):
    """Images and a text for each: a line "class x y x y ..." per object, in parts of width and height.

    An image without a text, or with an empty one, has no object. A pixel belongs to an object if its centre lies
    inside an odd number of times, so that holes and parts that were joined by cuts are as they were. See `Example`.

    Args:
        images: their folder; or Ultralytics' list, a .txt with the path of an image per line, from its own folder.
        labels: folder of the texts, which are found by the images' paths; None for where Ultralytics looks, in the
            folder "labels" in place of the last "images" of an image's path, else beside the image.
        classes: `data.yaml`, or any form of `class_forms.class_table`; ids count from 0.

    Raises:
        FileNotFoundError: for a missing folder, images of the list that are not there, or texts without an image.
        ValueError: for an empty folder or list, and for `labels` beside a list.
    """

    task = "instance"

    def __init__(self, images: str | Path, labels: str | Path | None, classes):
        images = Path(images)
        self.classes = class_table(classes, instances=True)
        if images.suffix != LIST_ENDING:
            self.images, found = images, files_by_name(images, "images", IMAGE_SUFFIXES)
            self._texts = _texts_in(labels_of(images) if labels is None else Path(labels), images, found)
        elif labels is None:
            self.images, found = _listed(images)
            texts = [_text_of(self.images / file) for file in found.values()]
            self._texts = [text if text.is_file() else None for text in texts]
        else:
            raise ValueError(f"labels={labels}: texts of a list of images lie where Ultralytics looks; leave it out")
        self._names, self._image_files = list(found), list(found.values())

    def __len__(self) -> int:
        return len(self._names)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder, of a list to the one that all of them lie in."""
        return list(self._image_files)

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        size, text = read_size(self.image_path(index)), self._texts[index]
        objects = [] if text is None else read_objects(text)
        masks = [fill_polygons([points * size[::-1]], size) for _, points in objects]
        entries = [{"category_id": number} for number, _ in objects]
        names = {"image_id": self._names[index], "file_name": self._image_files[index]}
        return instance_annotation(masks, entries, size, self.classes, text or self.image_path(index), **names)

    def image_path(self, index: int) -> Path:
        return self.images / self._image_files[index]

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return read_size(self.image_path(index))  # coordinates are parts of it, whatever it is


def _texts_in(folder: Path, images: Path, found: Iterable[str]) -> list[Path | None]:
    """Of each image its text."""
    texts = files_by_name(folder, "labels", (".txt",))
    alone = [name for name in texts if name not in found and name not in ("classes", "labels")]
    if alone:
        raise FileNotFoundError(
            f"{len(alone)} of {len(texts)} texts in {folder} have no image in {images}, first "
            f"{texts[alone[0]]}; names must be equal up to the extension"
        )
    return [folder / texts[name] if name in texts else None for name in found]


def _listed(source: Path) -> tuple[Path, dict[str, str]]:
    """The folder in which all images of a list lie, and name -> file of each, relative to it."""
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such list of images")
    lines = [line.strip() for line in read_text(source).splitlines()]
    paths = []
    for number, line in enumerate(lines, start=1):
        if line:
            path = read_entry(
                {"path": line}, {"path": FILE_NAME._replace(text="the path of an image")}, f"{source}, line {number},"
            )
            paths.append(Path(os.path.abspath(source.parent / path["path"])))
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(paths)} images are not there, first {missing[0]}; paths count from the "
            "folder of the list"
        )
    if not paths:
        raise ValueError(f"{source}: no image is listed; there is nothing to read")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    files = [path.relative_to(folder).as_posix() for path in paths]
    found = {os.path.splitext(file)[0]: file for file in files}
    if len(found) < len(files):
        raise ValueError(f"{source}: {len(files) - len(found)} images are listed twice, or differ in the ending alone")
    return folder, found


def _text_of(image: Path) -> Path:
    return labels_of(image.parent) / f"{image.stem}.txt"


def read_objects(path: Path) -> list[tuple[int, np.ndarray]]:
    """(class, (N, 2) x and y in parts of width and height) of each line of a label file.

    Raises:
        ValueError: names file and line.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
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
                f"{where}: {len(words)} numbers that begin with {words[0][:20]}; a line is a class, a whole number, "
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
