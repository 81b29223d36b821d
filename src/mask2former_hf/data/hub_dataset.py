"""Readers of `datasets`: a `Dataset` by index, an `IterableDataset` as a stream that is split across processes."""

import io
import os
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .annotations import (
    decode_mask,
    instance_annotation,
    label_lookup,
    panoptic_annotation,
    semantic_annotation,
)
from .bands import to_pixels
from .class_forms import class_table
from .classes import ClassTable
from .coco_json import AREA, BOX, IS_CROWD, PNG_ID
from .errors import data_errors
from .example import Example, check_size
from .fields import ID, read_entry
from .images import open_image, to_map, to_panoptic_ids
from .reader import Reader

CATEGORY_KEYS = ("category_id", "category", "label")
MASK_KEYS = ("segmentation", "mask", "bitmask")
SEGMENT_FIELDS = {"id": PNG_ID, "category_id": ID, "iscrowd": IS_CROWD.optional()}
OBJECT_FIELDS = {
    "category_id": ID,
    "iscrowd": IS_CROWD.optional(),
    "area": AREA.optional(),
    "bbox": BOX.optional(),
    "id": ID.optional(),
}


class _Rows:
    """How a row becomes an example; the columns mean the same for both readers below."""

    channels: int | None = None  # of `Reader`

    def __init__(self, dataset, classes, image, label, segments_info, objects, image_id, folder):
        if (label is None) == (objects is None) or (segments_info is not None and label is None):
            raise ValueError(
                f"label={label!r}, segments_info={segments_info!r}, objects={objects!r}: give label for semantic "
                "data, label and segments_info for panoptic data, or objects for instance data"
            )
        self.task = "instance" if objects is not None else "panoptic" if segments_info is not None else "semantic"
        self.classes = class_table(classes, instances=self.task == "instance")
        if self.task == "panoptic" and not any(row.isthing for row in self.classes.rows):
            raise ValueError(
                "classes has no thing: panoptic data has things and stuff, declare them such as "
                "ClassTable.from_labels({1: 'road', 2: 'car'}, things=['car'])"
            )
        self.image, self.label, self.segments_info = image, label, segments_info
        self.objects, self.image_id = objects, image_id
        self.folder = None if folder is None else Path(folder)
        named = list(objects.values()) if isinstance(objects, Mapping) else [objects]
        columns = getattr(dataset, "column_names", None)  # a stream may not know its columns
        missing = [
            name
            for name in (image, label, segments_info, image_id, *named)
            if name and name not in (columns or [name])
        ]
        if missing:
            raise ValueError(f"the data set has no column {', '.join(missing)}: its columns are {', '.join(columns)}")
        self._lookup = label_lookup(self.classes) if self.task == "semantic" else None

    @data_errors()
    def example(self, row: Mapping, number) -> Example:
        """`number` identifies the row where no column does."""
        image_id = number
        if self.image_id is not None:
            entry = {self.image_id: _plain(_column(row, self.image_id, f"row {number}"))}
            image_id = read_entry(entry, {self.image_id: ID}, f"row {number}")[self.image_id]
        where = f"row {image_id}"
        picture = self._decode(row, self.image, where)
        image = to_pixels(picture, f"{where}, {self.image}", self.channels)
        file = os.path.basename(getattr(picture, "filename", "") or "") or str(image_id)
        names = {"image_id": image_id, "file_name": file}
        if self.task == "instance":
            found = self._instances(row, image.shape[:2], where, names)
        else:
            label = _open(self._decode(row, self.label, where), where)
            if self.task == "semantic":
                found = semantic_annotation(to_map(label, where), self._lookup, self.classes, where, **names)
            else:
                segments = _as_dicts(_column(row, self.segments_info, where), f"{where}: {self.segments_info}")
                segments = [
                    read_entry(entry, SEGMENT_FIELDS, f"{where}: {self.segments_info}[{k}]")
                    for k, entry in enumerate(segments)
                ]
                found = panoptic_annotation(to_panoptic_ids(label, where), segments, self.classes, where, **names)
        check_size(image.shape[:2], found.size, where)
        return found.with_image(image)

    def _instances(self, row, size, where, names):
        if isinstance(self.objects, Mapping):
            columns = {key: _column(row, column, where) for key, column in self.objects.items()}
            name, entries = "objects", _as_dicts(columns, where)
        else:
            name, entries = self.objects, _as_dicts(_column(row, self.objects, where), f"{where}: {self.objects}")
        masks, objects = [], []
        for k, entry in enumerate(entries):
            place = f"{where}: {name}[{k}]"
            if not isinstance(entry, Mapping):
                read_entry(entry, OBJECT_FIELDS, place)
            category, mask = _first(entry, CATEGORY_KEYS, where), _first(entry, MASK_KEYS, where)
            if isinstance(mask, Mapping) and "counts" not in mask:  # an image that is not decoded
                mask = self._decode({"mask": mask}, "mask", place)
            masks.append(_to_mask(mask, size, place))
            objects.append(read_entry({**entry, "category_id": category}, OBJECT_FIELDS, place))
        return instance_annotation(masks, objects, size, self.classes, where, **names)

    def _decode(self, row: Mapping, column: str, where) -> Image.Image | np.ndarray:
        """An image as `datasets` gives it: decoded, as {"bytes", "path"}, or as an array."""
        value, where = _column(row, column, where), f"{where}, {column}"
        try:
            if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
                image = Image.open(io.BytesIO(value["bytes"]))
                image.load()
                return image
            if isinstance(value, Mapping) and not value.get("bytes") and isinstance(value.get("path"), str):
                return open_image(self._inside(value["path"], where))
            if isinstance(value, np.ndarray | list):
                return np.asarray(value)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where}: {value['path']}: no such file") from error
        except Exception as error:  # Pillow has no common class for what damaged files raise; NumPy for ragged lists
            raise ValueError(f"{where}: not a readable image ({error}); replace it or leave the row out") from error
        if not isinstance(value, Image.Image):
            shown = f"a {type(value).__name__}" if not isinstance(value, Mapping) else reprlib.repr(dict(value))
            raise ValueError(f"{where}: {shown} is not an image; cast the column with datasets.Image()")
        return value

    def _inside(self, path: str, where) -> Path:
        """A row's path, which may be relative to the data set's folder and must not leave it."""
        if self.folder is None:
            return Path(path)
        found = (self.folder / path).resolve()
        if not found.is_relative_to(self.folder.resolve()):
            raise ValueError(f"the path {path} points out of the data set's folder, {self.folder}")
        return found


class HubDataset(Reader):
    """Rows of a `datasets.Dataset`. See `Example`.

    Args:
        dataset: of `load_dataset` or `Dataset.from_...`.
        classes: a `ClassTable`, or any form of `class_forms.class_table`. In instance data they are things unless they
            say otherwise.
        image: column of images.
        label: column of images: label maps, or panoptic maps if `segments_info` is given.
        segments_info: column of lists of `{"id", "category_id", "iscrowd"}`.
        objects: column of lists of `{"category_id", "segmentation"}` and optionally `iscrowd`, `area`, `bbox`, `id`,
            or of dicts of lists; or a map of these keys to columns of lists. `category_id` may also be called
            `category` or `label`, and holds ids or names; `segmentation` (`mask`, `bitmask`) holds polygons, RLE, or
            an (H, W) image or array that is not 0 on the object.
        image_id: column that identifies a row; without it the row's number does.
        folder: of the data set, if it is one: a `path` in a row is relative to it and must not lie outside. Columns
            that `datasets` decodes are opened by it, before a row comes here: it refuses names in an imagefolder's
            metadata that leave the folder (as of 5.2), but opens the paths in rows of other formats. Of data that you
            do not trust, cast the columns with `Image(decode=False)`, and this reader opens them by its rule.
    """

    def __init__(
        self,
        dataset,
        classes: ClassTable | Mapping[int, str | None] | str | Path,
        image: str = "image",
        label: str | None = None,
        segments_info: str | None = None,
        objects: str | Mapping[str, str] | None = None,
        image_id: str | None = None,
        folder: str | Path | None = None,
    ):
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset is a {type(dataset).__name__}, which has no length: use HubStream for streams")
        if not len(dataset):
            raise ValueError("dataset has no rows: choose another split")
        self.dataset = dataset
        self._rows = _Rows(dataset, classes, image, label, segments_info, objects, image_id, folder)
        self.classes, self.task = self._rows.classes, self._rows.task

    @property
    def channels(self) -> int | None:
        """Bands of the images, None for photos."""
        return self._rows.channels

    @channels.setter
    def channels(self, channels: int | None):
        self._rows.channels = channels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        self._check_index(index)
        with data_errors(f"row {index}"):  # of an image that datasets decodes
            row = self.dataset[index]
        return self._rows.example(row, index)


class HubStream(IterableDataset):
    """Rows of a `datasets.IterableDataset` (`load_dataset(..., streaming=True)`); each process gets its part.

    The parts of all processes together are every row exactly once; they may differ in length by some rows. Workers of
    a `DataLoader` share the part of their process by the shards of the data. Do not pass the loader through
    `Accelerator.prepare`, which would divide it again; if something else divides, give rank 0 and world size 1.

    Args:
        dataset, classes, image, label, segments_info, objects, image_id, folder: as in `HubDataset`. Without
            `image_id` it is rank-worker-number.
        rank, world_size: this process and how many there are; by default of torch.distributed if it is initialised
            when iteration starts, else of the environment (`RANK`, `WORLD_SIZE`), else 0 and 1.
    """

    reads_bands = True  # by which `reader.read_bands_of` knows its own

    def __init__(
        self,
        dataset,
        classes: ClassTable | Mapping[int, str | None] | str | Path,
        image: str = "image",
        label: str | None = None,
        segments_info: str | None = None,
        objects: str | Mapping[str, str] | None = None,
        image_id: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        folder: str | Path | None = None,
    ):
        if hasattr(dataset, "__len__"):
            raise TypeError(f"dataset is a {type(dataset).__name__}, which has a length and an index: use HubDataset")
        if (rank is None) != (world_size is None) or (rank is not None and not 0 <= rank < world_size):
            raise ValueError(
                f"rank={rank}, world_size={world_size}: give both, with 0 <= rank < world_size, or neither"
            )
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self._rows = _Rows(dataset, classes, image, label, segments_info, objects, image_id, folder)
        self.classes, self.task = self._rows.classes, self._rows.task

    @property
    def channels(self) -> int | None:
        """Bands of the images, None for photos."""
        return self._rows.channels

    @channels.setter
    def channels(self, channels: int | None):
        self._rows.channels = channels

    def __iter__(self) -> Iterator[Example]:
        from datasets.distributed import split_dataset_by_node

        rank, world_size = node() if self.rank is None else (self.rank, self.world_size)
        rows = split_dataset_by_node(self.dataset, rank, world_size) if world_size > 1 else self.dataset
        worker = get_worker_info()
        place = f"{rank}-{worker.id if worker else 0}"
        for number, row in enumerate(rows):
            yield self._rows.example(row, f"{place}-{number}")

    def set_epoch(self, epoch: int):
        """Shuffle differently in every epoch, if the data set was shuffled; call it before each."""
        self.dataset.set_epoch(epoch)


def node() -> tuple[int, int]:
    """(rank, world size) of this process."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _column(row: Mapping, name: str, where):
    if name not in row:
        raise ValueError(f"{where}: no column {name}: its columns are {', '.join(row)}")
    return row[name]


def _plain(value):
    """Numbers and lists of NumPy, as data sets in NumPy's format have them, as Python's."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _open(value: Image.Image | np.ndarray, where) -> Image.Image:
    """A map as `datasets` gives it, decoded."""
    if isinstance(value, np.ndarray):
        small, largest = (np.uint8, 255) if value.ndim == 3 else (np.uint16, 65535)
        if value.ndim not in (2, 3) or value.dtype.kind not in "iub" or value.min() < 0 or value.max() > largest:
            raise ValueError(
                f"{where}: an array of {value.dtype} and shape {value.shape} is not a map; it must be (H, W, 3) with "
                "values up to 255, or (H, W) up to 65535"
            )
        is_byte = value.dtype == np.uint8  # lists of numbers come back from Arrow as int64
        return Image.fromarray(value if is_byte else value.astype(small))
    return value


def _as_dicts(value, where) -> list[Mapping]:
    """A list of dicts, or a dict of lists of equal length, which older versions of `datasets` make of one."""
    if not isinstance(value, Mapping | list | tuple | np.ndarray | None):
        raise ValueError(f"{where} is {reprlib.repr(value)}; it must be a list of dicts, or a dict of lists")
    if not isinstance(value, Mapping):
        entries = [] if value is None else list(value)
        return [
            {key: _plain(part) if key not in MASK_KEYS else part for key, part in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for entry in entries
        ]
    columns = {key: column for key, column in value.items() if column is not None}
    if wrong := [key for key, column in columns.items() if not isinstance(column, list | tuple | np.ndarray)]:
        raise ValueError(f"{where}: {', '.join(map(str, wrong))} must be lists with an entry per object")
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: lists of different length: {lengths}")
    return _as_dicts(
        [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], where
    )


def _first(entry: Mapping, keys: tuple[str, ...], where):
    for key in keys:
        if entry.get(key) is not None:
            return entry[key]
    raise ValueError(f"{where}: an object has {', '.join(entry)} but none of {', '.join(keys)}; rename a column")


def _to_mask(value, size, where) -> np.ndarray:
    """(H, W) bool of polygons, RLE, an image or rows of numbers."""
    if isinstance(value, Mapping) and "counts" in value:
        return decode_mask(value, size, where)
    rows = isinstance(value, list) and len(value) == size[0]
    rows = rows and all(isinstance(row, list | np.ndarray) and len(row) == size[1] for row in value)
    if isinstance(value, list) and not rows:
        return decode_mask(value, size, where)
    mask = np.asarray(value)
    if mask.dtype.kind not in "biu" and not (mask.dtype.kind == "f" and ((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{where}: the mask of an object holds fractions or no numbers; threshold it to 0 and 1")
    mask = mask != 0
    if mask.shape != tuple(size):
        raise ValueError(
            f"{where}: the mask of an object is {mask.shape}, the image {tuple(size)}; they must be equal"
        )
    return mask
