"""What all readers share: an index of examples, checking, and annotations that are packed for worker processes."""

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from .bands import check_bands, read_pixels
from .classes import ClassTable
from .errors import data_errors
from .example import Example, check_size
from .images import read_size

MOST_LISTED = 20  # of the examples that cannot be used


class Reader(Dataset):
    """A map-style data set of annotated images, an `Example` each.

    Attributes:
        classes: the `ClassTable`.
        task: `"panoptic"`, `"instance"` or `"semantic"`.
        left_out: images that are not among the examples because they have no object.
        channels: bands that images have, and that are read as they are; None for photos, which become RGB. May be set.
    """

    classes: ClassTable
    task: str
    left_out: int = 0
    channels: int | None = None
    reads_bands = True  # by which `read_bands_of` knows its own

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """An example; raises `errors.DataError` for a file or row that cannot be used."""
        raise NotImplementedError

    def check(self, progress: bool = True):
        """Read every example once.

        Raises:
            ValueError: lists what is wrong with which file, for the first 20 examples that cannot be used.
        """
        self._check_all(self.__getitem__, progress)

    def check_headers(self, progress: bool = True):
        """Before a long run: whether each image file can be opened and has its annotation's size, by headers alone.

        `check` finds more, such as truncated files, in the time of an epoch. Data that are not in files pass.

        Raises:
            ValueError: as `check`.
        """

    def _check_all(self, read: Callable[[int], object], progress: bool):
        bar = tqdm(range(len(self)), desc="checking", unit="image", disable=not progress)
        check_each(read, bar, f"of {len(self)} examples cannot be used:")

    def _check_index(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: there are {len(self)} examples, 0 to {len(self) - 1}")


class FileReader(Reader):
    """A reader of image files; subclasses give the annotation of an image and the image's place."""

    images: Path

    def annotation(self, index: int) -> Example:
        """An example without its `image`, for counting and evaluation: of the image file no pixel is read."""
        raise NotImplementedError

    def check_headers(self, progress: bool = True):
        self._check_all(self.check_header, progress)

    def image_path(self, index: int) -> Path | None:
        """The image's file; None for an image that is in a file with other things."""
        raise NotImplementedError

    def read_image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, or the bands of `channels`."""
        return read_pixels(self.image_path(index), self.channels)

    def image_size(self, index: int) -> tuple[int, int]:
        """(H, W) of the image file, by its header."""
        return read_size(self.image_path(index))

    def _annotated_size(self, index: int) -> tuple[int, int]:
        """(H, W) of the annotation, without reading it."""
        raise NotImplementedError

    def check_header(self, index: int):
        """Of one image file; raises ValueError or OSError for what cannot be used."""
        path = self.image_path(index)
        if path is not None:
            check_bands(path, self.channels)
        size, annotated = self.image_size(index), self._annotated_size(index)
        check_size(size, annotated, self._place(index))

    def _place(self, index: int) -> Path:
        """Of the image, for errors."""
        return self.image_path(index)

    @data_errors()
    def __getitem__(self, index: int) -> Example:
        self._check_index(index)
        image, annotation = self.read_image(index), self.annotation(index)
        check_size(image.shape[:2], annotation.size, self._place(index))
        return annotation.with_image(image)


def annotation(dataset, index: int) -> Example:
    """An example of any data set, without its image where the reader can do that."""
    return Example.of(dataset.annotation(index) if hasattr(dataset, "annotation") else dataset[index])


def read_bands_of(dataset, channels: int | None):
    """Let a reader give images of so many bands, None for RGB; what is no reader gives what it gives."""
    if getattr(dataset, "reads_bands", False):
        dataset.channels = channels


def check_headers(dataset, progress: bool = True):
    """`Reader.check_headers` of any data set; one that is no reader passes."""
    if hasattr(dataset, "check_headers"):
        dataset.check_headers(progress)


def check_each(read: Callable, entries: Iterable, text: str, bullet: str = "\n- "):
    """Read every entry once.

    Args:
        text: what follows, in the error, the number of those that cannot be read.
        bullet: before each of them.

    Raises:
        ValueError: lists what is wrong with the first 20.
    """
    problems = []
    for entry in entries:
        try:
            read(entry)
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
        raise ValueError(bullet.join([f"{len(problems)} {text}", *problems[:MOST_LISTED], *more]))


class PackedRecords(Sequence):
    """A list of plain objects in one buffer of bytes.

    Worker processes share the pages of an array; of a list of dicts each would make its own copy, because reading an
    object writes its reference count.
    """

    def __init__(self, records: Iterable):
        packed = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([0, *map(len, packed)])
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int):
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]].data)
