"""`mask2former-hf train --data youtube-vis`: a model of clips learns annotated videos."""

from dataclasses import fields

from tqdm import tqdm

from ..training.settings import TrainingSettings
from ..training.video_run import VideoRun
from .main import UserError, in_flags


def run(settings: TrainingSettings) -> int:
    try:
        training = VideoRun.of(settings)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), [entry.name for entry in fields(TrainingSettings)])) from error
    recipe = training.clips.recipe
    print(
        f"{len(training.clips)} videos, clips of {recipe.frames} frames, short sides {list(recipe.short_sides)}; "
        f"{training.steps} steps of {training.options['batch_size']} clips on {training.model.device}"
    )
    if training.new_classes:
        print(f"New to the checkpoint, from random weights: {', '.join(training.new_classes)}")
    with tqdm(total=training.steps, desc="training", unit="step") as bar:

        def on_step(step, loss):
            bar.update()
            bar.set_postfix(loss=f"{loss:.1f}", refresh=False)

        figures = training.train(tqdm, on_step)
    if figures["steps"] < training.steps:
        print(f"Interrupted after {figures['steps']} of {training.steps} steps; what was learned is saved")
    for name in ("AP", "AP50", "AP75", "AR1", "AR10"):
        if name in figures:
            print(f"{name:12}{100 * figures[name]:7.2f}")
    if "switches" in figures:
        print(f"{'switches':12}{figures['switches']:7d}")
    print(f"Model, processor and results.json: {settings.output}")
    return 0
