"""The settings of a training run: what they mean, their defaults, and what a recipe makes of those left open."""

import math
import os
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path

from ..data.classes import ClassTable
from ..data.kinds import KINDS, OF_A_SPLIT, VIDEO_KINDS
from ..evaluation.evaluator import METRICS
from ..model.configuration_mask2former import MASK_LOSSES, VIT_NECKS
from ..model.design_rules import DECODERS, HEADS, PIXEL_DECODERS, classifies_pixels
from ..model.result_defaults import TASKS
from .backbones import BACKBONES, TINY
from .freezing import ALL
from .inflation import INFLATIONS
from .optimization import FROM_PRETRAINED, FROM_RANDOM, WEIGHT_DECAY
from .recipes import Recipe, load_recipe
from .vit_recipes import vit_recipe

DEFAULT_BATCH, DEFAULT_CROP = 4, 512  # where neither a setting nor a recipe says otherwise
DESIGNS = {"pixel_decoder_type": PIXEL_DECODERS, "decoder_type": DECODERS, "head_type": HEADS}
AUGMENTATIONS = ("lsj", "resize-crop", "none")
MOST_STEPS, MOST_IMAGES, MOST_WORKERS = 10**9, 2**16, 2**10  # beyond any run; more is a slip of the keyboard


def _setting(text: str, default=None, group: str = "training", **options):
    """A field; `options` are those of its flag (`choices`, `metavar`)."""
    return field(default=default, metadata={"help": text, "group": group, "flag": options})


def _data(text: str, default=None, **options):
    return _setting(text, default, "data", **options)


def _of_split(split: str, name: str):
    part = {"train": "to train on", "val": "to measure on"}[split]
    return _data(f"{OF_A_SPLIT[name]}, {part}")


def _by_start(name: str) -> str:
    return f"(default: {FROM_PRETRAINED[name]:g}, or {FROM_RANDOM[name]:g} if the backbone starts from random weights)"


@dataclass(kw_only=True)
class TrainingSettings:
    """Settings of `TrainingRun`. Nothing is read or checked before the run is made of them.

    The command line has a flag for every field, and a YAML file may have it as a key. `None` leaves a field to the
    recipe, the data or the model, as its text says.
    """

    output: str | Path | None = _setting("folder of the run: checkpoints, logs, results", group="run")
    resume: bool = _setting("go on from the last complete checkpoint of the output", False, "run")

    model: str | None = _setting("checkpoint to start from (folder or Hub id)", group="model")
    backbone: str | None = _setting(
        f"instead of a checkpoint: {', '.join(BACKBONES)} with pretrained weights of the Hub (tiny has none), or the "
        "folder or Hub id of a pretrained backbone",
        group="model",
    )
    vit_neck: str | None = _setting(
        "what makes four maps of a plain ViT: ViTDet's pyramid (default) or DINOv3's adapter",
        group="model",
        choices=VIT_NECKS,
    )
    channels: int | None = _setting(
        "of images that are no photos, 1 to 16 bands, red, green and blue first if there are any (default: the "
        "checkpoint's; else photos, which become RGB)",
        group="model",
    )
    inflate: str | None = _setting(
        "first weights for bands beyond those of the trained ones: their mean (default), zero, or repeated",
        group="model",
        choices=INFLATIONS,
    )
    random_weights: bool = _setting("start the backbone from random weights", False, "model")
    recipe: str | None = _setting(
        "settings of one of the original's 59 recipes, as coco-panoptic-r50, or for a ViT, as "
        "coco-panoptic-dinov2-l-adapter",
        group="model",
    )
    task: str | None = _setting(f"{', '.join(TASKS)} (default: by the data)", group="model")
    queries: int | None = _setting(
        "number of queries, each of which finds a segment (default: the checkpoint's; of a new model, enough for the "
        "fullest image to train on)",
        group="model",
    )
    pixel_decoder_type: str | None = _setting(
        "of a new model: deformable (default), or compared with it fpn or transformer_fpn",
        group="model",
        choices=PIXEL_DECODERS,
    )
    decoder_type: str | None = _setting(
        "of a new model: masked (default), or MaskFormer's standard", group="model", choices=DECODERS
    )
    head_type: str | None = _setting(
        "of a new model: masks (default), or per_pixel, or with decoder_type=standard per_pixel_plus",
        group="model",
        choices=HEADS,
    )
    mask_loss: str | None = _setting(
        "cross-entropy (bce, default) or focal loss of masks", group="model", choices=MASK_LOSSES
    )
    mask_weight: float | None = _setting("of the mask loss (default: the model's, 5; focal wants more)", group="model")
    freeze_backbone: str | int | None = _setting(
        "train everything but the backbone, or but its stem and first N stages (of a plain ViT: blocks)",
        group="model",
        nargs="?",
        const=ALL,
        metavar="N",
    )
    lora: int | None = _setting(
        "train updates of this rank instead of all weights; a new head, and the classifier, train whole",
        group="model",
        metavar="RANK",
    )
    lora_target: list[str] | None = _setting(
        "ends of the names of the linear layers with updates, such as q_proj v_proj (default: all)",
        group="model",
        metavar="NAME",
    )
    freeze_batch_norm: bool = _setting("for backbones with trained statistics", False, "model")

    folder: str | Path | None = _data("folder in which kind of data, splits and classes are recognised")
    data: str | None = _data("what the annotations are", choices=(*KINDS, *VIDEO_KINDS))
    classes: str | Path | Sequence | Mapping | ClassTable | None = _data(
        "names separated by commas, a file of them (txt, json, yaml), or the name of a class set such as "
        "ade20k-semantic; by default what the COCO json says"
    )
    train_images: str | Path | None = _of_split("train", "images")
    train_annotations: str | Path | None = _of_split("train", "annotations")
    train_maps: str | Path | None = _of_split("train", "maps")
    train_split: str | None = _of_split("train", "split")
    train_limit: int | None = _of_split("train", "limit")
    val_images: str | Path | None = _of_split("val", "images")
    val_annotations: str | Path | None = _of_split("val", "annotations")
    val_maps: str | Path | None = _of_split("val", "maps")
    val_split: str | None = _of_split("val", "split")
    val_limit: int | None = _of_split("val", "limit")
    held_out: float = _data(
        "share of the training data to measure on, where there is nothing else (default: 0.1)", 0.1
    )
    image_suffix: str | None = _data("of the images' names, such as _leftImg8bit")
    map_suffix: str | None = _data("of the maps' names, such as _gtFine_labelIds")
    no_check: bool = _data("do not look at the headers of all image files before the start", False)
    divisor: int | None = _data("instance-maps: class is id // DIVISOR (Cityscapes: 1000)")
    dataset: str | None = _data("hub: id or folder of the data set")
    image_column: str | None = _data("hub: name of the column of images (default: image)")
    label_column: str | None = _data("hub: name of the column of maps")
    segments_info_column: str | None = _data("hub: name of the column of segments, for panoptic data")
    objects_column: str | None = _data("hub: name of the column of objects, for instances")

    crop: int | None = _setting(
        f"side of the training images in pixels (default: {DEFAULT_CROP}, or the recipe's)", group="images"
    )
    augmentation: str | None = _setting(
        "large-scale jitter; short side, window, colour; or images at their test size (default: by the task)",
        group="images",
        choices=AUGMENTATIONS,
    )
    short_sides: list[int] | None = _setting(
        "of the augmentation resize-crop (default: 0.5 to 2 crops)", group="images", metavar="PIXELS"
    )
    test_size: list[int] | None = _setting(
        "short side, and largest long side (default: the crop, or the recipe's)", group="images", metavar="PIXELS"
    )

    image_mean: list[float] | None = _setting(
        "of the pixels after rescaling, one number or one per channel (default: of photos the backbone's, of bands "
        "that of the training images)",
        group="images",
    )
    image_std: list[float] | None = _setting("standard deviation, likewise", group="images")
    rescale_factor: float | None = _setting(
        "on the pixels (default: 1/255; of 16 bits 1/65535, of floats 1)", group="images"
    )
    show_bands: list[int] | None = _setting(
        "three bands for red, green and blue of first_batch.png, or one (default: the first)",
        group="images",
        metavar="BAND",
    )

    steps: int | None = _setting("optimizer steps (required without epochs or a recipe)")
    epochs: float | None = _setting("passes over the training data, instead of steps")
    batch_size: int | None = _setting(
        f"images per process and forward pass (default: {DEFAULT_BATCH}, or the recipe's)"
    )
    accumulate: int = _setting("forward passes per optimizer step (default: 1)", 1)
    learning_rate: float | None = _setting(_by_start("learning_rate"))
    backbone_multiplier: float | None = _setting("on the backbone's learning rate " + _by_start("backbone_multiplier"))
    layer_decay: float | None = _setting(
        "further factor on it for each stage (of a plain ViT: block) below the backbone's end, such as 0.8; then, as "
        "with lora, the multiplier is 1 by default"
    )
    warmup: int | None = _setting("steps in which all learning rates rise from 0 (default: none)")
    weight_decay: float = _setting(f"(default: {WEIGHT_DECAY:g})", WEIGHT_DECAY)
    clip: float | None = _setting("largest gradient norm " + _by_start("clip"))
    seed: int = _setting("of weights, data order and augmentation (default: 0)", 0)

    teacher: str | None = _setting("checkpoint with the same classes whose answers are learnt, too", group="teacher")
    teacher_weight: float = _setting("of the teacher's terms in the loss (default: 1)", 1.0, "teacher")
    teacher_only: bool = _setting("learn from the teacher alone, not from the labels", False, "teacher")
    teacher_cache: str | Path | None = _setting(
        "folder to keep its answers in; with augmentation none", group="teacher"
    )

    eval_every: int | None = _setting("steps between evaluations and checkpoints (default: a tenth)", group="run")
    metrics: list[str] | None = _setting("pq, ap, box_ap, miou (default: by the task)", group="run")
    keep: int = _setting("checkpoints to keep besides the best (default: 2)", 2, "run")
    log_every: int = _setting("steps between lines of the log (default: 10)", 10, "run")
    report_to: str = _setting("tensorboard, trackio, wandb or none (default)", "none", "run")

    num_workers: int = _setting("processes that prepare images (default: 0)", 0, "machine")
    bf16: bool = _setting("mixed precision in bfloat16", False, "machine")
    fp16: bool = _setting("mixed precision in float16 with loss scaling", False, "machine")
    gradient_checkpointing: bool = _setting("less memory, a third more time", False, "machine")
    cpu: bool = _setting(
        "run on the CPU (default: on the GPU if there is one; under torchrun each process on its own)",
        False,
        "machine",
    )


TrainingSettings.__doc__ += "\n    Args:\n" + "\n".join(
    f"        {entry.name}: {entry.metadata['help']}" for entry in fields(TrainingSettings)
)


def starts_pretrained(settings: TrainingSettings) -> bool:
    """Whether the backbone's weights are trained ones when the run starts."""
    return settings.model is not None or (settings.backbone != TINY and not settings.random_weights)


def complete(settings: TrainingSettings) -> tuple[TrainingSettings, Recipe | None]:
    """A copy with what the recipe says, or the defaults, where a setting was left open; and the recipe.

    Raises:
        ValueError: for a recipe that does not exist or cannot be trained here.
    """
    of_vit = vit_recipe(settings.recipe)
    if of_vit is not None:
        if settings.data in VIDEO_KINDS:
            raise ValueError(f"recipe={settings.recipe}: trains on images; those for videos begin with ytvis-")
        settings = _filled(
            settings, _implied(settings, of_vit.implied(settings.model, settings.steps, settings.epochs))
        )
        if _needs_classes(settings):
            settings = _filled(settings, {"classes": of_vit.class_set})
    if settings.layer_decay is not None or settings.lora is not None:
        settings = _filled(settings, {"backbone_multiplier": 1.0})
    settings = _filled(settings, FROM_PRETRAINED if starts_pretrained(settings) else FROM_RANDOM)
    of_clips = settings.data in VIDEO_KINDS
    if settings.recipe is None or of_vit is not None:
        return _filled(settings, {"batch_size": DEFAULT_BATCH} | ({} if of_clips else {"crop": DEFAULT_CROP})), None
    try:
        recipe = load_recipe(settings.recipe)
        if not of_clips:
            recipe.pipeline()
        elif not recipe.video:
            raise ValueError(f"{recipe.name} trains on images; those for videos begin with ytvis-")
    except ValueError as error:
        raise ValueError(f"recipe={settings.recipe}: {error}") from error
    implied = {
        "task": recipe.task,
        "steps": None if settings.epochs else recipe.iterations,
        "eval_every": recipe.eval_period or None,
        "queries": recipe.num_queries,
        "batch_size": recipe.batch_size,
    }
    if _needs_classes(settings):
        implied["classes"] = recipe.class_set
    if settings.augmentation in ("lsj", "resize-crop"):
        implied["crop"] = DEFAULT_CROP
    return _filled(settings, _implied(settings, implied)), recipe


def _implied(settings: TrainingSettings, values: dict) -> dict:
    """What a recipe says, whose batch is that of a step, for the forward passes of one process."""
    images = settings.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    if classifies_pixels(settings):
        values = values | {"queries": None}  # its classes are its queries
    return values | {name: max(1, value // max(1, images)) for name, value in values.items() if name == "batch_size"}


def _needs_classes(settings: TrainingSettings) -> bool:
    return settings.data in KINDS and "classes" in KINDS[settings.data].needs


def _filled(settings: TrainingSettings, values: dict) -> TrainingSettings:
    """With these values where a setting was left open."""
    return replace(settings, **{name: value for name, value in values.items() if getattr(settings, name) is None})


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
    check_numbers(settings, 1, ("batch_size", "accumulate", "queries"), most=MOST_IMAGES)
    check_numbers(settings, 0, ("num_workers",), most=MOST_WORKERS)
    check_numbers(settings, 0, ("warmup",), most=MOST_STEPS)
    check_numbers(settings, 1, ("crop", "short_sides", "test_size"), most=2**15)  # the processor takes twice a crop
    factors = ("learning_rate", "clip", "mask_weight", "weight_decay", "backbone_multiplier", "teacher_weight")
    check_numbers(settings, 0, factors)
    check_numbers(settings, 0, ("seed",), most=2**32 - 1)
    check_numbers(settings, -(10**9), ("image_mean", "image_std", "rescale_factor"), most=10**9)
    if len(settings.test_size or ()) > 2:
        raise ValueError(f"test_size={settings.test_size}: must be one or two numbers, short and largest long side")
    choices = {"task": TASKS, "augmentation": AUGMENTATIONS, "mask_loss": MASK_LOSSES, "vit_neck": VIT_NECKS} | DESIGNS
    for name, known in choices.items():
        if getattr(settings, name) not in (None, *known):
            raise ValueError(f"{name}={getattr(settings, name)}: must be one of {', '.join(known)}")
    _check_new(settings)
    if settings.teacher is None and (settings.teacher_only or settings.teacher_cache):
        raise ValueError("teacher_only= and teacher_cache= need teacher=, a checkpoint with the same classes")
    if settings.teacher_cache and settings.augmentation != "none":
        raise ValueError("teacher_cache= needs augmentation=none: an augmented image is another one every time")
    if settings.short_sides and settings.augmentation != "resize-crop" and settings.data not in VIDEO_KINDS:
        raise ValueError("short_sides= needs augmentation=resize-crop")
    if settings.bf16 and settings.fp16:
        raise ValueError("bf16= and fp16=: choose one")


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
