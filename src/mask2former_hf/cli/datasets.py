"""Data sets named by flags or by the keys of a YAML file; shared by `train` and `evaluate`."""

import argparse
from pathlib import Path

from ..data.classes import IGNORE, ClassTable
from ..data.coco import CocoInstances, CocoPanoptic
from ..data.example import Example
from ..data.folders import InstanceMaps, LabelMaps
from ..data.hub_dataset import HubDataset
from ..data.scenes import ID2LABEL, STUFF_LABEL_IDS, ScenesDataset
from .main import UserError

NEEDED = {  # kind -> the paths of a split that it reads
    "coco-panoptic": ("images", "annotations", "maps"),
    "coco-instances": ("images", "annotations"),
    "label-maps": ("images", "maps"),
    "instance-maps": ("images", "maps"),
    "hub": (),
    "scenes": (),
}
HELP = {
    "images": "folder of the images",
    "annotations": "COCO json",
    "maps": "folder of the PNGs: panoptic ids, labels or instance ids",
    "split": "split of the Hub data set",
    "limit": "use only the first so many examples",
}


def add_data_arguments(parser: argparse.ArgumentParser, splits: tuple[str, ...]):
    """Flags for the kind of data, its classes, and the paths of each split ("" for flags without prefix)."""
    parser.add_argument("--data", choices=NEEDED, help="what the annotations are")
    parser.add_argument(
        "--classes",
        help="a json of classes, the name of a class set such as ade20k-semantic, or names separated by commas; by "
        "default what the COCO json says",
    )
    parser.add_argument("--image-suffix", help="of the images' names, such as _leftImg8bit")
    parser.add_argument("--map-suffix", help="of the maps' names, such as _gtFine_labelIds")
    parser.add_argument("--divisor", type=int, help="instance-maps: class is id // DIVISOR (Cityscapes: 1000)")
    parser.add_argument("--dataset", help="hub: id or folder of the data set")
    for name in ("image", "label", "segments-info", "objects"):
        parser.add_argument(f"--{name}-column", help="hub: name of the column")
    for split in splits:
        for name, text in HELP.items():
            kind = int if name == "limit" else str
            parser.add_argument(f"--{split}-{name}" if split else f"--{name}", type=kind, help=text)


def load_classes(settings) -> ClassTable | None:
    """The declared classes, if any."""
    given = settings.classes
    if given is None or isinstance(given, ClassTable):
        return given
    if isinstance(given, str):
        if Path(given).suffix == ".json":
            return ClassTable.from_json(given)
        if "," not in given:
            return ClassTable.load(given)
        given = [name.strip() for name in given.split(",")]
    labels = given if isinstance(given, dict) else dict(enumerate(given))  # of a YAML file
    try:
        labels = {int(number): name if name is IGNORE else str(name) for number, name in labels.items()}
    except ValueError as error:
        raise ValueError(f"classes: a mapping must be from numbers in the maps to names ({error})") from error
    things = [name for name in labels.values() if name is not IGNORE] if settings.data == "instance-maps" else ()
    return ClassTable.from_labels(labels, things)


def load_split(settings, split: str):
    """A reader of a split of the data set that the settings describe.

    Raises:
        UserError: for missing settings, and for what the reader finds wrong with the files.
    """
    kind, prefix = settings.data, f"{split}_" if split else ""
    if kind is None:
        raise UserError(f"--data is missing: choose one of {', '.join(NEEDED)}")
    paths = {name: getattr(settings, prefix + name) for name in HELP}
    missing = [name for name in NEEDED[kind] if not paths[name]]
    if missing:
        flags = ", ".join(f"--{prefix}{name}".replace("_", "-") for name in missing)
        raise UserError(f"--data {kind} needs {flags}")
    try:
        dataset = _read(kind, paths, settings, split)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{split or 'data'}: {error}") from error
    if paths["limit"] is not None:
        if paths["limit"] < 1:
            raise UserError(f"--{prefix}limit {paths['limit']}: must be at least 1".replace("_", "-"))
        dataset = FirstExamples(dataset, paths["limit"])
    if not len(dataset):
        raise UserError(f"{split or 'data'} has no examples")
    return dataset


def _read(kind, paths, settings, split):
    classes = load_classes(settings)
    suffixes = {"image_suffix": settings.image_suffix or "", "map_suffix": settings.map_suffix or ""}
    if kind == "coco-panoptic":
        return CocoPanoptic(paths["images"], paths["annotations"], paths["maps"], classes)
    if kind == "coco-instances":
        return CocoInstances(paths["images"], paths["annotations"], classes, skip_empty=split == "train")
    if kind == "scenes":
        return Scenes(split)
    if classes is None:
        raise ValueError(f"--data {kind} needs --classes")
    if kind == "label-maps":
        return LabelMaps(paths["images"], paths["maps"], classes, **suffixes)
    if kind == "instance-maps":
        return InstanceMaps(paths["images"], paths["maps"], classes, divisor=settings.divisor, **suffixes)
    try:
        import datasets
    except ImportError as error:
        raise ImportError("--data hub needs the package datasets: pip install datasets") from error
    if not settings.dataset:
        raise ValueError("--data hub needs --dataset")
    return HubDataset(
        datasets.load_dataset(settings.dataset, split=paths["split"] or split or "validation"),
        classes,
        image=settings.image_column or "image",
        label=settings.label_column,
        segments_info=settings.segments_info_column,
        objects=settings.objects_column,
    )


class Scenes(ScenesDataset):
    """Generated scenes as a data set with classes: 2000 to train on, 100 others to measure."""

    task = "panoptic"
    classes = ClassTable.from_categories(
        {"id": index, "name": name, "isthing": index not in STUFF_LABEL_IDS} for index, name in ID2LABEL.items()
    )

    def __init__(self, split: str):
        super().__init__(2000 if split == "train" else 100, size=128, seed=0 if split == "train" else 1_000_003)


class FirstExamples:
    """The first examples of a reader."""

    def __init__(self, dataset, count: int):
        self.dataset, self.count = dataset, min(count, len(dataset))
        self.classes, self.task = dataset.classes, dataset.task

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.count:
            raise IndexError(f"index={index}: there are {self.count} examples")
        return self.dataset[index]

    def annotation(self, index: int) -> Example:
        """The example, without its image where the reader can do that."""
        return annotation(self.dataset, index)


def annotation(dataset, index: int) -> Example:
    """An example of a data set, without opening the image where the reader can do that."""
    return dataset.annotation(index) if hasattr(dataset, "annotation") else dataset[index]
