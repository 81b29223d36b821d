"""The folder of a training run: what it was started with, where `--resume` begins, and how signals end it."""

import json
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import torch.distributed
from transformers import TrainerCallback

from ..data.json_files import write_json
from ..evaluation.processes import process_rank
from .checkpoints import last_complete_checkpoint
from .run_lock import RunLock
from .settings import TrainingSettings

SETTINGS, RESULTS = "settings.json", "results.json"
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
# What may differ when a run is resumed: it does not change what is learnt from which images in which order.
FREE = {"output", "resume", "cpu", "steps", "epochs", "eval_every", "log_every", "report_to", "keep", "num_workers"}
FREE |= {"no_check", "show_bands", "memory_budget", "gradient_checkpointing"}
PLACES = {"folder", "model", "teacher", "teacher_cache", "feature_cache", "dataset"}  # files may have moved
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
    """Refuse a folder that has something else or another run trains in, and to resume with settings of another run.

    Raises:
        ValueError: also where there is nothing to resume.
    """
    folder = settings.output
    for name, source in (("model=", settings.model), ("teacher=", settings.teacher)):
        if source is not None and os.path.isdir(source) and os.path.realpath(source) == os.path.realpath(folder):
            raise ValueError(f"output={folder} is {name}, which would be overwritten: name another folder")
    RunLock(folder).check()
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


class StopAtSignal(TrainerCallback):
    """The first Ctrl-C ends training after the step with a checkpoint; a second one ends it at once.

    SIGTERM, by which schedulers take a machine back, and SIGHUP, of a terminal that was closed, do the same. Signals
    that are ignored, as under nohup, stay so. Processes of a launcher ask each other after every step, so that all of
    them stop after the same one, whichever got the signal. (torchrun passes a signal on to its processes and kills
    them 30 seconds later.)

    Attributes:
        pressed: this process got a signal; `stopped`: every process knows that the run ends here.
    """

    def __init__(self):
        self.pressed = self.stopped = False
        self._before, self._process = {}, os.getpid()
        self._terminals = [number for number in (1, 2) if os.isatty(number)]  # stdout and stderr

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if os.getpid() != self._process:  # a worker that loads images: the step that is under way needs it
            return
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        rank, processes = process_rank()
        if processes > 1:  # one that waits for another is deaf to exceptions: the second signal is the system's
            for known in self._before:
                signal.signal(known, signal.SIG_DFL)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._leave_closed_terminals()
        try:
            if rank == 0:
                print(f"\n{name}: saving a checkpoint after this step. Once more to stop at once.", flush=True)
        except (OSError, RuntimeError):  # the reader is gone, or the signal came while something was printed
            pass

    def _leave_closed_terminals(self):
        """What is printed there from now on goes nowhere, instead of being an error."""
        for number in self._terminals:
            if not os.isatty(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)

    def _agree(self, device: torch.device) -> bool:
        """Whether any of the processes got a signal; all of them get the same answer."""
        self.stopped = self.pressed
        if process_rank()[1] > 1:
            flag = torch.tensor(int(self.pressed), device=device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag)
        return self.stopped

    def on_step_end(self, args, state, control, **kwargs):
        if self._agree(args.device):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, args, state, control, **kwargs):
        if self._agree(args.device):
            control.should_training_stop = True


def how_to_go_on(output: Path) -> str:
    """What is left of an interrupted run."""
    last = last_complete_checkpoint(output)
    if last is None:
        return "No checkpoint was complete yet: the same command starts anew."
    return f"The same command with --resume goes on from step {Path(last).name.removeprefix('checkpoint-')}."
