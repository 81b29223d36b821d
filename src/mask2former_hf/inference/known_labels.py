"""What published checkpoints do not say about themselves: their task, and which of their labels are stuff."""

import json
import re
from functools import cache
from importlib import resources

# Class sets of the published checkpoints. Semantic and panoptic sets of one data set agree on what is stuff.
SETS = ("coco-panoptic", "ade20k-semantic", "cityscapes-semantic", "mapillary-semantic", "mapillary-panoptic")
SHARE = 0.8  # of the names that must agree: spellings differ ("window" and "windowpane"), data sets far more
# facebook/mask2former-swin-tiny-coco-panoptic and alike
_NAMED_TASK = re.compile(r"mask2former-.*-(semantic|instance|panoptic)/?$", re.IGNORECASE)


def task_of(config) -> str:
    """What a checkpoint is for: its field `task`; else the end of a published name; else by its labels.

    Labels decide so: without stuff it is `"instance"`, otherwise `"panoptic"`, which is also stock's choice.

    Args:
        config: a `Mask2FormerConfig`, ours or transformers'.
    """
    task = getattr(config, "task", None)
    if task is not None:
        return task
    named = _NAMED_TASK.search(str(getattr(config, "_name_or_path", "")))
    if named:
        return named[1].lower()
    return "instance" if stuff_of(config) == [] else "panoptic"


def stuff_of(config) -> list[int] | None:
    """Labels that are stuff: the field `stuff_label_ids`, else those of a known label set; `None` if unknown.

    Known are COCO panoptic (133 labels) and instances (80), ADE20K (150), Cityscapes (19) and Mapillary Vistas (65 or
    66), by the number of labels and their names in order.
    """
    stuff = getattr(config, "stuff_label_ids", None)
    if stuff is not None:
        return sorted(int(label) for label in stuff)
    names = [_plain(config.id2label[label]) for label in sorted(config.id2label)]
    for known, things in _known_sets():
        same = sum(ours == theirs for ours, theirs in zip(names, known, strict=False))
        if len(names) == len(known) and same >= SHARE * len(known):
            return [label for label, isthing in enumerate(things) if not isthing]
    return None


@cache
def _known_sets() -> list[tuple[list[str], list[bool]]]:
    folder = resources.files("mask2former_hf") / "data" / "class_sets"
    sets = []
    for name in (*SETS, "coco-instance", "cityscapes-instance"):
        rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["classes"]
        sets.append(([_plain(label) for _, label, _ in rows], [bool(isthing) for _, _, isthing in rows]))
    return sets


def _plain(name: str) -> str:
    """Letters of the first synonym: "Road, route" and "road" are equal, as are "wall-other-merged" and "wall"."""
    first = re.sub(r"-(other|merged|stuff)\b", "", str(name).lower().split(",")[0])
    return re.sub(r"[^a-z0-9]", "", first)
