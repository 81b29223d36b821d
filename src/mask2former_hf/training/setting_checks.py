"""What settings of a training run may be: their types, their numbers, and which of them go together."""

import math
import reprlib
import types
import typing
from dataclasses import fields
from importlib.util import find_spec
from numbers import Integral, Real

from ..data.kinds import KINDS, VIDEO_KINDS
from ..evaluation.evaluator import METRICS
from ..model.configuration_mask2former import MASK_LOSSES, VIT_NECKS
from ..model.design_rules import classifies_pixels
from ..model.result_defaults import TASKS
from .annealing import check_span
from .freezing import ALL
from .settings import (
    AUGMENTATIONS,
    DESIGNS,
    MOST_IMAGES,
    MOST_STEPS,
    MOST_WORKERS,
    TrainingSettings,
    starts_pretrained,
)
from .vit_recipes import vit_recipe


def check_types(settings: TrainingSettings):
    """Refuse values of a kind that a setting cannot have, before anything is made of them.

    Raises:
        ValueError: naming the setting, its value and what it may be.
    """
    for entry in fields(settings):
        value, kinds = getattr(settings, entry.name), kinds_of(entry.type)
        if not any(_is_of(value, kind) for kind in kinds):
            words = " or ".join("None" if kind is types.NoneType else _name(kind) for kind in kinds)
            raise ValueError(f"{entry.name}={reprlib.repr(value)}: must be of type {words}")


def kinds_of(annotation) -> tuple:
    """The types that a field may have."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _name(kind) -> str:
    return str(kind) if typing.get_origin(kind) else kind.__name__


def _is_of(value, kind) -> bool:
    """As Python's annotations mean it, where an int is a float and a bool is no number."""
    if typing.get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_is_of(part, typing.get_args(kind)[0]) for part in value)
    wanted = {int: Integral, float: Real}.get(kind, kind)
    return isinstance(value, wanted) and not (isinstance(value, bool) and kind is not bool)


def check(settings: TrainingSettings):
    """Refuse settings that make no sense, alone or together.

    Raises:
        ValueError: naming the setting, its value and the rule.
    """
    if settings.output is None:
        raise ValueError("output= is missing: a folder for the run")
    _check_start(settings)
    if not 0 < settings.held_out < 1:
        raise ValueError(f"held_out={settings.held_out}: must be above 0 and below 1")
    if settings.layer_decay is not None and not 0 < settings.layer_decay <= 1:
        raise ValueError(f"layer_decay={settings.layer_decay}: must be above 0 and at most 1")
    check_numbers(settings, 1, ("steps", "eval_every", "log_every", "keep", "divisor", "lora"), most=MOST_STEPS)
    of_masks = ("mask_loss", "mask_weight")
    if classifies_pixels(settings) and (unread := [n for n in of_masks if getattr(settings, n) is not None]):
        raise ValueError(
            f"{unread[0]}={getattr(settings, unread[0])}: a head that classifies pixels has no such term; leave it out"
        )
    _check_frozen(settings)
    check_numbers(settings, 1, ("batch_size", "accumulate", "queries"), most=MOST_IMAGES)
    check_numbers(settings, 0, ("num_workers",), most=MOST_WORKERS)
    check_numbers(settings, 0, ("warmup",), most=MOST_STEPS)
    check_numbers(settings, 1, ("crop", "short_sides", "test_size"), most=2**15)  # the processor takes twice a crop
    factors = ("learning_rate", "clip", "mask_weight", "weight_decay", "backbone_multiplier", "teacher_weight")
    check_numbers(settings, 0, (*factors, "memory_budget"))
    check_numbers(settings, 0, ("seed",), most=2**32 - 1)
    if settings.anneal_masks is not None:
        check_span(settings.anneal_masks)
    check_numbers(settings, -(10**9), ("image_mean", "image_std", "rescale_factor"), most=10**9)
    if len(settings.test_size or ()) > 2:
        raise ValueError(f"test_size={settings.test_size}: must be one or two numbers, short and largest long side")
    choices = {"task": TASKS, "augmentation": AUGMENTATIONS, "mask_loss": MASK_LOSSES, "vit_neck": VIT_NECKS} | DESIGNS
    for name, known in choices.items():
        if getattr(settings, name) not in (None, *known):
            raise ValueError(f"{name}={getattr(settings, name)}: must be one of {', '.join(known)}")
    _check_new(settings)
    _check_together(settings)


def _check_start(settings: TrainingSettings):
    """One beginning and one length."""
    if settings.model is not None and settings.backbone is not None:
        raise ValueError("model= and backbone=: choose one, a checkpoint to start from or a new model")
    of_original = settings.recipe is not None and vit_recipe(settings.recipe) is None
    if not of_original and settings.model is None and settings.backbone is None:
        raise ValueError("give model= (a checkpoint to start from), backbone= or recipe= (a new model)")
    if settings.model is not None and settings.random_weights:
        raise ValueError("random_weights= is for a new model; leave it out with model=")
    if settings.steps is None and settings.epochs is None:
        raise ValueError("steps= is missing: give the number of optimizer steps, epochs=, or a recipe=")
    if settings.steps is not None and settings.epochs is not None:
        raise ValueError("steps= and epochs=: choose one")
    if settings.epochs is not None and not 0 < settings.epochs <= MOST_STEPS:
        raise ValueError(f"epochs={settings.epochs}: must be above 0 and at most {MOST_STEPS}")


def _check_together(settings: TrainingSettings):
    """Settings that exclude or need each other."""
    if settings.teacher is None and (settings.teacher_only or settings.teacher_cache):
        raise ValueError("teacher_only= and teacher_cache= need teacher=, a checkpoint with the same classes")
    if settings.teacher_cache and settings.augmentation != "none":
        raise ValueError("teacher_cache= needs augmentation=none: an augmented image is another one every time")
    if settings.short_sides and settings.augmentation != "resize-crop" and settings.data not in VIDEO_KINDS:
        raise ValueError("short_sides= needs augmentation=resize-crop")
    if settings.bf16 and settings.fp16:
        raise ValueError("bf16= and fp16=: choose one")
    if settings.memory_budget is not None:
        if settings.memory_budget == 0:
            raise ValueError("memory_budget=0: must be above 0, in GB; leave it out for a step of any size")
        if settings.gradient_checkpointing:
            raise ValueError(
                "memory_budget= and gradient_checkpointing=: choose one; the budget chooses which blocks are computed "
                "again, the other computes again all that transformers can"
            )
        if settings.teacher is not None:
            raise ValueError("memory_budget= and teacher=: choose one; what a teacher takes is not measured")


def _check_frozen(settings: TrainingSettings):
    """Refuse what does not fit a backbone that stays as it is, as a whole or but for small updates."""
    if settings.freeze_backbone is not None:
        if settings.freeze_backbone != ALL and not str(settings.freeze_backbone).isdecimal():
            raise ValueError(f"freeze_backbone={settings.freeze_backbone}: must be a number of stages, or {ALL!r}")
        if not starts_pretrained(settings):
            raise ValueError(
                f"freeze_backbone={settings.freeze_backbone}: the backbone starts from random weights, and would stay "
                "random; give one with trained weights, or leave freeze_backbone out"
            )
    if settings.lora is not None and (settings.freeze_backbone is not None or not starts_pretrained(settings)):
        raise ValueError(
            f"lora={settings.lora}: updates need trained weights that stay as they are; leave out "
            + ("freeze_backbone=" if settings.freeze_backbone is not None else "random weights")
        )
    if settings.lora_target and settings.lora is None:
        raise ValueError("lora_target= needs lora=, the rank of the updates")
    if settings.feature_cache is not None and (settings.freeze_backbone != ALL or settings.augmentation != "none"):
        raise ValueError(
            f"feature_cache={settings.feature_cache}: needs freeze_backbone= without a number ({ALL!r}) and "
            "augmentation=none: maps change with the backbone, and an augmented image is another one every time"
        )


def _check_new(settings: TrainingSettings):
    """Refuse a design for a checkpoint, which has its own."""
    for name in DESIGNS:
        if settings.model is not None and getattr(settings, name) is not None:
            raise ValueError(f"{name}={getattr(settings, name)}: is of a new model, and model= is one that is made")


def check_packages(settings: TrainingSettings):
    """Name all packages that a run will need and that are not installed.

    Raises:
        ImportError: with the line that installs them.
    """
    kind = (KINDS | VIDEO_KINDS).get(settings.data)
    needed = {"accelerate": "training"} | ({} if kind is None else kind.packages)
    needed |= {} if settings.lora is None else {"peft": "lora"}
    if settings.report_to in ("tensorboard", "trackio", "wandb"):  # transformers refuses what it does not know
        needed[settings.report_to] = f"report_to={settings.report_to}"
    task = settings.task or (None if kind is None else kind.task)
    if {"ap", "box_ap"} & set(settings.metrics or METRICS.get(task, ())) and find_spec("pycocotools") is None:
        needed["faster_coco_eval"] = "average precision"
    missing = {name: why for name, why in needed.items() if find_spec(name) is None}
    if missing:
        why = ", ".join(f"{name} ({reason})" for name, reason in missing.items())
        raise ImportError(f"missing packages: {why}; pip install {' '.join(missing).replace('_', '-')}")


def check_numbers(settings, least: float, names, most: float = math.inf):
    """Refuse numbers outside least .. most, and infinite ones; lists are checked one by one.

    Raises:
        ValueError: naming the setting, its value and the rule.
    """
    for name in names:
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            if number != number:
                raise ValueError(f"{name}={number}: must be a number")
            if not number >= least:
                raise ValueError(f"{name}={number}: must be at least {least}")
            if number > most or number == math.inf:
                raise ValueError(f"{name}={number}: must be {'finite' if most == math.inf else f'at most {most}'}")
