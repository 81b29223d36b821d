"""What readers of objects from annotation tools share."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .annotations import instance_annotation
from .class_forms import class_table
from .example import Example
from .images import read_size
from .reader import FileReader, PackedRecords


class ObjectRecord(NamedTuple):
    """What a tool says of an image.

    Args:
        name: of the image, without extension.
        image: its file.
        size: (H, W) as annotated; None for a format that does not say it.
        objects: as the subclass draws them.
        source: the annotation file.
    """

    name: str
    image: Path
    size: tuple[int, int] | None
    objects: list
    source: Path


class ObjectFiles(FileReader):
    """A reader of objects with labels; a subclass collects the records, and draws the objects of one.

    Args:
        records: of all images.
        labels: all labels that occur.
        classes: any form of `class_forms.class_table`; None for the labels, by the alphabet.
        source: for errors.

    Raises:
        ValueError: if nothing was found.
    """

    task = "instance"

    def __init__(self, records: list[ObjectRecord], labels: Iterable[str], classes, source: Path):
        if not records:
            raise ValueError(f"{source}: no annotated image; there is nothing to read")
        names = sorted(set(labels))
        if classes is None and not names:
            raise ValueError(f"{source}: no object has a label; give classes=")
        self.classes = class_table(names if classes is None else classes, instances=True)
        self._names = [f"{record.name}{record.image.suffix}" for record in records]
        self._records = PackedRecords(records)

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images."""
        return list(self._names)

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        self.check_header(index)  # the annotated size is how much memory the masks take
        record = self._records[index]
        size = self._annotated_size(index)
        masks, entries = [], []
        for label, is_crowd, mask in self.draw(record.objects, size, record.source):
            masks.append(mask)
            entries.append({"category_id": label, "iscrowd": int(is_crowd)})
        names = {"image_id": record.name, "file_name": self._names[index]}
        return instance_annotation(masks, entries, size, self.classes, record.source, **names)

    def draw(self, objects: list, size: tuple[int, int], source: Path) -> Iterable[tuple[str, bool, np.ndarray]]:
        """(label, is a crowd, (H, W) bool) of each object."""
        raise NotImplementedError

    def image_path(self, index: int) -> Path:
        return self._records[index].image

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return self._records[index].size or read_size(self.image_path(index))


def image_beside(file: Path, endings: Iterable[str]) -> Path | None:
    """The image with the name of an annotation file, in its folder."""
    return next((path for ending in endings if (path := file.with_suffix(ending)).is_file()), None)


def missing_images(folder: Path, missing: list[str], total: int) -> FileNotFoundError:
    """The error for annotation files whose images are not there."""
    return FileNotFoundError(
        f"{folder}: the images of {len(missing)} of {total} files are not there: {', '.join(missing[:5])}; put them "
        "beside the files, or give their folder"
    )
