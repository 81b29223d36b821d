"""Why an annotation's ids are not those of its json or class table: shifted by one, or red and blue swapped."""

from pathlib import Path

import numpy as np

from .classes import ClassTable
from .coco import CocoPanoptic
from .colour_maps import ColourMaps
from .folders import FolderReader
from .images import read_map, read_panoptic_ids
from .text_files import read_json

BYTE = 0xFF


def explain(dataset, index: int) -> str | None:
    """The repair, if one of the usual mistakes explains why an example cannot be read; None if none does."""
    while hasattr(dataset, "indices"):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        if isinstance(dataset, CocoPanoptic):
            ids = np.unique(read_panoptic_ids(dataset.map_path(index)))
            return _explain_panoptic(ids, dataset.segment_ids(index))
        if isinstance(dataset, ColourMaps):
            return _explain_colours(np.unique(read_panoptic_ids(dataset.map_path(index))), dataset.colours)
        if isinstance(dataset, FolderReader):
            return _explain_labels(np.unique(read_map(dataset.map_path(index))), dataset.classes)
    except (OSError, ValueError):  # the map itself cannot be read, which was said
        return None
    return None


def swapped(ids: np.ndarray) -> np.ndarray:
    """Ids, red + 256 green + 65536 blue, with red and blue in each other's place."""
    return (ids >> 16 & BYTE) | (ids & BYTE << 8) | (ids & BYTE) << 16


def _explain_panoptic(ids: np.ndarray, listed: set[int]) -> str | None:
    if not set(ids[ids != 0].tolist()) <= listed and set(swapped(ids[ids != 0]).tolist()) <= listed:
        return (
            "red and blue of the PNGs are swapped, as OpenCV writes an RGB array: write them anew with Pillow, or "
            "with cv2.imwrite(path, array[..., ::-1])"
        )
    return None


def _explain_colours(codes: np.ndarray, colours: set[int]) -> str | None:
    if set(swapped(codes).tolist()) <= colours:
        return (
            "red and blue of the maps, or of the declared colours, are swapped, as OpenCV does: write the maps anew "
            "with Pillow, or declare the colours as [red, green, blue]"
        )
    return None


def _explain_labels(labels: np.ndarray, classes: ClassTable) -> str | None:
    unknown = [label for label in labels.tolist() if not classes.has(label)]
    declared = sorted(row.id for row in classes.rows)
    for shift, text in ((1, "begin with 1"), (-1, "begin with 0")):
        if unknown == [declared[-1] + 1] * (shift == 1) + [declared[0] - 1] * (shift == -1):
            return (
                f"the labels are off by one: those of the maps {text}, the names do not; name the classes from "
                f"{declared[0] + shift}"
            )
    return None


def explain_json(path: Path) -> str | None:
    """The repair for a COCO json that was refused because all its category ids are off by one; else None."""
    try:
        data = read_json(path)
        listed = {int(category["id"]) for category in data["categories"]}
        segments = [segment for entry in data["annotations"] for segment in entry.get("segments_info", [entry])]
        used = {int(segment["category_id"]) for segment in segments}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # what else is wrong with it was said
        return None
    for shift in (1, -1):
        if not used <= listed and {number - shift for number in used} <= listed:
            return (
                f"every category_id is off by {shift:+d} against the categories: number the categories from "
                f"{min(listed) + shift}, or the annotations from {min(listed)}"
            )
    return None
