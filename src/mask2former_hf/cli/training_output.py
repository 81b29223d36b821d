"""What `train` shows: a summary before it starts, the first augmented images, and progress with the loss' terms."""

import math
import time
from collections.abc import Sequence

from PIL import Image
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..data.example import Example
from ..data.pictures import to_picture
from ..inference.drawing import draw_instances
from ..model.mask_losses import WEIGHT_FIELDS, short_name
from ..training.optimization import FROM_RANDOM, parts_table
from ..training.run import TrainingRun
from ..training.settings import starts_pretrained


def headline_names(figures: dict) -> list[str]:
    """The metrics among Trainer's figures (the others are times) that have a value in these data."""
    named = [name for name in figures if name.split("_")[0] in ("pq", "sq", "rq", "box") or name in _OTHER_METRICS]
    return [name for name in named if figures[name] is not None and math.isfinite(figures[name])]


_OTHER_METRICS = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar1", "ar10", "miou", "fwiou", "macc", "pacc", "found")


class LossProgress(ProgressCallback):
    """Trainer's progress bar with the terms of the loss beside it, instead of a line per log; after an evaluation one
    with the figures, the best so far, and the time left at the pace since the start, evaluations included."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._began, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        terms = {name: short_name(name) for name in WEIGHT_FIELDS}
        names = {"loss": "loss", **terms} | {f"distillation_{term}": f"teacher {term}" for term in terms.values()}
        if "loss" in logs:
            self.training_bar.set_postfix(
                {short: f"{logs[name]:.2f}" for name, short in names.items() if name in logs}
            )
        figures = {name: value for name, value in logs.items() if name.startswith("eval_")}
        if figures:
            names = headline_names({name.removeprefix("eval_"): value for name, value in figures.items()})
            shown = ", ".join(f"{name} {100 * figures['eval_' + name]:.2f}" for name in names[:6])
            first = args.anneal_masks[1] * state.max_steps if args.anneal_masks else 0  # before none is the best
            history = [row for row in state.log_history if row["step"] >= first]
            best = best_so_far(history, args.metric_for_best_model)
            pace = (time.monotonic() - self._began) / max(state.global_step - self._first_step, 1)
            left = pace * (state.max_steps - state.global_step)
            self.training_bar.write(f"step {state.global_step}: {shown}{best}; {in_words(left)} left")


def best_so_far(history: Sequence[dict], metric: str) -> str:
    """The best value of the metric, and its step, in words; nothing before the second evaluation."""
    key = f"eval_{metric}"
    values = [(row[key], -row["step"]) for row in history if key in row and math.isfinite(row[key])]
    if len(values) < 2:
        return ""
    value, step = max(values)
    return f" (best {metric} {100 * value:.2f} at step {-step})"


def in_words(seconds: float) -> str:
    """A time, roughly."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def summary(run: TrainingRun) -> str:
    """What will be trained on what, before anything long starts."""
    lines, statistics = [], run.statistics
    for name, value in run.recognised.items():
        lines.append(f"recognised {name.replace('_', ' ')}: {value}")
    if run.held_out:
        lines.append(f"nothing to measure on was given: held out are {run.held_out}")
    lines.append(run.train_data.classes.format_table(statistics.pixels))
    lines.append(
        f"{len(run.train_data)} images to train on ({statistics.examples} looked at: {statistics.mean:.1f} segments "
        f"each, at most {statistics.most}), {len(run.val_data)} to measure"
    )
    lines += [f"  {line}" for line in statistics.lines()]
    lines += [f"Warning: {finding.where}: {finding.line}" for finding in run.findings]
    return "\n".join(lines + recipe_lines(run, "images"))


def recipe_lines(run: TrainingRun, what: str) -> list[str]:
    """The model and how it is trained, on images or clips."""
    settings, model, arguments = run.settings, run.model, run.trainer.args
    lines = []
    start = settings.model or settings.backbone or f"the backbone of {settings.recipe}"
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    lines.append(
        f"{model.config.task} segmentation, {millions:.1f} M parameters from {start}, "
        f"{model.config.num_queries} queries ({run.queries_reason}), on {arguments.device} x {arguments.world_size}"
    )
    if run.channels is not None:
        lines.append(_bands_line(run))
    if settings.teacher:
        lines.append(f"taught by {settings.teacher}" + (", without the labels" if settings.teacher_only else ""))
    if run.new_classes:
        lines.append(f"new to {start}, so with random rows in the classifier: {', '.join(run.new_classes)}")
    images = settings.batch_size * settings.accumulate * arguments.world_size
    lines.append(
        f"{settings.steps} steps of {images} {what} ({settings.steps * images / len(run.train_data):.1f} passes over "
        f"the data), {arguments.schedule} schedule, seed {settings.seed}"
    )
    if settings.anneal_masks:
        first, last = (round(share * settings.steps) for share in settings.anneal_masks)
        lines.append(f"attention masks annealed from step {first} to {last}; the trained model computes none")
    if model.config.encoder_exits:
        lines.append("every second step or so with fewer layers of the encoder, for answers with --effort below 1")
    trained = "trained" if starts_pretrained(settings) else "random"
    given = f"{', '.join(run.given)} as given, else " if run.given else ""
    lines.append(
        f"learning rate {settings.learning_rate:g}, {settings.backbone_multiplier:g} of that in the backbone, "
        f"gradients clipped at {settings.clip:g} ({given}as the backbone starts from {trained} weights)"
    )
    lines += [run.memory_line] if run.memory_line else []
    return [*lines, parts_table(run.trainer.model, run.trainer.parameter_groups())]


def _bands_line(run: TrainingRun) -> str:
    numbers = {name: getattr(run.processor, name) for name in ("image_mean", "image_std", "rescale_factor")}
    texts = {
        name: " ".join(f"{value:.4g}" for value in (numbers if isinstance(numbers, list | tuple) else [numbers]))
        for name, numbers in numbers.items()
    }
    return (
        f"images of {run.channels} bands, times {texts['rescale_factor']}, mean {texts['image_mean']}, deviation "
        f"{texts['image_std']} ({run.bands.reason})"
    )


class AdviceAtZero(TrainerCallback):
    """One line after three evaluations at 0, when something is probably wrong."""

    def __init__(self, run: TrainingRun):
        self.metric, self.settings, self.zeros = run.trainer.args.metric_for_best_model, run.settings, 0

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        figure = (metrics or {}).get(f"eval_{self.metric}", 1.0)
        self.zeros = 0 if figure > 0 else self.zeros + 1
        if self.zeros == 3 and state.is_world_process_zero:
            tqdm.write(f"{self.metric} was 0 in three evaluations. {self._advice()}")

    def _advice(self) -> str:
        """What to try, by what was not tried."""
        tries = [f"see whether masks and names are right in {self.settings.output / 'first_batch.png'}"]
        if not starts_pretrained(self.settings):
            tries.append("start from a trained --model or --backbone (random weights need thousands of steps)")
        for name, least in FROM_RANDOM.items():
            if starts_pretrained(self.settings) and name == "clip" and self.settings.clip < least:
                tries.append(f"--clip {least:g} if the loss hardly falls")
            elif not starts_pretrained(self.settings) and getattr(self.settings, name) < least:
                tries.append(f"--{name.replace('_', '-')} {least:g}")
        return "Try: " + "; ".join([*tries, "more --steps if the loss still falls"])


def draw_batch(examples: list[Example], id2label, show_bands: Sequence[int] | None = None) -> Image.Image:
    """The examples side by side, each with its masks; of images of bands those to show."""
    panels = []
    for example in examples:
        labels = [segment["category_id"] for segment in example.objects]
        image = to_picture(example.image, show_bands)
        panels.append(draw_instances(image, example.masks(example.objects), labels, None, id2label))
    return in_a_row(panels)


def in_a_row(panels: list[Image.Image]) -> Image.Image:
    """Pictures side by side."""
    canvas = Image.new("RGB", (sum(panel.width for panel in panels), max(panel.height for panel in panels)))
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, 0))
        left += panel.width
    return canvas
