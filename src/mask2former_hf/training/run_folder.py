"""The folder of a training run: what it was started with, where `--resume` begins, and how Ctrl-C ends it."""

import json
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback

from ..data.json_files import write_json
from .settings import TrainingSettings
from .trainer import last_complete_checkpoint

SETTINGS, RESULTS = "settings.json", "results.json"
# What may differ when a run is resumed: it does not change what is learnt from which images in which order.
FREE = {"output", "resume", "cpu", "steps", "epochs", "eval_every", "log_every", "report_to", "keep", "num_workers"}
FREE |= {"no_check"}
PLACES = {"folder", "model", "teacher", "teacher_cache", "dataset"}  # files may have moved
PLACES |= {f"{split}_{kind}" for split in ("train", "val") for kind in ("images", "annotations", "maps")}
PER_STEP = {"batch_size", "accumulate"}  # only their product with the number of processes counts


def plain_settings(settings: TrainingSettings) -> dict:
    """Settings as json has them."""
    kinds = str | int | float | bool | list | dict | None
    return {name: value if isinstance(value, kinds) else str(value) for name, value in asdict(settings).items()}


def _kept(settings: TrainingSettings) -> dict:
    """What has to stay as it is for the rest of the run."""
    values = {name: value for name, value in plain_settings(settings).items() if name not in FREE | PLACES | PER_STEP}
    images = settings.batch_size * settings.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    return json.loads(json.dumps(values | {"images_per_step": images}))  # keys of mappings become strings


def check_output(settings: TrainingSettings):
    """Refuse a folder that has something else, and to resume with settings of another run.

    Raises:
        ValueError: also where there is nothing to resume.
    """
    folder = settings.output
    for name, source in (("model=", settings.model), ("teacher=", settings.teacher)):
        if source is not None and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder):
            raise ValueError(f"output={folder} is {name}, which would be overwritten: name another folder")
    last, started = last_complete_checkpoint(folder), folder / SETTINGS
    if not settings.resume:
        if last is not None:
            raise ValueError(f"output={folder} has checkpoints of another run: give resume= or another folder")
        if (folder / "config.json").exists():
            raise ValueError(f"output={folder} has a model, which would be overwritten: name another folder")
        return
    if last is None and not started.exists():
        raise ValueError(f"resume=: output={folder} has no complete checkpoint; start without resume=")
    if not started.exists():
        return
    try:
        before = json.loads(started.read_text())
    except ValueError as error:
        raise ValueError(f"resume=: {started} is not json ({error}); delete it to resume without a check") from error
    now = _kept(settings)
    names = [name for name in now if name in before and now[name] != before[name]]
    changed = [f"{name} {now[name]} (was {before[name]})" for name in names]
    if names:
        raise ValueError(
            f"resume= with other settings than the run in {folder} began with: {', '.join(changed)}; give the same "
            "ones, or start anew in another output="
        )


def write_settings(settings: TrainingSettings):
    """Keep what a run was started with, for `check_output`."""
    write_json(settings.output / SETTINGS, _kept(settings))


def steps_with_results(folder: Path) -> int:
    """Steps after which a run wrote its results; 0 without any."""
    try:
        return int(json.loads((folder / RESULTS).read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class StopAtCtrlC(TrainerCallback):
    """The first Ctrl-C ends training after the step with a checkpoint; a second one ends it at once.

    Of one process only: a launcher of several passes Ctrl-C on in its own way.
    """

    def __init__(self):
        self.pressed = False
        self._before = None

    def __enter__(self):
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error):
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number, frame):
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        print("\nCtrl-C: saving a checkpoint after this step. Once more to stop at once.", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.pressed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args, state, control, **kwargs):
        if self.pressed:
            control.should_training_stop = True


def how_to_go_on(output: Path) -> str:
    """What is left of an interrupted run."""
    last = last_complete_checkpoint(output)
    if last is None:
        return "No checkpoint was complete yet: the same command starts anew."
    return f"The same command with --resume goes on from step {Path(last).name.removeprefix('checkpoint-')}."
