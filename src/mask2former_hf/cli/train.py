"""`mask2former-hf train`: fine-tune or train on your own data, with official metrics. Also under torchrun."""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..data.augmentation import AugmentedDataset
from ..evaluation.evaluator import METRICS, SegmentationEvaluator
from ..model.configuration_mask2former import MASK_LOSSES, TASKS
from ..training.backbones import (
    BACKBONES,
    augmentation_for,
    model_for_classes,
    new_model,
    processor_for,
    scan,
)
from ..training.distillation import Distillation
from ..training.recipes import COMMON, Recipe, load_recipe
from ..training.trainer import Mask2FormerTrainer, Mask2FormerTrainingArguments, last_complete_checkpoint
from .datasets import add_data_arguments, annotation, load_split
from .files import write_json
from .loading import LOADING_ERRORS, first_line, load_model
from .main import UserError
from .run_folder import StopAtCtrlC, check_output, how_to_go_on, plain_settings, write_settings
from .settings import check_numbers, read_settings
from .training_output import LossProgress, draw_batch, headline_names, print_summary

DEFAULTS = {
    "accumulate": 1,
    "learning_rate": COMMON["learning_rate"],
    "weight_decay": COMMON["weight_decay"],
    "clip": COMMON["gradient_norm"],
    "num_workers": 0,
    "seed": 0,
    "log_every": 10,
    "report_to": "none",
    "keep": 2,
    "backbone_multiplier": COMMON["backbone_multiplier"],
    "teacher_weight": 1.0,
}
WITHOUT_RECIPE = {"batch_size": 4, "crop": 512}


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("config", nargs="?", type=Path, help="YAML file whose keys are the flags below")
    parser.add_argument("--output", type=Path, help="folder of the run: checkpoints, logs, results")
    parser.add_argument("--model", help="checkpoint to start from (folder or Hub id)")
    parser.add_argument("--backbone", help=f"instead of --model: {', '.join(BACKBONES)}, or a pretrained backbone")
    parser.add_argument("--recipe", help="settings of one of the original's 59 recipes, such as coco-panoptic-r50")
    parser.add_argument("--task", help=f"{', '.join(TASKS)} (default: by the data)")
    add_data_arguments(parser, ("train", "val"))
    parser.add_argument(
        "--crop", type=int, help="side of the training images in pixels (default: 512, or the recipe's)"
    )
    parser.add_argument(
        "--augmentation",
        choices=("lsj", "resize-crop", "none"),
        help="large-scale jitter; short side, window, colour; or images at their test size (default: by the task)",
    )
    parser.add_argument("--short-sides", type=int, nargs="+", metavar="PIXELS", help="of --augmentation resize-crop")
    parser.add_argument("--test-size", type=int, nargs="+", metavar="PIXELS", help="short side, and largest long side")
    parser.add_argument("--steps", type=int, help="optimizer steps (required without --recipe)")
    parser.add_argument("--batch-size", type=int, help="images per process and forward pass (default: 4)")
    parser.add_argument("--accumulate", type=int, help="forward passes per optimizer step (default: 1)")
    parser.add_argument("--learning-rate", type=float, help="(default: 1e-4)")
    parser.add_argument("--backbone-multiplier", type=float, help="on the backbone's learning rate (default: 0.1)")
    parser.add_argument("--weight-decay", type=float, help="(default: 0.05)")
    parser.add_argument("--clip", type=float, help="largest gradient norm (default: 0.01)")
    parser.add_argument("--queries", type=int, help="number of queries (default: the model's)")
    parser.add_argument("--mask-loss", choices=MASK_LOSSES, help="cross-entropy (bce, default) or focal loss of masks")
    parser.add_argument(
        "--mask-weight", type=float, help="of the mask loss (default: the model's, 5; focal wants more)"
    )
    parser.add_argument("--teacher", help="checkpoint with the same classes whose answers are learnt, too")
    parser.add_argument("--teacher-weight", type=float, help="of the teacher's terms in the loss (default: 1)")
    parser.add_argument(
        "--teacher-only", action="store_true", help="learn from the teacher alone, not from the labels"
    )
    parser.add_argument("--teacher-cache", help="folder to keep its answers in; with --augmentation none")
    parser.add_argument("--eval-every", type=int, help="steps between evaluations and checkpoints (default: a tenth)")
    parser.add_argument("--metrics", nargs="+", help="pq, ap, box_ap, miou (default: by the task)")
    parser.add_argument("--keep", type=int, help="checkpoints to keep besides the best (default: 2)")
    parser.add_argument("--log-every", type=int, help="steps between lines of the log (default: 10)")
    parser.add_argument("--report-to", help="tensorboard, trackio or none (default)")
    parser.add_argument("--num-workers", type=int, help="processes that prepare images (default: 0)")
    parser.add_argument("--seed", type=int, help="of weights, data order and augmentation (default: 0)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16")
    parser.add_argument("--fp16", action="store_true", help="mixed precision in float16 with loss scaling")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    parser.add_argument("--freeze-batch-norm", action="store_true", help="for backbones with trained statistics")
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint of --output")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")


def run(arguments: argparse.Namespace) -> int:
    settings, recipe = _settings(arguments)
    first_process = int(os.environ.get("RANK", "0")) == 0
    train, val = load_split(settings, "train"), load_split(settings, "val")
    if train.classes.id2label != val.classes.id2label:
        raise UserError("the classes of the training and the validation data differ: give --classes for both")
    task = settings.task or train.task
    torch.manual_seed(settings.seed)
    transformers_logging.disable_progress_bar()
    model, added = _model(settings, recipe, train.classes, task)
    statistics = _look_through(train, "train", first_process)
    _check_segments(settings, model, statistics, _look_through(val, "val", first_process))
    model.config.class_table = train.classes.config_fields(statistics["pixels"])["class_table"]
    augmented, processor = _images(settings, recipe, train, task)
    try:
        SegmentationEvaluator(model.config, processor, settings.metrics)  # now, and not after the first steps
        trainer = _trainer(settings, recipe, model, processor, augmented, val)
    except (ImportError, RuntimeError, ValueError) as error:  # a package that is missing, settings that do not fit
        raise UserError(first_line(error)) from error
    last = last_complete_checkpoint(settings.output) if settings.resume else None
    if first_process:
        print_summary(settings, model, added, train, val, statistics, trainer)
        settings.output.mkdir(parents=True, exist_ok=True)
        if last is None:
            write_settings(settings)
            if settings.resume:
                print("--resume: no checkpoint was complete yet, so the run starts from the beginning")
        picture = settings.output / "first_batch.png"
        first = [augmented[i] for i in range(min(settings.batch_size, len(augmented)))]
        draw_batch(first, model.config.id2label).save(picture)
        print(f"The first augmented images with their masks: {picture}")
    _fit(settings, trainer, last)
    metrics = trainer.evaluate()
    if first_process:
        _save(settings, trainer, metrics)
    return 0


def _images(settings, recipe, train, task):
    """The training images as they are augmented, and the processor for inference."""
    if settings.crop is None:
        pipeline, test_size = recipe.pipeline(), list(recipe.test_size.values())
    else:
        kind = None if settings.augmentation == "none" else settings.augmentation
        pipeline, test_size = augmentation_for(task, settings.crop, kind, settings.short_sides or ()), [settings.crop]
    short, *long = settings.test_size or test_size
    processor = processor_for(train.classes, short, long[0] if long else 2 * short)
    plain = settings.augmentation == "none"
    return train if plain else AugmentedDataset(train, pipeline, seed=settings.seed), processor


def _fit(settings, trainer, last: str | None):
    trainer.replace_progress(LossProgress)
    try:
        with StopAtCtrlC() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=last)
        if stop.pressed and trainer.state.global_step < settings.steps:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(f"\nInterrupted at step {trainer.state.global_step}. {how_to_go_on(settings.output)}")
        raise


def _save(settings, trainer, metrics: dict[str, float]):
    """Model, processor, card and figures, in the run's folder."""
    trainer.save_model(str(settings.output))
    trainer.create_model_card(finetuned_from=settings.model)
    figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    result = {"metrics": figures, "steps": trainer.state.global_step, "settings": plain_settings(settings)}
    write_json(settings.output / "results.json", result)
    for name in headline_names(figures):
        print(f"{name:12}{100 * figures[name]:7.2f}")
    print(f"Model, processor and results.json: {settings.output}")


def _settings(arguments) -> tuple[argparse.Namespace, Recipe | None]:
    """Flags over the YAML file over the recipe over the defaults."""
    name = read_settings(arguments, {}).recipe
    if name is None:
        settings, recipe = read_settings(arguments, DEFAULTS | WITHOUT_RECIPE), None
    else:
        try:
            recipe = load_recipe(name)
            recipe.pipeline()
        except ValueError as error:
            raise UserError(f"--recipe: {error}") from error
        fields = {"task": recipe.task, "steps": recipe.iterations, "eval_every": recipe.eval_period or None}
        settings = read_settings(arguments, DEFAULTS | fields | {"queries": recipe.num_queries})
        if settings.batch_size is None:  # the recipe's is that of a step, over all processes
            processes = int(os.environ.get("WORLD_SIZE", "1"))
            settings.batch_size = max(1, recipe.batch_size // (settings.accumulate * processes))
        if settings.classes is None and settings.data in ("label-maps", "instance-maps", "hub"):
            settings.classes = recipe.class_set
        if settings.augmentation in ("lsj", "resize-crop") and settings.crop is None:
            settings.crop = WITHOUT_RECIPE["crop"]
    _check(settings, recipe)
    return settings, recipe


def _look_through(dataset, split: str, show: bool) -> dict:
    """`scan`, which also finds labels that are not in the class table."""
    try:
        return scan(dataset, annotation, progress=partial(tqdm, desc=f"reading {split} annotations", disable=not show))
    except (OSError, ValueError) as error:
        raise UserError(f"{split}: {error}") from error


def _check_segments(settings, model, train: dict, val: dict):
    """Refuse more segments than queries, and overlaps where the metric has no meaning for them."""
    largest = train["segments"]["largest"]
    if largest > model.config.num_queries:
        raise UserError(
            f"an image has {largest} segments and the model {model.config.num_queries} queries, each of which finds "
            f"one: give --queries {largest} or more"
        )
    undefined = [m for m in ("pq", "miou") if m in (settings.metrics or METRICS[model.config.task])]
    if val["overlapping"] and undefined:
        raise UserError(
            f"val: {val['overlapping']} of {val['examples']} images have overlapping segments, and there "
            f"is no {' and no '.join(undefined)} of those: give --metrics ap"
        )


def _check(settings, recipe):
    if settings.output is None:
        raise UserError("--output is missing: a folder for the run")
    settings.output = Path(settings.output)
    if settings.model is not None and settings.backbone is not None:
        raise UserError("--model and --backbone: choose one, a checkpoint to start from or a new model")
    if recipe is None and settings.model is None and settings.backbone is None:
        raise UserError("give --model (a checkpoint to start from), --backbone or --recipe (a new model)")
    if settings.steps is None:
        raise UserError("--steps is missing: give the number of optimizer steps, or a --recipe")
    counts = ("steps", "batch_size", "accumulate", "crop", "queries", "eval_every", "log_every", "keep")
    check_numbers(settings, 1, (*counts, "short_sides", "test_size"))
    factors = ("learning_rate", "clip", "mask_weight", "weight_decay", "backbone_multiplier", "teacher_weight")
    check_numbers(settings, 0, (*factors, "num_workers"))
    check_numbers(settings, 0, ("seed",), most=2**32 - 1)
    if len(settings.test_size or ()) > 2:
        raise UserError(f"--test-size {settings.test_size}: must be one or two numbers, short and largest long side")
    if settings.task not in (None, *TASKS):
        raise UserError(f"--task {settings.task}: must be one of {', '.join(TASKS)}")
    if settings.teacher is None and (settings.teacher_only or settings.teacher_cache):
        raise UserError("--teacher-only and --teacher-cache need --teacher, a checkpoint with the same classes")
    if settings.teacher_cache and settings.augmentation != "none":
        raise UserError("--teacher-cache needs --augmentation none: an augmented image is another one every time")
    if settings.short_sides and settings.augmentation != "resize-crop":
        raise UserError("--short-sides needs --augmentation resize-crop")
    if settings.bf16 and settings.fp16:
        raise UserError("--bf16 and --fp16: choose one")
    check_output(settings)


def _model(settings, recipe, classes, task):
    """The model, and the names of the classes that a checkpoint did not know."""
    given = {name: getattr(settings, name) for name in ("mask_loss", "mask_weight")}
    fields = {name: value for name, value in given.items() if value is not None}
    trained = settings.model is not None or settings.backbone not in (None, *BACKBONES)
    if settings.freeze_batch_norm or (trained and recipe is not None and recipe.backbone.get("norm") == "FrozenBN"):
        fields["freeze_batch_norm"] = True
    if settings.model is not None:
        model = load_model(settings.model, **fields)
        try:
            return model_for_classes(model, classes, task, settings.queries)
        except ValueError as error:
            raise UserError(f"--model {settings.model}: {first_line(error)}") from error
    try:
        queries = {} if settings.queries is None else {"num_queries": settings.queries}
        return new_model(settings.backbone or recipe, classes, task, **fields, **queries), []
    except LOADING_ERRORS as error:
        if settings.backbone is None:
            raise
        known = ", ".join(BACKBONES)
        raise UserError(
            f"--backbone {settings.backbone}: must be one of {known}, or a folder or Hub id; {first_line(error)}"
        ) from error


def _distillation(settings, model) -> Distillation | None:
    if settings.teacher is None:
        return None
    teacher = load_model(settings.teacher, "--teacher")
    try:
        return Distillation(teacher, model, weight=settings.teacher_weight, cache=settings.teacher_cache)
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher {settings.teacher}: {first_line(error)}") from error


def _trainer(settings, recipe, model, processor, train, val):
    every = settings.eval_every or max(1, settings.steps // 10)
    milestones, thresholds = None, {}
    if recipe is not None:
        thresholds = {"threshold": recipe.object_mask_threshold, "overlap_threshold": recipe.overlap_threshold}
        if recipe.milestones:  # at the same fraction of a shorter run
            milestones = [round(step / recipe.iterations * settings.steps) for step in recipe.milestones]
    metric = {"panoptic": "pq", "instance": "ap", "semantic": "miou"}[model.config.task]
    if settings.metrics and metric not in settings.metrics:
        metric = settings.metrics[0]
    options = Mask2FormerTrainingArguments(
        output_dir=str(settings.output),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        backbone_multiplier=settings.backbone_multiplier,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        schedule="multistep" if milestones else "poly",
        milestones=milestones,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=settings.keep,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=True,
        eval_metrics=settings.metrics,
        logging_steps=settings.log_every,
        report_to=settings.report_to,
        dataloader_num_workers=settings.num_workers,
        seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        use_cpu=settings.cpu,
        ddp_find_unused_parameters=False,
    )
    if settings.gradient_checkpointing:  # renamed in transformers 5.24, where the old name warns
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return Mask2FormerTrainer(
        model,
        options,
        processor=processor,
        train_dataset=train,
        eval_dataset=val,
        augmented=settings.augmentation != "none",
        eval_thresholds=thresholds,
        distillation=_distillation(settings, model),
        labelled=not settings.teacher_only,
    )
