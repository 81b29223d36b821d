"""Kinds of annotations of images and of videos, a table each, and readers of a split that settings describe."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .coco import CocoInstances, CocoPanoptic
from .colour_maps import ColourMaps
from .folders import InstanceMaps, LabelMaps
from .held_out import Part, hold_out
from .hub_dataset import HubDataset
from .moving_scenes import MovingScenes
from .reader import Reader
from .recognise_tools import BESIDE_IMAGES, WITH_IMAGES
from .scenes import HELD_OUT_SEED, Scenes
from .videos import DavisFolders, VideoReader, YoutubeVis
from .yolo import YoloSegments

# What a split has; a setting is called <split>_<name>, or <name> where there is one split.
OF_A_SPLIT = {
    "images": "folder of the images, or YOLO's list of them",
    "annotations": "json of COCO or Label Studio, Parquet table, or folder of YOLO's, labelme's or GeoJSON files",
    "maps": "folder of the PNGs: panoptic ids, labels, instance ids or colours",
    "split": "split of the Hub data set",
    "limit": "use only the first so many examples",
}
# What all splits share.
SHARED = (
    "classes",
    "image_suffix",
    "map_suffix",
    "divisor",
    "dataset",
    "image_column",
    "label_column",
    "segments_info_column",
    "objects_column",
)


@dataclass(frozen=True)
class Kind:
    """A kind of annotations.

    Args:
        needs: options, of `OF_A_SPLIT` and `SHARED`, without which there is nothing to read.
        takes: further ones that it understands; every kind takes `limit`.
        read: from the options (None where one was not given) and the name of the split ("" for the only one) to a
            reader.
        task: what its examples are annotated for; None if the options decide.
        packages: that it needs besides those of the package itself -> what for.
    """

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[Mapping, str], Reader | VideoReader]
    task: str | None
    packages: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """What it needs of each split."""
        return [name for name in self.needs if name in OF_A_SPLIT]


def _hub(options: Mapping, split: str) -> HubDataset:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data=hub needs the package datasets: pip install datasets") from error
    usual = "train" if split == "train" else "validation"
    return HubDataset(
        datasets.load_dataset(options["dataset"], split=options["split"] or usual),
        options["classes"],
        image=options["image_column"] or "image",
        label=options["label_column"],
        segments_info=options["segments_info_column"],
        objects=options["objects_column"],
        folder=options["dataset"] if Path(options["dataset"]).is_dir() else None,
    )


def _suffixes(options: Mapping) -> dict[str, str]:
    return {name: options[name] or "" for name in ("image_suffix", "map_suffix")}


KINDS = {
    "coco-panoptic": Kind(
        ("images", "annotations", "maps"),
        ("classes",),
        lambda o, split: CocoPanoptic(o["images"], o["annotations"], o["maps"], o["classes"]),
        "panoptic",
    ),
    "coco-instances": Kind(
        ("images", "annotations"),
        ("classes",),
        lambda o, split: CocoInstances(o["images"], o["annotations"], o["classes"], skip_empty=split == "train"),
        "instance",
        {"pycocotools": "polygons"},
    ),
    "label-maps": Kind(
        ("images", "maps", "classes"),
        ("image_suffix", "map_suffix"),
        lambda o, split: LabelMaps(o["images"], o["maps"], o["classes"], **_suffixes(o)),
        "semantic",
    ),
    "instance-maps": Kind(
        ("images", "maps", "classes"),
        ("image_suffix", "map_suffix", "divisor"),
        lambda o, split: InstanceMaps(o["images"], o["maps"], o["classes"], divisor=o["divisor"], **_suffixes(o)),
        "instance",
    ),
    "colour-maps": Kind(
        ("images", "maps", "classes"),
        ("image_suffix", "map_suffix"),
        lambda o, split: ColourMaps(o["images"], o["maps"], o["classes"], **_suffixes(o)),
        "semantic",
    ),
    "yolo": Kind(
        ("images", "classes"),
        ("annotations",),
        lambda o, split: YoloSegments(o["images"], o["annotations"], o["classes"]),
        "instance",
    ),
    **{
        name: Kind(
            ("annotations",),
            ("images", "classes"),
            lambda o, split, reader=reader: reader(o["annotations"], o["images"], o["classes"]),
            "instance",
        )
        for name, reader in BESIDE_IMAGES.items()
    },
    **{
        name: Kind(
            ("images", "annotations"),
            ("classes",),
            lambda o, split, reader=reader: reader(o["images"], o["annotations"], o["classes"]),
            "instance",
            {"pyarrow": "data=parquet"} if name == "parquet" else {},
        )
        for name, reader in WITH_IMAGES.items()
    },
    "hub": Kind(
        ("dataset", "classes"),
        ("split", "image_column", "label_column", "segments_info_column", "objects_column"),
        _hub,
        None,
        {"datasets": "data=hub"},
    ),
    "scenes": Kind((), (), lambda o, split: Scenes(split), "panoptic"),
}
VIDEO_KINDS = {
    "youtube-vis": Kind(
        ("images", "annotations"),
        ("classes",),
        lambda o, split: YoutubeVis(o["images"], o["annotations"], o["classes"]),
        "instance",
        {"pycocotools": "polygons"},
    ),
    "davis": Kind(("images", "maps"), (), lambda o, split: DavisFolders(o["images"], o["maps"]), "instance"),
    "moving-scenes": Kind((), (), lambda o, split: _moving_scenes(split), "instance"),
    "moving-scenes-panoptic": Kind((), (), lambda o, split: _moving_scenes(split, stuff=True), "panoptic"),
}


def _moving_scenes(split: str, stuff: bool = False) -> MovingScenes:
    return MovingScenes(2000, stuff=stuff) if split == "train" else MovingScenes(40, seed=HELD_OUT_SEED, stuff=stuff)


def load_split(settings, split: str = "", kinds: Mapping[str, Kind] = KINDS) -> Reader | VideoReader:
    """A reader of a split of the data set that settings describe.

    Args:
        settings: has `data` (a kind of `kinds`), `classes` in any form of `class_table`, the others of `SHARED`, and
            what `OF_A_SPLIT` lists.
        split: prefix of the latter, "train", "val" or any other; "" for none.
        kinds: `KINDS`, or `VIDEO_KINDS`.

    Raises:
        ValueError, OSError: for missing settings, for those that the kind does not take, and for what the reader finds
            wrong with the files.
        ImportError: for a package that the kind needs.
    """
    prefix = f"{split}_" if split else ""
    options = {name: getattr(settings, prefix + name) for name in OF_A_SPLIT}
    options |= {name: getattr(settings, name) for name in SHARED}
    _check_options(kinds, settings.data, options, prefix)
    limit = options["limit"]
    try:
        dataset = kinds[settings.data].read(options, split)
    except (OSError, ValueError) as error:
        kind_of_error = OSError if isinstance(error, OSError) else ValueError
        raise kind_of_error(f"{split or 'data'}: {error}") from error
    if limit is not None:
        dataset = Part(dataset, range(min(limit, len(dataset))))
    if not len(dataset):
        raise ValueError(f"{split or 'data'} has no examples")
    return dataset


def _check_options(kinds: Mapping[str, Kind], kind: str | None, options: Mapping, prefix: str):
    """Refuse a kind that does not exist, options that it needs and lacks, and options that it would not look at."""
    if kind not in kinds:
        problem = "data= is missing" if kind is None else f"data={kind}: no such kind"
        if kind in (KINDS | VIDEO_KINDS):
            problem = f"data={kind}: is of {'videos' if kind in VIDEO_KINDS else 'images'}, which are not taken here"
        raise ValueError(f"{problem}; choose one of {', '.join(kinds)}")
    own = kinds[kind]
    called = {name: f"{prefix}{name}=" if name in OF_A_SPLIT else f"{name}=" for name in options}
    if missing := [called[name] for name in own.needs if not options[name]]:
        raise ValueError(f"data={kind} needs {', '.join(missing)}")
    known = (*own.needs, *own.takes, "limit")
    if useless := [called[name] for name, value in options.items() if value is not None and name not in known]:
        raise ValueError(
            f"data={kind} does not take {', '.join(useless)}: it takes {', '.join(called[name] for name in known)}; "
            "leave the others out, or choose another kind"
        )
    if options["limit"] is not None and options["limit"] < 1:
        raise ValueError(f"{called['limit']}{options['limit']}: must be at least 1")


def load_both(settings, kinds: Mapping[str, Kind] = KINDS) -> tuple[Reader, Reader, str]:
    """The readers of train and val, with one table of classes, and in words what was held out ("" for nothing).

    COCO jsons that list different classes of one numbering are read with all of them. Files without anything to
    measure on are divided.

    Args:
        settings: as in `load_split`, a dataclass, with `held_out` and `seed` of `held_out.hold_out`.
        kinds: `KINDS`, or `VIDEO_KINDS`.

    Raises:
        ValueError: also if the classes of the two contradict each other.
    """
    paths = kinds[settings.data].paths if settings.data in kinds else []
    if paths and not any(getattr(settings, f"val_{name}") for name in paths):
        whole = load_split(replace(settings, train_limit=None), "train", kinds)
        train, val, text = hold_out(whole, settings.held_out, settings.seed)
        parts = [(train, settings.train_limit), (val, settings.val_limit)]
        train, val = (part if most is None else Part(part, range(min(most, len(part)))) for part, most in parts)
        return train, val, text
    train, val = (load_split(settings, split, kinds) for split in ("train", "val"))
    if train.classes.id2label != val.classes.id2label and settings.classes is None:
        classes = train.classes.merge(val.classes, "train", "val")
        settings = replace(settings, classes=classes)
        train, val = (load_split(settings, split, kinds) for split in ("train", "val"))
    return train, val, ""
