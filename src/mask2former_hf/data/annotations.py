"""From what files say to an example without image: its map of segment ids and its segments."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .classes import BACKGROUND_ID, ClassTable, count_ids
from .example import Example
from .rle import read_counts, read_polygons

MAX_LABEL = 65535  # of a 16-bit map
_UNDECLARED = -1


def label_lookup(classes: ClassTable) -> np.ndarray:
    """(65536,) int32: label of a semantic map -> segment id (index + 1), 0 for ignored ones."""
    lookup = np.full(MAX_LABEL + 1, _UNDECLARED, dtype=np.int32)
    declared = [*(row.id for row in classes.rows), *classes.ignored, *(original for original, _ in classes.aliases)]
    for original in declared:
        if not 0 <= original <= MAX_LABEL:
            raise ValueError(f"label {original}: a map of labels holds 0 to {MAX_LABEL}; remove it from the labels")
        index = classes.to_index(original)
        lookup[original] = 0 if index is None else index + 1
    return lookup


def semantic_annotation(labels: np.ndarray, lookup: np.ndarray, classes: ClassTable, where, **names) -> Example:
    """A map of labels -> one segment per class that occurs, with id index + 1; ignored labels become 0.

    Args:
        labels: (H, W) integers.
        lookup: of `label_lookup(classes)`.
        where: file or row, for errors.
        names: `image_id` and `file_name` of the example.

    Raises:
        ValueError: lists the labels that are not declared.
    """
    if labels.dtype.itemsize > 2 or labels.dtype.kind == "i":
        known = np.where((labels >= 0) & (labels <= MAX_LABEL), lookup[labels.clip(0, MAX_LABEL)], _UNDECLARED)
    else:
        known = lookup[labels]
    areas = np.bincount(known.ravel() + 1, minlength=len(classes) + 2)  # undeclared, void, first class, ...
    if areas[0]:
        raise ValueError(
            f"{where}: has the labels {np.unique(labels[known == _UNDECLARED]).tolist()} that are not declared; give "
            f"each a name or IGNORE in the map of labels, such as {{255: IGNORE}}. {classes}"
        )
    segments = [_segment(classes, index + 1, index, 0, int(areas[index + 2])) for index in range(len(classes))]
    return Example(None, known, [segment for segment in segments if segment["area"]], **names)


def panoptic_annotation(ids: np.ndarray, segments: Iterable[Mapping], classes: ClassTable, where, **names) -> Example:
    """A map of segment ids and COCO's `segments_info`, with original category ids.

    Args:
        ids: (H, W) int32, 0 is void.
        segments: `id`, `category_id` and optionally `iscrowd` of each; a category that the table ignores becomes void.
        where: file or row, for errors.
        names: `image_id` and `file_name` of the example.

    Raises:
        ValueError: for ids that only the map or only the list has, ids that are listed twice, unknown categories.
    """
    area = dict(zip(*count_ids(ids), strict=True))
    area.pop(0, None)
    listed = [int(segment["id"]) for segment in segments]
    problems = {
        "ids {} in the map that segments_info does not describe": set(area) - set(listed),
        "ids {} in segments_info that the map does not have": set(listed) - set(area),
        "ids {} in segments_info twice": {number for number in listed if listed.count(number) > 1},
    }
    for problem, numbers in problems.items():
        if numbers:
            shown = f"{sorted(numbers)[:10]}{' ...' if len(numbers) > 10 else ''}"
            raise ValueError(f"{where}: {problem.format(shown)}; map and json must belong together, 0 is void")
    info, void = [], []
    for segment, number in zip(segments, listed, strict=True):
        index = _to_index(classes, segment["category_id"], where)
        if index is None:
            void.append(number)
        else:
            info.append(_segment(classes, number, index, int(segment.get("iscrowd") or 0), area[number]))
    if void:
        ids = np.where(np.isin(ids, void), 0, ids)
    return Example(None, ids, info, **names)


def instance_annotation(
    masks: Sequence[np.ndarray], objects: Iterable[Mapping], size, classes, where, **names
) -> Example:
    """Masks that may overlap -> numbered 1, 2, ... on as few layers as a greedy choice finds.

    Args:
        masks: (H, W) bool per object.
        objects: the annotations, `category_id` and optionally `iscrowd`, `area`, `bbox` and `id` (kept as
            `annotation_id`); without `area` it is that of the mask.
        size: (H, W).
        where: file or row, for errors.
        names: `image_id` and `file_name` of the example.
    """
    info = []
    for number, (mask, entry) in enumerate(zip(masks, objects, strict=True), 1):
        index = _to_index(classes, entry["category_id"], where)
        if index is None:
            raise ValueError(
                f"{where}: an object has the category {entry['category_id']!r}, which is ignored; leave the object out"
            )
        area = entry.get("area")
        segment = _segment(
            classes, number, index, int(entry.get("iscrowd") or 0), int(mask.sum()) if area is None else area
        )
        for key, name in (("bbox", "bbox"), ("id", "annotation_id")):
            if entry.get(key) is not None:
                segment[name] = entry[key]
        info.append(segment)
    return Example(None, stack_masks(masks, size), info, **names)


def stack_masks(masks: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Masks -> int32 maps in which mask k has the id k + 1 and lies complete on one layer.

    Largest first, each takes the first layer that is free there.

    Args:
        masks: (H, W) bool each.
        size: (H, W).

    Returns:
        (H, W), or (M, H, W) with M > 1 layers if masks overlap; `BACKGROUND_ID` where there is none.
    """
    layers = [np.full(size, BACKGROUND_ID, dtype=np.int32)]
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    for k in sorted(range(len(masks)), key=lambda k: -areas[k]):
        if not areas[k]:
            break
        rows, columns = (np.flatnonzero(masks[k].any(axis)) for axis in (1, 0))
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        mask = masks[k][window]
        for layer in layers:
            if (layer[window][mask] == BACKGROUND_ID).all():
                break
        else:
            layer = np.full(size, BACKGROUND_ID, dtype=np.int32)
            layers.append(layer)
        layer[window][mask] = k + 1
    return layers[0] if len(layers) == 1 else np.stack(layers)


def decode_mask(segmentation, size: tuple[int, int], where) -> np.ndarray:
    """(H, W) bool of COCO's polygons, compressed or uncompressed RLE.

    Args:
        segmentation: a list of polygons `[x, y, x, y, ...]`, or `{"size": [H, W], "counts"}` with counts as text or
            as a list of numbers, or a list of those; what is in a list is united.
        size: (H, W) of the image.
        where: for errors.

    Raises:
        ValueError: for anything else, and masks that do not fit the image.
    """
    H, W = size
    if isinstance(segmentation, Mapping):
        runs = read_counts(segmentation, where)
        if tuple(segmentation["size"]) != (H, W):
            raise ValueError(
                f"{where}: an RLE of size {list(segmentation['size'])} for an image of height and width {[H, W]}; "
                "they must be equal"
            )
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(W, H).T
    if isinstance(segmentation, list) and segmentation and all(isinstance(part, Mapping) for part in segmentation):
        return np.logical_or.reduce([decode_mask(part, size, where) for part in segmentation])
    # pycocotools takes 4 numbers for a box; one or two points enclose nothing
    polygons = [polygon for polygon in read_polygons(segmentation, size, where) if len(polygon) >= 6]
    if not polygons:
        return np.zeros((H, W), dtype=bool)
    try:
        from pycocotools import mask as tools
    except ImportError as error:
        raise ImportError("COCO's polygons are drawn with pycocotools: pip install pycocotools") from error
    return tools.decode(tools.merge(tools.frPyObjects(polygons, H, W))).astype(bool)


def _to_index(classes: ClassTable, category, where) -> int | None:
    try:
        return classes.to_index(category)
    except ValueError as error:
        raise ValueError(f"{where}: category_id {error}") from None


def _segment(classes: ClassTable, number: int, index: int, iscrowd: int, area) -> dict:
    isthing = int(classes.rows[index].isthing)
    return {"id": number, "category_id": index, "isthing": isthing, "iscrowd": iscrowd, "area": area}
