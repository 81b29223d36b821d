"""Folders in the formats of other tools: predictions, and data sets that are converted."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from ..errors import data_errors
from ..georeference import Georeference, read_georeference
from ..json_files import write_json
from . import geojson, label_studio, labelme, parquet, yolo
from .labelled_mask import LabelledMask


class ImageFile(NamedTuple):
    """An image that has segments.

    Args:
        path: of the file.
        name: in results, with its extension.
        stem: of the files that belong to it, unique; with its subfolders.
        size: (H, W) in pixels.
        image_id: number or text.
        georeference: of the image, if it is known; otherwise the file is asked.
    """

    path: Path
    name: str
    stem: str
    size: tuple[int, int]
    image_id: int | str
    georeference: Georeference | None = None


class FormatWriter:
    """Writes segments of images; `close` writes what belongs to all images together.

    What `write` does for one image depends on no other, so that other processes may do it: a writer there has written
    the image's files, and the one that is closed collects, in the order of the images, what `write` returned.

    Args:
        root: folder to write into.
        id2label: names of all classes, by index.
        stuff_label_ids: classes that are not countable.
        split: "train", "val", or "" for what has no splits, such as predictions.
        tolerance: of polygons; see `data.polygons.polygons_of`.
        annotated_by: name of the model that made the segments; None for annotations of people.
        place: where the folder will be in the end; None where it is.

    Raises:
        ImportError: if a package that the format needs is missing.
    """

    needs: tuple[str, ...] = ()  # packages, as they are imported
    images = "images"  # folder, below `root`, of the images of a data set; "" for beside the annotations

    def __init__(
        self,
        root: Path,
        id2label: Mapping[int, str],
        stuff_label_ids: Collection[int] = (),
        split: str = "",
        tolerance: float = 0.0,
        annotated_by: str | None = None,
        place: Path | None = None,
    ):
        self.check_packages()
        self.root, self.split, self.tolerance, self.annotated_by = Path(root), split, tolerance, annotated_by
        self.id2label, self.stuff_label_ids = dict(id2label), frozenset(stuff_label_ids)
        self.place = self.root if place is None else Path(place)
        self.lost = Counter()  # what the format cannot say, in words -> how often it occurred
        self.root.mkdir(parents=True, exist_ok=True)

    @classmethod
    def check_packages(cls):
        """Fail before the first image if a package that the format needs is missing."""
        if missing := [name for name in cls.needs if find_spec(name) is None]:
            raise ImportError(f"needs the packages {', '.join(missing)}: pip install {' '.join(missing)}")

    def image_path(self, name: str) -> Path:
        """Where an image of a data set in this format lies."""
        return self.root / self.images / self.split / name

    def add(self, image: ImageFile, masks: Iterable[LabelledMask]):
        """Write the segments of an image."""
        self.collect(self.write(image, masks))

    def write(self, image: ImageFile, masks: Iterable[LabelledMask]):
        """Write the files of an image; returns what goes into those of all images, or None."""
        raise NotImplementedError

    def collect(self, part):
        """Take what `write` returned."""

    def close(self):
        """Write what belongs to all images together; the least is the names of the classes."""
        write_json(self.root / "classes.json", {"classes": self.names})

    @property
    def names(self) -> list[str]:
        """Of all classes, in the order of their indices."""
        return [self.id2label[index] for index in sorted(self.id2label)]

    def without_crowds(self, masks: Iterable[LabelledMask]) -> list[LabelledMask]:
        """The objects, for formats that know nothing else; crowds are counted as lost."""
        masks = list(masks)
        self.lost["crowds are left out: the format has objects alone"] += sum(mask.iscrowd for mask in masks)
        return [mask for mask in masks if not mask.iscrowd]

    def _file(self, folder: str, image: ImageFile, ending: str) -> Path:
        """The file of an image, in a folder that is there."""
        path = self.root / folder / self.split / f"{image.stem}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _named(self, name: str, ending: str) -> Path:
        """A file of all images of the split."""
        return self.root / f"{name}{f'_{self.split}' if self.split else ''}{ending}"


class GeoJson(FormatWriter):
    """A `.geojson` per image, in the map's coordinates where the image has them; beside the images of a data set."""

    needs = ("shapely",)
    images = ""

    def write(self, image, masks):
        reference = image.georeference
        if reference is None and image.path.is_file():  # rows of data sets have no file
            with data_errors():
                reference = read_georeference(image.path)
        content = geojson.feature_collection(masks, self.tolerance, reference)
        write_json(self._file("", image, ".geojson"), content, indent=None)


class Yolo(FormatWriter):
    """A text per image in `labels`, and `data.yaml`."""

    needs = ("shapely", "yaml")

    def write(self, image, masks):
        text = yolo.label_lines(self.without_crowds(masks), image.size, self.tolerance)
        self._file("labels", image, ".txt").write_text(text, encoding="utf-8")

    def close(self):
        splits = [split for split in ("train", "val") if (self.root / "labels" / split).is_dir()]
        places = {split: f"{self.images}/{split}" for split in splits} or {"train": self.images}
        places.setdefault("val", places["train"])  # Ultralytics wants both
        (self.root / "data.yaml").write_text(yolo.data_yaml(self.names, places), encoding="utf-8")


class Labelme(FormatWriter):
    """A json per image, beside the images of a data set."""

    needs = ("shapely",)
    images = ""

    def write(self, image, masks):
        path = self._file("", image, ".json")
        folder = self.place / path.parent.relative_to(self.root)
        relative = Path(os.path.relpath(image.path, folder)).as_posix()
        write_json(path, labelme.labelme_json(masks, image.size, relative, self.tolerance))


class LabelStudio(FormatWriter):
    """One json of tasks to import, and the labelling interface that they need."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._tasks = []

    def write(self, image, masks):
        name = image.path.relative_to(self.root).as_posix() if image.path.is_relative_to(self.root) else image.name
        address = f"/data/local-files/?d={quote(name)}"
        return label_studio.task(self.without_crowds(masks), image.size, address, self.annotated_by)

    def collect(self, part):
        self._tasks.append(part)

    def close(self):
        super().close()
        write_json(self._named("label_studio", ".json"), self._tasks, indent=None)
        (self.root / "label_config.xml").write_text(label_studio.label_config(self.names))


class Parquet(FormatWriter):
    """One table with a row per segment."""

    needs = ("pyarrow",)

    @cached_property
    def _rows(self) -> parquet.RowFile:
        return parquet.RowFile(self._named("segments", ".parquet"))

    def write(self, image, masks):
        return parquet.rows(masks, image.size, image.image_id, image.name)

    def collect(self, part):
        self._rows.add(part)

    def close(self):
        super().close()
        self._rows.close()


TOOL_WRITERS = {
    "geojson": GeoJson,
    "yolo": Yolo,
    "labelme": Labelme,
    "label-studio": LabelStudio,
    "parquet": Parquet,
}
