"""What `train` shows: a summary before it starts, the first augmented images, and progress with the loss' terms."""

import numpy as np
from PIL import Image
from transformers.trainer_callback import ProgressCallback

from ..inference.drawing import draw_instances
from ..model.mask_losses import WEIGHT_FIELDS, short_name
from ..training.backbones import parameters_in_millions


def headline_names(figures: dict) -> list[str]:
    """The metrics among Trainer's figures (the others are times)."""
    return [name for name in figures if name.split("_")[0] in ("pq", "sq", "rq", "box") or name in _OTHER_METRICS]


_OTHER_METRICS = ("ap", "ap50", "ap75", "aps", "apm", "apl", "miou", "fwiou", "macc", "pacc")


class LossProgress(ProgressCallback):
    """Trainer's progress bar with the terms of the loss beside it, instead of a line per log."""

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
            names = headline_names({name.removeprefix("eval_"): 0 for name in figures})
            shown = ", ".join(f"{name} {100 * figures['eval_' + name]:.2f}" for name in names[:6])
            self.training_bar.write(f"step {state.global_step}: {shown}")


def print_summary(settings, model, added, train, val, statistics, trainer):
    """What will be trained on what, before anything long starts."""
    print(train.classes.format_table(statistics["pixels"]))
    looked = statistics["examples"]
    print(
        f"{len(train)} images to train on ({looked} looked at: {statistics['segments']['mean']:.1f} segments each, at "
        f"most {statistics['segments']['largest']}, {statistics['empty']} without any), {len(val)} to measure"
    )
    start = settings.model or settings.backbone or f"the backbone of {settings.recipe}, random"
    print(
        f"{model.config.task} segmentation, {parameters_in_millions(model):.1f} M parameters from {start}, "
        f"{model.config.num_queries} queries, on {trainer.args.device} x {trainer.args.world_size}"
    )
    if settings.teacher:
        print(f"taught by {settings.teacher}" + (", without the labels" if settings.teacher_only else ""))
    if added:
        print(f"new to {start}, so with random rows in the classifier: {', '.join(added)}")
    images = settings.batch_size * settings.accumulate * trainer.args.world_size
    print(
        f"{settings.steps} steps of {images} images ({settings.steps * images / len(train):.1f} passes over the "
        f"data), learning rate {settings.learning_rate:g}, {trainer.args.schedule} schedule, seed {settings.seed}"
    )


def draw_batch(examples: list[dict], id2label) -> Image.Image:
    """The examples side by side, each with its masks."""
    panels = []
    for example in examples:
        layers = np.asarray(example["segmentation"])
        layers = layers[None] if layers.ndim == 2 else layers
        segments = [s for s in example["segments_info"] if not s.get("iscrowd", 0)]
        masks = np.stack([(layers == s["id"]).any(0) for s in segments] or [np.zeros(layers.shape[1:], bool)])
        labels = [s["category_id"] for s in segments] or [0]
        panels.append(draw_instances(example["image"], masks, labels, None, id2label))
    canvas = Image.new("RGB", (sum(panel.width for panel in panels), max(panel.height for panel in panels)))
    left = 0
    for panel in panels:
        canvas.paste(panel, (left, 0))
        left += panel.width
    return canvas
