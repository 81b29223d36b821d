"""What a result is made by: the task, the labels, and the numbers that decide; the same defaults at every door."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..model.channels import image_channels
from ..model.design_rules import classifies_pixels
from ..model.number_checks import check_count, check_fractions
from ..model.result_defaults import (
    INSTANCE_THRESHOLD,
    MASK_THRESHOLD,
    MAX_INSTANCES,
    OVERLAP_THRESHOLD,
    PANOPTIC_THRESHOLD,
    TASKS,
)
from .known_labels import stuff_of, task_of

METHODS = ("otsu", "crf")
THRESHOLDS = {"panoptic": PANOPTIC_THRESHOLD, "instance": INSTANCE_THRESHOLD, "semantic": 0.0}
OVERLAP_THRESHOLDS = {"panoptic": OVERLAP_THRESHOLD, "instance": 0.0, "semantic": 0.0}
FRACTIONS = ("threshold", "mask_threshold", "overlap_threshold")
READ = {"panoptic": FRACTIONS, "instance": (*FRACTIONS, "top_k"), "semantic": ()}  # task -> what it is made by
OF_PROCESSOR = {"threshold": "object_mask_threshold", "overlap_threshold": "overlap_threshold"}  # for panoptic results


@dataclass(frozen=True)
class Rules:
    """Made by `rules_of` from what a checkpoint says.

    Args:
        task: "panoptic", "instance" or "semantic".
        id2label: names of the classes.
        stuff_label_ids: classes of which all pixels are one segment in panoptic results, and that are no instances.
        semantic_only: the model serves semantic results alone: masks are mixed into classes before the last resize, as
            in the original (`postprocessing.semantic_scores`). Not of a head that classifies pixels, whose logits are
            resized.
        threshold: lowest score of a segment: its class probability (panoptic), or that times the mean probability in
            its mask (instance).
        mask_threshold: probability from which on a pixel belongs to a mask.
        overlap_threshold: share of its mask that a panoptic segment must own, or that better instances must leave.
        top_k: (query, class) pairs of an image that may become instances.
        refine: "otsu", a threshold for each mask instead of mask_threshold; "crf", a dense CRF; or None.
    """

    task: str
    id2label: Mapping[int, str]
    stuff_label_ids: tuple[int, ...]
    semantic_only: bool
    threshold: float
    mask_threshold: float = MASK_THRESHOLD
    overlap_threshold: float = 0.0
    top_k: int = MAX_INSTANCES
    refine: str | None = None


def rules_of(
    config,
    task: str | None = None,
    *,
    processor=None,
    stuff_label_ids: Iterable[int] | None = None,
    **numbers: float | str | None,
) -> Rules:
    """The rules for a checkpoint.

    Args:
        config: the checkpoint's, ours or transformers'.
        task: None for what the checkpoint is for (`known_labels.task_of`).
        processor: of the checkpoint; where its config does not name the stuff, the processor may, and it knows the
            thresholds of panoptic results if the checkpoint's recipe has its own.
        stuff_label_ids: None for what is known of the labels (`known_labels.stuff_of`).
        numbers: `threshold`, `mask_threshold`, `overlap_threshold`, `top_k`, `refine`; None for the default.

    Raises:
        ValueError: for a value that is out of range or that such results are not made by, naming it.
    """
    own_task = task_of(config)
    task = own_task if task is None else task
    if task not in TASKS:
        raise ValueError(f"task={task!r}: must be one of {', '.join(TASKS)}, or None for the checkpoint's own")
    of_pixels = classifies_pixels(config)
    if of_pixels and task != "semantic":
        raise ValueError(
            f"task={task!r}: a model with head_type={config.head_type!r} classifies pixels; ask for semantic results"
        )
    given = {name: value for name, value in numbers.items() if value is not None}
    if given.get("refine") == "crf" and (channels := image_channels(processor)) is not None:
        raise ValueError(f"refine='crf': compares the colours of photos, and these images have {channels} bands")
    check_refinement(task, given.get("refine"))
    _check_read(task, given)
    if task == "panoptic":
        of_checkpoint = {name: getattr(processor, field, None) for name, field in OF_PROCESSOR.items()}
        given = {name: value for name, value in of_checkpoint.items() if value is not None} | given
    check_fractions(**{name: value for name, value in given.items() if name in FRACTIONS})
    check_count(top_k=given.get("top_k", MAX_INSTANCES))
    names = {int(label): str(name) for label, name in config.id2label.items()}
    stuff = tuple(sorted((stuff_of(config, processor) if stuff_label_ids is None else stuff_label_ids) or ()))
    if unknown := [label for label in stuff if label not in names]:
        raise ValueError(f"stuff_label_ids contains {unknown}: labels are 0 to {len(names) - 1}")
    defaults = {"threshold": THRESHOLDS[task], "overlap_threshold": OVERLAP_THRESHOLDS[task]}
    return Rules(task, names, stuff, own_task == "semantic" and not of_pixels, **{**defaults, **given})


def _check_read(task: str, given: Mapping):
    """Refuse numbers that nothing would read."""
    unread = [name for name in given if name not in (*READ[task], "refine")]
    if unread:
        name, others = unread[0], [other for other in TASKS if unread[0] in READ[other]]
        raise ValueError(
            f"{name}={given[name]!r}: {task} results have no such number; leave it out, or ask for "
            f"{' or '.join(others)} results"
        )
    if given.get("refine") == "otsu" and "mask_threshold" in given:
        raise ValueError(
            f"mask_threshold={given['mask_threshold']!r}: refine='otsu' finds a threshold for every mask; leave one "
            "of the two out"
        )


def check_refinement(task: str, refine: str | None):
    """Find out before the first image what would fail.

    Raises:
        ValueError: for an unknown method, and Otsu's threshold for semantic results, which have none.
        ImportError: if the method's package is missing.
    """
    if refine not in (None, *METHODS):
        raise ValueError(f"refine={refine!r}: must be one of {', '.join(METHODS)}, or None")
    if refine == "otsu":
        if task == "semantic":
            raise ValueError("refine='otsu': semantic results have no threshold; use 'crf', or another task")
        from .otsu import load_threshold_otsu

        load_threshold_otsu()
    elif refine == "crf":
        from .crf import load_densecrf

        load_densecrf()
