"""Readers of `datasets`: a `Dataset` by index, an `IterableDataset` as a stream that is split across processes."""

import io
import os
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
from .class_forms import class_table
from .classes import ClassTable
from .example import Example, check_size
from .images import open_image, to_map, to_panoptic_ids, to_rgb
from .reader import Reader

CATEGORY_KEYS = ("category_id", "category", "label")
MASK_KEYS = ("segmentation", "mask", "bitmask")


class _Rows:
    """How a row becomes an example; the columns mean the same for both readers below."""

    def __init__(self, dataset, classes, image, label, segments_info, objects, image_id):
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

    def example(self, row: Mapping, number) -> Example:
        """`number` identifies the row where no column does."""
        image_id = number if self.image_id is None else row[self.image_id]
        where = f"row {image_id}"
        picture = _decode(row[self.image], where)
        image = to_rgb(picture, where)
        file = os.path.basename(getattr(picture, "filename", "") or "") or str(image_id)
        names = {"image_id": image_id, "file_name": file}
        if self.task == "instance":
            found = self._instances(row, image.shape[:2], where, names)
        else:
            label = _open(row[self.label], where)
            if self.task == "semantic":
                found = semantic_annotation(to_map(label, where), self._lookup, self.classes, where, **names)
            else:
                segments = _as_dicts(row[self.segments_info], where)
                found = panoptic_annotation(to_panoptic_ids(label, where), segments, self.classes, where, **names)
        check_size(image.shape[:2], found.size, where)
        return found.with_image(image)

    def _instances(self, row, size, where, names):
        if isinstance(self.objects, Mapping):
            entries = _as_dicts({key: row[column] for key, column in self.objects.items()}, where)
        else:
            entries = _as_dicts(row[self.objects], where)
        masks, objects = [], []
        for entry in entries:
            category, mask = _first(entry, CATEGORY_KEYS, where), _first(entry, MASK_KEYS, where)
            masks.append(_to_mask(mask, size, where))
            objects.append({**entry, "category_id": category})
        return instance_annotation(masks, objects, size, self.classes, where, **names)


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
    ):
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset is a {type(dataset).__name__}, which has no length: use HubStream for streams")
        if not len(dataset):
            raise ValueError("dataset has no rows: choose another split")
        self.dataset = dataset
        self._rows = _Rows(dataset, classes, image, label, segments_info, objects, image_id)
        self.classes, self.task = self._rows.classes, self._rows.task

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        self._check_index(index)
        return self._rows.example(self.dataset[index], index)


class HubStream(IterableDataset):
    """Rows of a `datasets.IterableDataset` (`load_dataset(..., streaming=True)`); each process gets its part.

    The parts of all processes together are every row exactly once; they may differ in length by some rows. Workers of
    a `DataLoader` share the part of their process by the shards of the data. Do not pass the loader through
    `Accelerator.prepare`, which would divide it again; if something else divides, give rank 0 and world size 1.

    Args:
        dataset, classes, image, label, segments_info, objects, image_id: as in `HubDataset`. Without `image_id` it is
            rank-worker-number.
        rank, world_size: this process and how many there are; by default of torch.distributed if it is initialised
            when iteration starts, else of the environment (`RANK`, `WORLD_SIZE`), else 0 and 1.
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
        rank: int | None = None,
        world_size: int | None = None,
    ):
        if hasattr(dataset, "__len__"):
            raise TypeError(f"dataset is a {type(dataset).__name__}, which has a length and an index: use HubDataset")
        if (rank is None) != (world_size is None) or (rank is not None and not 0 <= rank < world_size):
            raise ValueError(
                f"rank={rank}, world_size={world_size}: give both, with 0 <= rank < world_size, or neither"
            )
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self._rows = _Rows(dataset, classes, image, label, segments_info, objects, image_id)
        self.classes, self.task = self._rows.classes, self._rows.task

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


def _decode(value, where) -> Image.Image | np.ndarray:
    """An image as `datasets` gives it: decoded, as {"bytes", "path"}, or as an array."""
    if isinstance(value, Mapping) and value.get("bytes"):
        return Image.open(io.BytesIO(value["bytes"]))
    if isinstance(value, Mapping) and value.get("path"):
        return open_image(value["path"])
    if isinstance(value, np.ndarray | list):
        return np.asarray(value)
    if not isinstance(value, Image.Image):
        raise ValueError(f"{where}: a {type(value).__name__} is not an image; cast the column with datasets.Image()")
    return value


def _open(value, where) -> Image.Image:
    """A map as `datasets` gives it."""
    value = _decode(value, where)
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
    if not isinstance(value, Mapping):
        return list(value or [])
    columns = {key: column for key, column in value.items() if column is not None}
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: lists of different length: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _first(entry: Mapping, keys: tuple[str, ...], where):
    for key in keys:
        if entry.get(key) is not None:
            return entry[key]
    raise ValueError(f"{where}: an object has {', '.join(entry)} but none of {', '.join(keys)}; rename a column")


def _to_mask(value, size, where) -> np.ndarray:
    """(H, W) bool of polygons, RLE, an image or rows of numbers."""
    if isinstance(value, Mapping) and "counts" in value:
        return decode_mask(value, size, where)
    rows = isinstance(value, list) and len(value) == size[0] and all(len(row) == size[1] for row in value)
    if isinstance(value, list) and not rows:
        return decode_mask(value, size, where)
    mask = np.asarray(_open(value, where) if isinstance(value, Mapping) else value)
    if mask.dtype.kind not in "biu" and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{where}: the mask of an object holds fractions; threshold it to 0 and 1")
    mask = mask != 0
    if mask.shape != tuple(size):
        raise ValueError(
            f"{where}: the mask of an object is {mask.shape}, the image {tuple(size)}; they must be equal"
        )
    return mask
