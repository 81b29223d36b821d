"""The annotations of an example in the forms that the metrics take."""

import numpy as np

from ..data.example import Example
from ..data.rle import coco_code
from ..data.runs import NOTHING, joined, runs_of_map


def single_map(example: Example, metric: str) -> np.ndarray:
    """The (H, W) map of an example without overlaps, background as void."""
    if len(example.layers) != 1:
        raise ValueError(f"{example.name} has overlapping segments: {metric} is not defined for them; measure 'ap'")
    return np.maximum(example.layers[0], 0)


def label_map(example: Example, ignore_index: int) -> np.ndarray:
    """(H, W) class of each pixel, `ignore_index` where there is none."""
    segmentation = single_map(example, "miou")
    table = np.full(int(segmentation.max(initial=0)) + 1, ignore_index, dtype=np.int64)
    for segment in example.segments:
        if segment["id"] < len(table):
            table[segment["id"]] = segment["category_id"]
    return table[segmentation]


def true_objects(example: Example, stuff: set[int]) -> list[dict]:
    """The things of an example as `AveragePrecision.update` takes them."""
    things = [segment for segment in example.segments if segment["category_id"] not in stuff]
    layers = [runs_of_map(layer) for layer in example.layers]
    return [
        {
            "category_id": segment["category_id"],
            "segmentation": coco_code(joined(*(layer.get(segment["id"], NOTHING) for layer in layers)), example.size),
            "iscrowd": segment.get("iscrowd", 0),
            **({"area": segment["area"]} if "area" in segment else {}),
        }
        for segment in things
    ]
