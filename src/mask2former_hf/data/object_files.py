"""What readers of objects from annotation tools share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .annotations import instance_annotation
from .class_forms import class_table
from .example import Example
from .images import IMAGE_SUFFIXES
from .paths import files_by_name
from .reader import FileReader, PackedRecords


class FoundObject(NamedTuple):
    """An object of an image.

    Args:
        label: name of its class.
        is_crowd: whether it is many objects that nobody told apart.
        outline: as the subclass draws it.
        where: its place in the file, for errors.
    """

    label: str
    is_crowd: bool
    outline: object
    where: str


class ObjectRecord(NamedTuple):
    """What a tool says of an image.

    Args:
        name: of the image, without extension.
        image: its file; None for one that the annotation file holds.
        size: (H, W) as annotated; None for a format that does not say it.
        objects: in their order.
        source: the annotation file.
    """

    name: str
    image: Path | None
    size: tuple[int, int] | None
    objects: list[FoundObject]
    source: Path


class ObjectFiles(FileReader):
    """A reader of objects with labels; a subclass collects the records, and draws the objects of one.

    Args:
        records: of all images.
        classes: any form of `class_forms.class_table`; None for the labels that occur, by the alphabet.
        source: for errors.

    Raises:
        ValueError: if nothing was found.
    """

    task = "instance"

    def __init__(self, records: list[ObjectRecord], classes, source: Path):
        if not records:
            raise ValueError(f"{source}: no annotated image; there is nothing to read")
        names = sorted({found.label for record in records for found in record.objects})
        if classes is None and not names:
            raise ValueError(f"{source}: no object has a label; give classes=")
        self.classes = class_table(names if classes is None else classes, instances=True)
        self._names = [f"{record.name}{record.image.suffix if record.image else '.png'}" for record in records]
        self._records = PackedRecords(records)

    def __len__(self) -> int:
        return len(self._records)

    def file_names(self) -> list[str]:
        """Of all images."""
        return list(self._names)

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        self.check_header(index)  # the annotated size is how much memory the masks take
        record, size = self._records[index], self._annotated_size(index)
        masks, entries = [], []
        for found in record.objects:
            masks.append(self.draw(found.outline, size, f"{record.source}: {found.where}"))
            entries.append({"category_id": found.label, "iscrowd": int(found.is_crowd)})
        names = {"image_id": record.name, "file_name": self._names[index]}
        return instance_annotation(masks, entries, size, self.classes, record.source, **names)

    def draw(self, outline, size: tuple[int, int], where: str) -> np.ndarray:
        """(H, W) bool of an object; raises ValueError with `where` for one that cannot be drawn."""
        raise NotImplementedError

    def image_path(self, index: int) -> Path | None:
        return self._records[index].image

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return self._records[index].size or self.image_size(index)

    def _place(self, index: int) -> Path:
        return self.image_path(index) or self._records[index].source


class FileContent(NamedTuple):
    """What an annotation file of one image says.

    Args:
        objects, size: as in `ObjectRecord`.
        image: path of the image, relative to the file's folder; None if the file does not say it.
        holds_image: whether the image is in the file, too.
    """

    objects: list[FoundObject]
    size: tuple[int, int] | None = None
    image: str | None = None
    holds_image: bool = False


def records_of_files(
    folder: Path,
    images: str | Path | None,
    kind: str,
    endings: tuple[str, ...],
    read: Callable[[Path], FileContent | None],
) -> list[ObjectRecord]:
    """A record for each annotation file of a folder, whose image has its path in `images`, or lies where the file
    says, or beside the file, or in it.

    Args:
        images: a folder; None for none.
        kind: of the files, for errors.
        read: None for a file of something else.

    Raises:
        FileNotFoundError: for images that are not there.
    """
    below = {} if images is None else files_by_name(Path(images), "images", IMAGE_SUFFIXES)
    records, missing = [], []
    for name, relative in files_by_name(folder, kind, endings).items():
        file = folder / relative
        content = read(file)
        if content is None:
            continue
        image = Path(images) / below[name] if name in below else _image_of(file, content)
        if image is None and not content.holds_image:
            missing.append(relative if content.image is None else f"{relative} ({content.image})")
            continue
        records.append(ObjectRecord(name, image, content.size, content.objects, file))
    if missing:
        raise FileNotFoundError(
            f"{folder}: the images of {len(missing)} of {len(records) + len(missing)} files are not there: "
            f"{', '.join(missing[:5])}; put them beside the files, or give their folder"
        )
    return records


def _image_of(file: Path, content: FileContent) -> Path | None:
    named = None if content.image is None else file.parent / content.image.replace("\\", "/")
    beside = (file.with_suffix(ending) for ending in IMAGE_SUFFIXES)
    return next((path for path in (named, *beside) if path is not None and path.is_file()), None)
