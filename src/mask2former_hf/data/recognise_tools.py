"""What annotation tools export, recognised by its files: YOLO, labelme, GeoJSON, Label Studio, tables of segments."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from .fields import FILE_NAME
from .geojson import GeoJsonFiles
from .label_studio import LabelStudioTasks, file_name_of, is_export
from .labelme import LabelmeFiles
from .parquet import ParquetRows, read_rows
from .text_files import read_json, read_yaml
from .yolo import LIST_ENDING, labels_of

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation")}
BESIDE_IMAGES = {"labelme": LabelmeFiles, "geojson": GeoJsonFiles}
WITH_IMAGES = {"label-studio": LabelStudioTasks, "parquet": ParquetRows}
TOOL_KINDS = ("yolo", *BESIDE_IMAGES, *WITH_IMAGES)
MOST_JSONS = 20  # of a folder, of which each may be an export of many images; a folder with more has one per image

Files = dict[Path, list[str]]
SplitOf = Callable[..., str | None]


def recognise_tools(folder: Path, files: Files, kind: str | None, split_of: SplitOf) -> dict:
    """Settings for the first of the tools' formats that lies in a folder; nothing if none does.

    Args:
        files: of each folder.
        kind: of `TOOL_KINDS`, if it is known.
        split_of: the split that the words of a path name.
    """
    if kind in (None, "yolo") and (found := _yolo(files)):
        return found
    for name in (*BESIDE_IMAGES, *WITH_IMAGES):
        if kind not in (None, name):
            continue
        search = _beside_images if name in BESIDE_IMAGES else _with_images
        if found := search(name, folder, files, split_of):
            return {"data": name, **found, "classes": _classes(name, folder, files, found)}
    return {}


def _yolo(files: Files) -> dict:
    """By the `data.yaml` nearest to the top."""
    for place in sorted(files, key=lambda place: len(place.parts)):
        for name in [name for name in DATA_FILES if name in files[place]]:
            try:
                content = read_yaml(place / name)
            except (OSError, ValueError):
                continue
            if isinstance(content, dict) and "names" in content and (found := _yolo_splits(place, content)):
                return {"data": "yolo", **found, "classes": str(place / name)}
    return {}


def _yolo_splits(place: Path, content: dict) -> dict:
    found = {}
    for split, keys in SPLITS.items():
        given = next((content[key] for key in keys if content.get(key)), None)
        images = _yolo_images(place, content.get("path"), given)
        if images is not None and images != found.get("train_images"):  # one for both: nothing to measure on
            found[f"{split}_images"] = images
            if images.suffix != LIST_ENDING:
                found[f"{split}_annotations"] = labels_of(images)
    return found if "train_images" in found else {}


def _yolo_images(place: Path, root, given) -> Path | None:
    """A folder of images or a list of their files: from the root that data.yaml names, from its own folder, or as
    Roboflow "../train/images"."""
    try:
        given, root = FILE_NAME.convert(given), FILE_NAME.convert(root or ".")
    except ValueError:
        return None
    candidates = [place / root / given, place / given, place / given.removeprefix("../")]
    found = (path for path in candidates if path.is_dir() or (path.suffix == LIST_ENDING and path.is_file()))
    return next((Path(os.path.normpath(path)) for path in found), None)


def _beside_images(kind: str, folder: Path, files: Files, split_of: SplitOf) -> dict:
    """The topmost folders with a file per image."""
    found = {}
    ending, holds = (".json", _is_labelme) if kind == "labelme" else (".geojson", _is_geojson)
    for place in sorted(files, key=lambda place: len(place.parts)):
        names = [name for name in files[place] if name.endswith(ending)]
        split = split_of(*place.relative_to(folder).parts)
        inside = any(place.is_relative_to(taken) for taken in found.values())
        if split is None or inside or not any(holds(_json(place / name)) for name in {*names[:1], *names[-1:]}):
            continue
        found.setdefault(f"{split}_annotations", place)
    return found


def _with_images(kind: str, folder: Path, files: Files, split_of: SplitOf) -> dict:
    """Files that each tell of many images, and the folder of these."""
    found = {}
    ending, image_of = (".json", _label_studio_image) if kind == "label-studio" else (".parquet", _parquet_image)
    for place in sorted(files, key=lambda place: len(place.parts)):
        names = [name for name in files[place] if name.endswith(ending)]
        for name in names if len(names) <= MOST_JSONS else ():
            split = split_of(*(place / name).relative_to(folder).parts)
            if split is None or f"{split}_annotations" in found:
                continue
            image = image_of(place / name)
            images = None if image is None else _folder_of(files, image, split, split_of)
            if images is not None:
                found |= {f"{split}_annotations": place / name, f"{split}_images": images}
    return found


def _folder_of(files: Files, image: str, split: str, split_of: SplitOf) -> Path | None:
    """The folder that has an image, or a file that its path ends in; one that names the split first."""
    parts = PurePosixPath(image).parts
    for first in range(len(parts)):
        having = [place for place in files if (place / Path(*parts[first:])).is_file()]
        if having:
            return min(having, key=lambda place: (split_of(*place.parts[-2:]) != split, len(place.parts)))
    return None


def _classes(kind: str, folder: Path, files: Files, found: dict) -> str | list[str]:
    """A file of them, or all labels of all splits, by the alphabet."""
    if "classes.json" in files[folder]:
        return str(folder / "classes.json")
    names = set()
    for split in SPLITS:
        annotations, images = found.get(f"{split}_annotations"), found.get(f"{split}_images")
        if annotations is not None:
            reader = BESIDE_IMAGES[kind](annotations) if images is None else WITH_IMAGES[kind](images, annotations)
            names |= set(reader.classes.id2label.values())
    return sorted(names)


def _json(path: Path):
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _is_labelme(content) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def _is_geojson(content) -> bool:
    return isinstance(content, dict) and content.get("type") == "FeatureCollection"


def _label_studio_image(path: Path) -> str | None:
    content = _json(path)
    return file_name_of(content[0]["data"], path) if is_export(content) else None


def _parquet_image(path: Path) -> str | None:
    try:
        return next((row["file_name"] for row in read_rows(path, most=1)), None)
    except (ImportError, OSError, ValueError):
        return None
