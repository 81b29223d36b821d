"""The doctor for runs: how loss and metric went, with which learning rate, and what the model says in the end."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from statistics import fmean

from ..data.findings import ERROR, WARNING, Finding
from ..data.kinds import KINDS, load_both
from ..evaluation.doctor import finds_nothing
from ..inference.loading import PROCESSOR_FILES, LoadingError, load_model, load_processor
from ..model.design_rules import classifies_pixels
from .optimization import FROM_RANDOM
from .run_history import History, read_history
from .settings import TrainingSettings

FEW_LOGS = 8  # below, a curve says nothing
LOOKED_AT = 4  # images
FLAT = 0.002  # of a metric, over three evaluations or more


def examine_run(folder: str | Path) -> list[Finding]:
    """Findings of the folder of a run."""
    try:
        history = read_history(folder)
    except (OSError, ValueError, KeyError) as error:
        return [Finding(ERROR, str(folder), str(error), "there is nothing to look at", "give the --output of a run")]
    return [finding for check in CHECKS for finding in check(history)]


def _thirds(values: list[float]) -> tuple[float, float]:
    """Means of the first and the last third."""
    count = max(1, len(values) // 3)
    return fmean(values[:count]), fmean(values[-count:])


def not_finite(run: History) -> Iterator[Finding]:
    names = ("loss", "loss_cross_entropy", "loss_mask", "loss_dice")
    broken = [row["step"] for row in run.steps if any(not math.isfinite(row.get(name, 0.0)) for name in names)]
    if broken:
        yield Finding(
            ERROR,
            f"{run.folder}, step {broken[0]}",
            f"the loss is nan or infinite, in {len(broken)} of {len(run.steps)} logs",
            "from there on nothing is learnt, and the weights are lost",
            "start from the last checkpoint before it, with a smaller --learning-rate, and --bf16 instead of --fp16",
        )


def loss_not_falling(run: History) -> Iterator[Finding]:
    losses = [value for value in run.series("loss") if math.isfinite(value)]
    if len(losses) < FEW_LOGS:
        return
    first, last = _thirds(losses)
    lowest = min(fmean(losses[k : k + 3]) for k in range(len(losses) - 2))
    if last > 1.3 * max(lowest, 1e-9) and last > 0.9 * first:
        yield Finding(
            WARNING,
            str(run.folder),
            f"the loss rises again: {lowest:.3g} was reached, the last third has {last:.3g}",
            "the run diverges",
            "a smaller --learning-rate, more --warmup, or a smaller --clip",
        )
    elif last > 0.97 * first:
        yield Finding(
            WARNING,
            str(run.folder),
            f"the loss does not fall: {first:.3g} in the first third, {last:.3g} in the last",
            "nothing is learnt",
            "look at first_batch.png; from random weights --learning-rate 1e-3 --clip 1; more --steps",
        )


def metric_flat(run: History) -> Iterator[Finding]:
    figures = run.series(run.metric, run.evaluations) if run.metric else []
    figures = [figure for figure in figures if isinstance(figure, float) and math.isfinite(figure)]
    if len(figures) >= 3 and max(figures) == 0:
        yield Finding(
            WARNING,
            str(run.folder),
            f"{run.metric} was 0 in all {len(figures)} evaluations",
            "no prediction matches the truth: labels may be shifted, or the run too short",
            "look at first_batch.png, and start from a trained --model",
        )
    elif len(figures) >= 3 and max(figures) - min(figures) < FLAT:
        yield Finding(
            WARNING,
            str(run.folder),
            f"{run.metric} stays at {figures[-1]:.3f} in all {len(figures)} evaluations",
            "the model does not change, or always says the same",
            "see whether the weights that matter are trained (--freeze-backbone, --learning-rate)",
        )
    elif len(figures) >= 4 and figures[-1] < 0.7 * max(figures) and max(figures) > 0.02:
        yield Finding(
            WARNING,
            str(run.folder),
            f"{run.metric} was {max(figures):.3f} and ended at {figures[-1]:.3f}",
            "the training data are learnt by heart, or the run diverges",
            "fewer --steps, more --augmentation, or a smaller --learning-rate; the best checkpoint was kept",
        )


def learning_rate(run: History) -> Iterator[Finding]:
    """Against the start of the backbone."""
    rate, multiplier = run.settings.get("learning_rate"), run.settings.get("backbone_multiplier")
    frozen = run.settings.get("freeze_backbone") is not None
    if run.pretrained is None or rate is None:
        return
    usual = FROM_RANDOM["learning_rate"]
    if not run.pretrained and frozen:
        yield Finding(
            ERROR,
            str(run.folder),
            "the backbone is frozen and random",
            "its features carry no meaning, and never will",
            "give a trained --backbone, or leave --freeze-backbone out",
        )
    elif not run.pretrained and (rate < usual / 2 or multiplier is not None and multiplier < 0.5):
        yield Finding(
            WARNING,
            str(run.folder),
            f"the backbone starts from random weights with a learning rate of {rate:g} times {multiplier:g}",
            "that is made for trained weights; random ones hardly move",
            f"--learning-rate {usual:g} --backbone-multiplier 1 --clip 1, or trained weights",
        )
    elif run.pretrained and not frozen and rate * (1 if multiplier is None else multiplier) >= usual:
        yield Finding(
            WARNING,
            str(run.folder),
            f"the trained backbone has a learning rate of {rate * (multiplier or 1):g}",
            "what it knows is lost in the first steps",
            "--learning-rate 1e-4 --backbone-multiplier 0.1",
        )


def never_moved(run: History) -> Iterator[Finding]:
    rates = run.series("learning_rate")
    if rates and max(rates) == 0:
        yield Finding(
            ERROR,
            str(run.folder),
            "the learning rate was 0 in all logs",
            "no weight changes",
            "--learning-rate above 0, and less --warmup than --steps",
        )


def evaluation_size(run: History) -> Iterator[Finding]:
    crop, sides = run.settings.get("crop"), run.settings.get("short_sides")
    if crop is None or run.settings.get("recipe") is not None:
        return
    trained = fmean(sides) if sides else crop
    measured, where = (run.settings.get("test_size") or [crop])[0], "--test-size"
    if any((run.folder / file).is_file() for file in PROCESSOR_FILES):
        try:
            size = load_processor(str(run.folder)).size
            measured, where = size.get("shortest_edge") or size.get("height") or measured, "its processor"
        except LoadingError:
            pass  # `doctor --model` says it
    if not 0.66 <= measured / trained <= 1.51:
        yield Finding(
            WARNING,
            str(run.folder),
            f"it was trained on images of about {trained:.0f} pixels and is measured at {measured} ({where})",
            "things have another size there than they were learnt at",
            f"--test-size {trained:.0f}, or train with --crop {measured}",
        )


def unfinished(run: History) -> Iterator[Finding]:
    if not run.finished:
        last = run.steps[-1]["step"] if run.steps else 0
        yield Finding(
            WARNING,
            str(run.folder),
            f"it ends at step {last} without results",
            "the folder has no model, unless it still runs",
            "the same command with --resume goes on",
        )


def nothing_but_no_object(run: History) -> Iterator[Finding]:
    """Asks the model, on a few of the images to measure on, if both are still there."""
    if not (run.folder / "config.json").is_file() or run.settings.get("data") not in KINDS:
        return
    known = {entry.name for entry in fields(TrainingSettings)}
    try:
        model, processor = load_model(str(run.folder)), load_processor(str(run.folder))
        settings = {"output": str(run.folder)} | {k: v for k, v in run.settings.items() if k in known}
        images = load_both(TrainingSettings(**settings))[1]
        some = [images[k].image for k in range(0, len(images), -(-len(images) // LOOKED_AT))]
    except (OSError, ValueError, ImportError):  # other checks say what is wrong with the model; data may have moved
        return
    if not classifies_pixels(model.config) and finds_nothing(model, processor, some):
        yield Finding(
            ERROR,
            str(run.folder),
            f'every query says "no object" in {len(some)} images to measure on',
            "nothing is found: the classifier has learnt that most queries have nothing to find, and no more",
            "more --steps, a trained --model, and a look at first_batch.png for masks that are missing",
        )


Check = Callable[[History], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    not_finite,
    never_moved,
    loss_not_falling,
    metric_flat,
    learning_rate,
    evaluation_size,
    unfinished,
    nothing_but_no_object,
)
