"""The settings of a training run: what they mean, their defaults, and what a recipe makes of those left open."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ..data.classes import ClassTable
from ..data.kinds import KINDS, OF_A_SPLIT, VIDEO_KINDS
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
        "settings of one of the original's 59 recipes, such as coco-panoptic-r50, or for a ViT, such as "
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
    feature_cache: str | Path | None = _setting(
        "compute the maps of a frozen backbone once per image and keep them in this folder; needs freeze_backbone as "
        "a whole and augmentation none",
        group="model",
        metavar="DIR",
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

    steps: int | None = _setting("optimizer steps (one of steps, epochs and a recipe is required)")
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
    anneal_masks: list[float] | None = _setting(
        "experimental: train a model that needs no attention masks in the end; START and END are shares of the run "
        "(EoMT: 0.17 0.83); lower quality in our tests, see docs/effort.md (default: it has masks)",
        nargs=2,
        metavar=("START", "END"),
    )
    encoder_exits: bool = _setting(
        "train a model that can also answer with fewer layers of the pixel decoder's encoder (--effort), see "
        "docs/effort.md",
        False,
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
    memory_budget: float | None = _setting(
        "most memory in GB that a training step may take: so many blocks of the network, and no more, are computed "
        "again in the backward pass; slower, same result; instead of gradient_checkpointing",
        group="machine",
        metavar="GB",
    )
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
