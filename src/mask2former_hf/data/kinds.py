"""Kinds of annotations by name, and readers of a split that settings describe."""

from dataclasses import replace
from pathlib import Path

from .coco import CocoInstances, CocoPanoptic
from .colour_maps import ColourMaps
from .folders import InstanceMaps, LabelMaps
from .held_out import Part, hold_out
from .hub_dataset import HubDataset
from .recognise_tools import BESIDE_IMAGES, WITH_IMAGES
from .scenes import Scenes
from .yolo import YoloSegments, labels_of

NEEDED = {  # kind -> the paths of a split that it reads
    "coco-panoptic": ("images", "annotations", "maps"),
    "coco-instances": ("images", "annotations"),
    "label-maps": ("images", "maps"),
    "instance-maps": ("images", "maps"),
    "colour-maps": ("images", "maps"),
    "yolo": ("images",),
    "labelme": ("annotations",),
    "geojson": ("annotations",),
    "label-studio": ("images", "annotations"),
    "parquet": ("images", "annotations"),
    "hub": (),
    "scenes": (),
}
# What a split has; a setting is called <split>_<name>, or <name> where there is one split.
OF_A_SPLIT = {
    "images": "folder of the images",
    "annotations": "json of COCO or Label Studio, Parquet table, or folder of YOLO's, labelme's or GeoJSON files",
    "maps": "folder of the PNGs: panoptic ids, labels, instance ids or colours",
    "split": "split of the Hub data set",
    "limit": "use only the first so many examples",
}


def load_split(settings, split: str = ""):
    """A reader of a split of the data set that settings describe.

    Args:
        settings: has `data` (a kind of `NEEDED`), `classes` in any form of `class_table`, `image_suffix`,
            `map_suffix`, `divisor`, `dataset`, `image_column`, `label_column`, `segments_info_column`,
            `objects_column`, and what `OF_A_SPLIT` lists.
        split: prefix of the latter, "train", "val" or any other; "" for none.

    Raises:
        ValueError, OSError: for missing settings, and for what the reader finds wrong with the files.
        ImportError: for a package that the kind needs.
    """
    kind, prefix = settings.data, f"{split}_" if split else ""
    if kind not in NEEDED:
        problem = "data= is missing" if kind is None else f"data={kind}: no such kind"
        raise ValueError(f"{problem}; choose one of {', '.join(NEEDED)}")
    paths = {name: getattr(settings, prefix + name) for name in OF_A_SPLIT}
    if missing := [f"{prefix}{name}=" for name in NEEDED[kind] if not paths[name]]:
        raise ValueError(f"data={kind} needs {', '.join(missing)}")
    if paths["limit"] is not None and paths["limit"] < 1:
        raise ValueError(f"{prefix}limit={paths['limit']}: must be at least 1")
    try:
        dataset = _read(kind, paths, settings, split)
    except (OSError, ValueError) as error:
        kind_of_error = OSError if isinstance(error, OSError) else ValueError
        raise kind_of_error(f"{split or 'data'}: {error}") from error
    if paths["limit"] is not None:
        dataset = Part(dataset, range(min(paths["limit"], len(dataset))))
    if not len(dataset):
        raise ValueError(f"{split or 'data'} has no examples")
    return dataset


def load_both(settings):
    """The readers of train and val, with one table of classes, and in words what was held out ("" for nothing).

    COCO jsons that list different classes of one numbering are read with all of them. Files without anything to
    measure on are divided.

    Args:
        settings: as in `load_split`, a dataclass, with `held_out` and `seed` of `held_out.hold_out`.

    Raises:
        ValueError: also if the classes of the two contradict each other.
    """
    if NEEDED.get(settings.data) and not any(getattr(settings, f"val_{name}") for name in NEEDED[settings.data]):
        whole = load_split(replace(settings, train_limit=None), "train")
        train, val, text = hold_out(whole, settings.held_out, settings.seed)
        parts = [(train, settings.train_limit), (val, settings.val_limit)]
        train, val = (part if most is None else Part(part, range(min(most, len(part)))) for part, most in parts)
        return train, val, text
    train, val = load_split(settings, "train"), load_split(settings, "val")
    if train.classes.id2label != val.classes.id2label and settings.classes is None:
        classes = train.classes.merge(val.classes, "train", "val")
        settings = replace(settings, classes=classes)
        train, val = load_split(settings, "train"), load_split(settings, "val")
    return train, val, ""


def _read(kind: str, paths: dict, settings, split: str):
    classes = settings.classes
    suffixes = {"image_suffix": settings.image_suffix or "", "map_suffix": settings.map_suffix or ""}
    if kind == "coco-panoptic":
        return CocoPanoptic(paths["images"], paths["annotations"], paths["maps"], classes)
    if kind == "coco-instances":
        return CocoInstances(paths["images"], paths["annotations"], classes, skip_empty=split == "train")
    if kind in BESIDE_IMAGES:
        return BESIDE_IMAGES[kind](paths["annotations"], paths["images"], classes)
    if kind in WITH_IMAGES:
        return WITH_IMAGES[kind](paths["images"], paths["annotations"], classes)
    if kind == "scenes":
        return Scenes(split)
    if classes is None:
        raise ValueError(f"data={kind} needs classes=")
    if kind == "label-maps":
        return LabelMaps(paths["images"], paths["maps"], classes, **suffixes)
    if kind == "colour-maps":
        return ColourMaps(paths["images"], paths["maps"], classes, **suffixes)
    if kind == "yolo":
        return YoloSegments(paths["images"], paths["annotations"] or labels_of(Path(paths["images"])), classes)
    if kind == "instance-maps":
        return InstanceMaps(paths["images"], paths["maps"], classes, divisor=settings.divisor, **suffixes)
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data=hub needs the package datasets: pip install datasets") from error
    if not settings.dataset:
        raise ValueError("data=hub needs dataset=")
    usual = "train" if split == "train" else "validation"
    return HubDataset(
        datasets.load_dataset(settings.dataset, split=paths["split"] or usual),
        classes,
        image=settings.image_column or "image",
        label=settings.label_column,
        segments_info=settings.segments_info_column,
        objects=settings.objects_column,
        folder=settings.dataset if Path(settings.dataset).is_dir() else None,
    )
