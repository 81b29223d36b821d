"""What published checkpoints do not say about themselves: their task, and which of their labels are stuff."""

import json
import re
from functools import cache
from importlib import resources

from ..model.design_rules import classifies_pixels

SHARE = 0.8  # of the names that must agree: spellings differ ("window" and "windowpane"), data sets far more
# facebook/mask2former-swin-tiny-coco-panoptic and alike, also as a folder of the Hub's cache
_NAMED_TASK = re.compile(r"mask2former-[^/\\]*-(semantic|instance|panoptic)(?=[/\\]|$)", re.IGNORECASE)


def task_of(config) -> str:
    """What a checkpoint is for: `"semantic"` if it classifies pixels; its field `task`; else the end of a published
    name; else by its labels.

    Labels decide so: without stuff it is `"instance"`, otherwise `"panoptic"`, which is also stock's choice.

    Args:
        config: a `Mask2FormerConfig`, ours or transformers'.
    """
    if classifies_pixels(config):
        return "semantic"
    task = getattr(config, "task", None)
    if task is not None:
        return task
    named = named_task(config)
    if named is not None:
        return named
    return "instance" if stuff_of(config) == [] else "panoptic"


def named_task(config) -> str | None:
    """The task at the end of a published checkpoint's name; None for other names."""
    named = _NAMED_TASK.findall(str(getattr(config, "_name_or_path", "")))
    return named[-1].lower() if named else None


def window_of(config, task: str = "semantic") -> dict | None:
    """The sliding window that results of a task are averaged over, `{"side", "stride"}`; None for none.

    Args:
        config: a `Mask2FormerConfig`; transformers' has no such field.
    """
    return getattr(config, "sliding_window", None) if task == "semantic" else None


def stuff_of(config, processor=None) -> list[int] | None:
    """Labels that are stuff: the config's `stuff_label_ids`, else the processor's `label_ids_to_fuse`, else those of a
    known label set; `None` if unknown.

    Known are the class sets of `data/class_sets` (COCO, ADE20K, Cityscapes, Mapillary Vistas, YouTube-VIS), by the
    number of labels and their names in order.
    """
    stuff = getattr(config, "stuff_label_ids", None)
    if stuff is None:
        stuff = getattr(processor, "label_ids_to_fuse", None)
    if stuff is not None:
        return sorted(int(label) for label in stuff)
    names = [plain_name(config.id2label[label]) for label in sorted(config.id2label)]
    for known, things in _known_sets():
        same = sum(ours == theirs for ours, theirs in zip(names, known, strict=False))
        if len(names) == len(known) and same >= SHARE * len(known):
            return [label for label, isthing in enumerate(things) if not isthing]
    return None


@cache
def _known_sets() -> list[tuple[list[str], list[bool]]]:
    folder = resources.files("mask2former_hf") / "data" / "class_sets"
    sets = []
    for file in sorted(folder.iterdir(), key=lambda file: file.name):  # sets of equal names agree on what is stuff
        rows = json.loads(file.read_text(encoding="utf-8"))["classes"]
        sets.append(([plain_name(label) for _, label, _ in rows], [bool(isthing) for _, _, isthing in rows]))
    return sets


def plain_name(name: str) -> str:
    """Letters of the first synonym: "Road, route" and "road" are equal, as are "wall-other-merged" and "wall"."""
    first = re.sub(r"-(other|merged|stuff)\b", "", str(name).lower().split(",")[0])
    return re.sub(r"[^a-z0-9]", "", first)
