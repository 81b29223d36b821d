"""What kind of data lies in a folder, and where its splits are: the settings that a person would have typed."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from .coco_json import MASK
from .colour_maps import COLOUR_FILES, is_colour_map, read_colours
from .fields import FILE_NAME, ID, LIST, read_entry
from .images import IMAGE_SUFFIXES, MAP_SUFFIXES
from .recognise_tools import TOOL_KINDS, recognise_tools
from .text_files import read_json

TRAIN, VAL = ("train", "training"), ("val", "valid", "validation")
MAP_WORDS = ("label", "mask", "annotation", "map", "gt", "seg", "instance", "panoptic", "truth", "target")
CLASS_FILES = ("classes.json", "classes.txt", "classes.yaml", "labels.json", "labels.txt", "categories.json")
DEPTH = 4  # of folders that are looked into
_IMAGE = {"file_name": FILE_NAME}
_ANNOTATION = {
    "image_id": ID.optional(),
    "segments_info": LIST.optional(),
    "segmentation": MASK.optional(),
    "file_name": FILE_NAME.optional(),
}


def recognise(folder: str | Path, kind: str | None = None) -> dict:
    """Settings for the data in a folder: `data`, the paths of the splits, and `classes` where a file has them.

    Recognised are COCO's panoptic and instance jsons, whose images and PNGs are looked for by their names; what
    annotation tools export (`recognise_tools`); and folders of images beside folders of maps with equal file names. A
    split is named by a word such as "train" or "val" in a path; what names none is to train on.

    Args:
        kind: of `data.kinds.KINDS`, if it is known.

    Raises:
        FileNotFoundError: for no such folder.
        ValueError: if nothing is recognised, with what was looked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of data")
    files = files_by_folder(folder)
    found = {}
    if kind in (None, "coco-panoptic", "coco-instances"):
        found = _coco(folder, files, kind)
    if not found and kind in (None, *TOOL_KINDS):
        found = recognise_tools(folder, files, kind, split_of)
    if not found and kind in (None, "label-maps", "instance-maps", "colour-maps"):
        found = _maps(folder, files, kind)
    if not found:
        raise ValueError(
            f"{folder}: no {kind or 'annotations'} recognised. Looked for COCO jsons with their images, for "
            f"{', '.join(TOOL_KINDS)}, and for folders of images beside folders of maps with equal file names, called "
            f"such as {', '.join(MAP_WORDS[:4])}; name them by data=, train_images= and so on"
        )
    if not any(name.startswith("train_") for name in found):
        raise ValueError(f"{folder}: has only a split to measure on; name what is to be trained on by train_images=")
    return found


def files_by_folder(folder: Path) -> dict[Path, list[str]]:
    """Folder -> its files, hidden ones left out."""
    found = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        deep = len(Path(parent).relative_to(folder).parts) >= DEPTH
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        found[Path(parent)] = sorted(name for name in names if not name.startswith("."))
    return found


def split_of(*parts: str) -> str | None:
    """The split that the words of a path name; None for one that is neither to train nor to measure on."""
    words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
    if any(word in VAL for word in words):
        return "val"
    return None if "test" in words and not any(word in TRAIN for word in words) else "train"


def _coco(root: Path, files: dict[Path, list[str]], kind: str | None) -> dict:
    jsons = [folder / name for folder, names in files.items() for name in names if name.endswith(".json")]
    described = [(path, *_coco_kind(path)) for path in sorted(jsons, key=lambda path: (len(path.name), str(path)))]
    for wanted in ("coco-panoptic", "coco-instances") if kind is None else (kind,):
        found = {}
        for path, its_kind, image, png in described:
            split = split_of(*path.relative_to(root).parts)
            if its_kind != wanted or split is None or f"{split}_annotations" in found:
                continue
            images = _folder_with(files, image, split)
            maps = None if png is None else _folder_with(files, png, split, maps=True)
            if images is None or (maps is None and wanted == "coco-panoptic"):
                continue
            found |= {"data": wanted, f"{split}_annotations": path, f"{split}_images": images}
            found |= {f"{split}_maps": maps} if wanted == "coco-panoptic" else {}
        if found:
            return found
    return {}


def _coco_kind(path: Path):
    """(kind, file name of an image, file name of its panoptic map) of a COCO json; three times None for others."""
    try:
        data = read_json(path)
        first = [data[name][0] for name in ("images", "annotations")]
        image = read_entry(first[0], _IMAGE, str(path))["file_name"]
        annotation = read_entry(first[1], _ANNOTATION, str(path))
        if "segments_info" not in annotation:
            return ("coco-instances", image, None) if "segmentation" in annotation else (None, None, None)
        entries = [entry for entry in data["images"] if isinstance(entry, dict)]
        named = [entry.get("file_name") for entry in entries if entry.get("id") == annotation.get("image_id")]
        image = read_entry({"file_name": (named or [image])[0]}, _IMAGE, str(path))["file_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return None, None, None
    return "coco-panoptic", image, annotation.get("file_name") or f"{os.path.splitext(image)[0]}.png"


def _folder_with(files: dict[Path, list[str]], name: str, split: str, maps: bool = False) -> Path | None:
    """The folder that has a file: first one that names the split, then one that is called like maps, or is not."""

    def strangeness(folder: Path):
        called = any(word in part.lower() for part in folder.parts[-2:] for word in MAP_WORDS)
        return split_of(*folder.parts[-2:]) != split, called != maps, len(folder.parts)

    return min((folder for folder in files if (folder / name).is_file()), key=strangeness, default=None)


def _maps(folder: Path, files: dict[Path, list[str]], kind: str | None) -> dict:
    """Pairs of folders with equal file names, of which one is called like maps; colours need a file that has them."""
    colours = [str(folder / name) for name in COLOUR_FILES if name in files[folder] and _has_colours(folder / name)]
    stems = {place: _stems(names, IMAGE_SUFFIXES) for place, names in files.items()}
    stems = {place: found for place, found in stems.items() if found}
    found = {}
    for maps in stems:
        split = split_of(*maps.relative_to(folder).parts)
        called = [word for word in MAP_WORDS if any(word in part.lower() for part in maps.relative_to(folder).parts)]
        if not called or split is None or f"{split}_maps" in found:
            continue
        in_colour = _are_colours(maps, files[maps], named=bool(colours) or kind == "colour-maps")
        if not in_colour and not _are_maps(maps, files[maps]):
            continue
        names = stems[maps]
        images = [place for place, others in stems.items() if place != maps and others >= names]
        images = [place for place in images if split_of(*place.relative_to(folder).parts) == split]
        if not images:
            continue
        implied = "colour-maps" if in_colour else "instance-maps" if "instance" in called else "label-maps"
        if (kind or found.get("data", implied)) != implied and kind is None:
            continue
        found |= {"data": kind or implied, f"{split}_images": images[0], f"{split}_maps": maps}
    if found.get("data") == "colour-maps" and colours:
        return found | {"classes": colours[0]}
    for name in CLASS_FILES if found else ():
        if (folder / name).is_file():
            return found | {"classes": str(folder / name)}
    return found


def _stems(names: Iterable[str], endings: tuple[str, ...]) -> set[str]:
    return {os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in endings}


def _are_maps(folder: Path, names: list[str]) -> bool:
    """Whether the first picture has one channel of a lossless format."""
    for name in names:
        if os.path.splitext(name)[1].lower() in MAP_SUFFIXES:
            try:
                with Image.open(folder / name) as image:
                    return len(image.getbands()) == 1
            except OSError:
                return False
    return False


def _has_colours(path: Path) -> bool:
    try:
        return read_colours(path) is not None
    except ValueError:
        return False


def _are_colours(folder: Path, names: list[str], named: bool) -> bool:
    """Whether the first picture is in colours, where a file says which class a colour is."""
    pictures = [name for name in names if os.path.splitext(name)[1].lower() in MAP_SUFFIXES]
    return named and bool(pictures) and is_colour_map(folder / pictures[0])
