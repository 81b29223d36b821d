"""Readers of folders: a map of labels per image, or a map of object ids per image."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .annotations import label_lookup, semantic_annotation
from .class_forms import class_table, naming_classes
from .classes import BACKGROUND_ID, ClassTable, count_ids, without_double_keys
from .errors import naming
from .example import Example
from .fields import displayed
from .images import IMAGE_SUFFIXES, MAP_SUFFIXES, read_map, read_size
from .paths import files_by_name
from .reader import FileReader
from .text_files import read_json, read_text


class FolderReader(FileReader):
    """Pairs of images and maps with equal paths below their folders, apart from extensions and suffixes.

    Args:
        images, maps: the folders; both are searched with their subfolders.
        image_suffix, map_suffix: what the names have besides the common stem; files without it are left out.

    Raises:
        FileNotFoundError: for a missing folder, an image without a map, or a map without an image.
        ValueError: for an empty folder.
    """

    def __init__(self, images: str | Path, maps: str | Path, image_suffix: str = "", map_suffix: str = ""):
        self.images, self.maps = Path(images), Path(maps)
        found = files_by_name(self.images, "images", IMAGE_SUFFIXES, image_suffix)
        maps_found = files_by_name(self.maps, "maps", MAP_SUFFIXES, map_suffix)
        for kind, here, there, where in (
            ("image", found, maps_found, self.maps),
            ("map", maps_found, found, self.images),
        ):
            alone = [name for name in here if name not in there]
            if alone:
                other = "map" if kind == "image" else "image"
                raise FileNotFoundError(
                    f"{len(alone)} of {len(here)} {kind}s have no {other} in {where}, first {here[alone[0]]}; names "
                    "must be equal up to the extension, or give image_suffix and map_suffix (for Cityscapes "
                    "'_leftImg8bit' and '_gtFine_labelIds')"
                )
        self._names = list(found)
        self._image_files = list(found.values())
        self._map_files = [maps_found[name] for name in found]

    def __len__(self) -> int:
        return len(self._names)

    def file_names(self) -> list[str]:
        """Of all images, relative to their folder."""
        return list(self._image_files)

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        path, names = self.maps / self._map_files[index], (self._names[index], self._image_files[index])
        return self._annotate(read_map(path), path, *names)

    def _annotate(self, ids: np.ndarray, path: Path, image_id: str, file_name: str) -> Example:
        raise NotImplementedError

    def image_path(self, index: int) -> Path:
        return self.images / self._image_files[index]

    def map_path(self, index: int) -> Path:
        """The file of the map."""
        return self.maps / self._map_files[index]

    def _annotated_size(self, index: int) -> tuple[int, int]:
        return read_size(self.map_path(index), upright=False)


class LabelMaps(FolderReader):
    """Semantic label maps (ADE20K, Cityscapes, CamVid, any folder): 8 or 16 bits, one file per image.

    A class that occurs in an image is one segment with id = index + 1. See `Example`.

    Args:
        images, maps: folders; files are matched by their path without extension and suffix.
        labels: `{0: IGNORE, 1: "road", 255: IGNORE}`, a `ClassTable`, or any form of `class_forms.class_table`. Every
            label that occurs must be declared.
        image_suffix, map_suffix: what the names have besides the common stem, for Cityscapes `"_leftImg8bit"` and
            `"_gtFine_labelIds"`.
    """

    task = "semantic"

    def __init__(
        self,
        images: str | Path,
        maps: str | Path,
        labels: Mapping[int, str | None] | Sequence[str] | ClassTable | str | Path,
        image_suffix: str = "",
        map_suffix: str = "",
    ):
        self.classes = class_table(labels)
        super().__init__(images, maps, image_suffix, map_suffix)
        with naming_classes(labels):
            self._lookup = label_lookup(self.classes)

    def _annotate(self, ids, path, image_id, file_name):
        names = {"image_id": image_id, "file_name": file_name}
        return semantic_annotation(ids, self._lookup, self.classes, path, **names)


class InstanceMaps(FolderReader):
    """Maps of object ids, 0 for background: 8 or 16 bits, one file per image.

    What an id is follows from one of: a single class; `table`; `divisor`. Segments keep the ids of the map. See
    `Example`.

    Args:
        images, maps: folders; files are matched by their path without extension and suffix.
        classes: the name of the one class, all names in the order of their indices (ids count from 1), or any form of
            `class_forms.class_table`.
        table: `{id: class}` for all images or `{image: {id: class}}`, where an image is named by its path without
            extension and a class by its name or original id; or a file: json of this form, or csv with the columns
            `id`, `class` and optionally `image`.
        divisor: id // divisor is the original id of the class, and a smaller id is the crowd of the class with this
            id, such as 1000 in Cityscapes' instanceIds. Classes that the table of classes ignores are background.
        image_suffix, map_suffix: as in `LabelMaps`.
    """

    task = "instance"

    def __init__(
        self,
        images: str | Path,
        maps: str | Path,
        classes: str | Sequence[str] | Mapping[int, str | None] | ClassTable | Path,
        table: Mapping | str | Path | None = None,
        divisor: int | None = None,
        image_suffix: str = "",
        map_suffix: str = "",
    ):
        classes = class_table(classes, instances=True, first_id=1)
        super().__init__(images, maps, image_suffix, map_suffix)
        if table is not None and divisor is not None:
            raise ValueError("table and divisor are given: the class of an id follows from one of them")
        if table is None and divisor is None and len(classes) > 1:
            raise ValueError(
                f"{len(classes)} classes: give a table (id -> class) or a divisor (id // divisor = class)"
            )
        if divisor is not None and divisor < 1:
            raise ValueError(f"divisor={divisor}: must be 1 or more, such as 1000")
        self.classes, self.divisor = classes, divisor
        if isinstance(table, str | Path):
            with naming(table):
                table = self._check_table(read_table(table))
        elif table is not None:
            table = self._check_table(table)
        self._table = table

    def _check_table(self, table: Mapping) -> dict:
        """Image name or `None` for all -> {id: index}."""
        if not isinstance(table, Mapping):
            raise ValueError(f"table is {displayed(table)}; it must be {{id: class}} or {{image: {{id: class}}}}")
        nested = {image: rows for image, rows in table.items() if isinstance(rows, Mapping)}
        if nested and len(nested) < len(table):
            raise ValueError("table mixes {id: class} and {image: {id: class}}: use one form")
        images = nested or {None: table}
        missing = [name for name in self._names if nested and name not in nested]
        if missing:
            raise ValueError(f"table has no entry for {len(missing)} images, the first is {missing[0]!r}; add them")
        return {
            image: {self._number(number): self._index(label) for number, label in rows.items()}
            for image, rows in images.items()
        }

    @staticmethod
    def _number(number) -> int:
        try:
            return int(number)
        except (ValueError, TypeError):
            raise ValueError(f"table has the id {displayed(number)}; it must be a whole number") from None

    def _index(self, label) -> int:
        if not isinstance(label, str | int | np.integer):
            raise ValueError(f"table has the class {displayed(label)}; it must be a name or an id of a class")
        index = self.classes.to_index(label)
        if index is None:
            raise ValueError(f"table: class {label!r} is ignored; leave the id out of the map, as 0")
        return index

    def _annotate(self, ids, path, image_id, file_name):
        numbers, areas = count_ids(ids)
        if numbers and numbers[0] < 0:
            raise ValueError(f"{path}: has the id {numbers[0]}; ids are positive, 0 is background")
        info, background, unknown = [], [0], []
        rows = None if self._table is None else self._table.get(image_id, self._table.get(None))
        for number, area in zip(numbers, areas, strict=True):
            if number == 0:
                continue
            iscrowd = int(self.divisor is not None and number < self.divisor)
            if self.divisor is not None:
                original = number if iscrowd else number // self.divisor
                known = self.classes.has(original)
                index = self.classes.to_index(original) if known else None
                if known and index is None:
                    background.append(number)
                    continue
            else:
                index = 0 if rows is None else rows.get(number)
            if index is None:
                unknown.append(number)
                continue
            isthing = int(self.classes.rows[index].isthing)
            info.append({"id": number, "category_id": index, "isthing": isthing, "iscrowd": iscrowd, "area": area})
        if unknown:
            source = "the table" if self.divisor is None else f"the classes (as id // {self.divisor})"
            shown = f"{unknown[:10]}{' ...' if len(unknown) > 10 else ''}"
            raise ValueError(f"{path}: has the ids {shown} that {source} does not declare; add them. {self.classes}")
        segmentation = np.where(np.isin(ids, background), np.int32(BACKGROUND_ID), ids.astype(np.int32))
        return Example(None, segmentation, info, image_id, file_name)


def read_table(path: str | Path) -> dict:
    """`{id: class}` or `{image: {id: class}}` from a json of this form, or a csv with `id`, `class`, maybe `image`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    if path.suffix.lower() == ".json":
        return read_json(path, without_double_keys)
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: not a csv file ({error}); save it anew") from None
    if not rows or not {"id", "class"} <= set(rows[0]):
        raise ValueError(f"{path}: a table is a json, or a csv with a header that has the columns id and class")
    table = {}
    for line, row in enumerate(rows, 2):
        target = table.setdefault(row["image"], {}) if "image" in row else table
        if not (row["id"] or "").strip().isdigit() or row["class"] is None:
            raise ValueError(f"{path}, line {line}: {row}; it needs an id, a whole number, and a class")
        if int(row["id"]) in target:
            raise ValueError(f"{path}, line {line}: the id {row['id']} stands there twice; keep one of them")
        target[int(row["id"])] = row["class"]
    return table
