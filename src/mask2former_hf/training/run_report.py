"""What a finished run says of itself: `results.json`, and with matplotlib `report.html` and `curves.png`."""

import math

from ..data.json_files import write_json
from ..evaluation.report import has_matplotlib, results, write_report
from .run_folder import RESULTS, plain_settings
from .settings import TrainingSettings
from .trainer import Mask2FormerTrainer

CURVES = "curves.png"
TIMES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "switches")  # no fractions


def write_curves(settings: TrainingSettings, trainer: Mask2FormerTrainer):
    """Loss, metrics and learning rate so far, as a picture in the output; nothing without matplotlib."""
    if has_matplotlib() and trainer.state.log_history:
        from ..evaluation.report_figures import run_figure  # here, because matplotlib is an extra

        picture = run_figure(trainer.state.log_history, trainer.args.metric_for_best_model)
        (settings.output / CURVES).write_bytes(picture)


def write_results(settings: TrainingSettings, trainer: Mask2FormerTrainer, figures: dict):
    """Of a run that is done, by the last evaluation (`Mask2FormerTrainer.measured`).

    Args:
        figures: of Trainer, without their prefix.
    """
    if has_matplotlib():
        shown = {n: v for n, v in figures.items() if n not in TIMES and v is not None and math.isfinite(v)}
        write_report(
            settings.output,
            trainer.measured,
            title=f"Training of {settings.output.name}",
            settings=plain_settings(settings),
            history=trainer.state.log_history,
            metric=trainer.args.metric_for_best_model,
            figures=shown,
        )
    run = {"metrics": figures, "steps": trainer.state.global_step, "settings": plain_settings(settings)}
    write_json(settings.output / RESULTS, run if trainer.measured is None else results(trainer.measured, **run))
