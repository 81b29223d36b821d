"""The folder of a run when something goes wrong: full disks, folders that vanish, two runs at once, signals."""

import os
import pty
import re
import resource
import shutil
import signal
import sys
import time

import pytest
from processes import Python, group_of_two
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import TrainerCallback

from mask2former_hf import TrainingRun, TrainingSettings
from mask2former_hf.cli.main import main
from mask2former_hf.training import run_folder
from mask2former_hf.training.checkpoints import saving
from mask2former_hf.training.run_folder import StopAtSignal
from mask2former_hf.training.run_lock import LOCK, FolderInUse, RunLock
from mask2former_hf.training.trainer import Mask2FormerTrainer

FLAGS = "--data scenes --train-limit 6 --val-limit 2 --backbone tiny --crop 64 --batch-size 2 --eval-every 2 --cpu"
SETTINGS = {"data": "scenes", "train_limit": 6, "val_limit": 2, "backbone": "tiny", "crop": 64, "batch_size": 2}
SETTINGS |= {"cpu": True, "steps": 50, "eval_every": 50}


def train(folder, *more):
    return main(["train", *FLAGS.split(), "--steps", "4", "--output", str(folder), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder


@pytest.fixture
def half(whole, tmp_path):
    """The same run, stopped after two steps."""
    folder = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    shutil.copy(whole / "settings.json", folder)
    return folder


@pytest.fixture
def size_limit():
    """Sets the largest size of a file for the rest of the test, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("too_large", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_goes_on_to_equal_weights(
    too_large, whole, half, size_limit, capsys
):
    size_limit((whole / "checkpoint-2" / too_large).stat().st_size - 1000)
    assert train(half, "--resume") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "mask2former-hf train: " in line]
    assert str(half) in line and "--resume goes on from step 2" in line
    assert "File too large" in line or "limit of file sizes" in line
    assert not (half / "checkpoint-4").exists()
    size_limit(resource.RLIM_INFINITY)
    assert train(half, "--resume") == 0
    assert_equal_weights(whole / "checkpoint-4", half / "checkpoint-4")


def assert_equal_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_close(other[name], tensor, rtol=0, atol=0, msg=name)


def test_a_folder_that_vanishes_while_saving_is_one_line(half, capsys, monkeypatch):
    save = Mask2FormerTrainer._save_optimizer_and_scheduler

    def without_folder(self, folder):
        shutil.rmtree(half)
        save(self, folder)

    monkeypatch.setattr(Mask2FormerTrainer, "_save_optimizer_and_scheduler", without_folder)
    assert train(half, "--resume") == 2
    said = capsys.readouterr().err
    assert f"{half / 'checkpoint-4'}: the folder is gone. No checkpoint was complete yet" in said


def test_a_folder_that_vanished_before_saving_is_made_and_locked_anew(tmp_path):
    folder, locks = tmp_path / "run", []

    class Remove(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            shutil.rmtree(folder, ignore_errors=True)

        def on_save(self, args, state, control, **kwargs):
            locks.append(other_process_may_take(folder))

    run = TrainingRun(TrainingSettings(output=folder, **SETTINGS | {"steps": 1, "eval_every": 1}), show=False)
    run.trainer.add_callback(Remove())
    run.train()
    assert locks == [False] and (folder / "checkpoint-1" / "complete").is_file()


def other_process_may_take(folder):
    """What a child process finds that looks at the lock."""
    child = os.fork()
    if child == 0:
        try:
            RunLock(folder).check()
        except FolderInUse:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def test_errors_that_are_not_about_files_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), saving(tmp_path):
        raise RuntimeError("CUDA out of memory")


HOLDER = """
import os, sys, time
from mask2former_hf.training.run_folder import StopAtSignal
from mask2former_hf.training.run_lock import RunLock
with RunLock(sys.argv[1]):
    if os.fork() == 0:  # as a worker that loads images, and that a kill of its parent does not reach
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_dead(half, capsys):
    first = Python("-c", HOLDER, half)
    try:
        assert first.wait_until(lambda process: process.stdout.endswith("\n")) and int(first.stdout) == first.pid
        before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
        assert train(half, "--resume") == 2
        said = capsys.readouterr().err
        assert f"--output {half} is that of a run which is still training (process {first.pid} on" in said
        assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        RunLock(half).check()
        with RunLock(half):
            assert str(os.getpid()) in (half / LOCK).read_text()
    finally:
        first.kill()


class SendSignal(TrainerCallback):
    """A signal to this very process in a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_and_a_second_one_ends_the_run_at_once(number, tmp_path, capsys):
    before = signal.getsignal(number)
    run = TrainingRun(TrainingSettings(output=tmp_path / "run", **SETTINGS), show=False)
    run.trainer.add_callback(SendSignal(number, step=1))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert (tmp_path / "run" / "checkpoint-2" / "complete").is_file() and not (tmp_path / "run/results.json").exists()
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"{name}: saving a checkpoint after this step" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    twice = TrainingRun(TrainingSettings(output=tmp_path / "twice", **SETTINGS), show=False)
    for _ in range(2):
        twice.trainer.add_callback(SendSignal(number, step=1))
    with pytest.raises(KeyboardInterrupt):
        twice.train()
    assert twice.trainer.state.global_step == 1 and not list((tmp_path / "twice").glob("checkpoint-*"))


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    command = ["-m", "mask2former_hf", "train", *FLAGS.split(), "--batch-size", 1]
    command += ["--steps", 5000, "--eval-every", 5000, "--output", tmp_path]
    with group_of_two() as group:
        first, second = (Python(*command, **variables) for variables in group)
        first.wait_until(lambda process: re.search(r"[1-9]\d*/5000", process.stderr))
        os.kill(second.pid, signal.SIGTERM)
        first, second = (process.wait() for process in (first, second))
    assert (first.returncode, second.returncode) == (130, 130), first.stderr + second.stderr
    (step,) = re.findall(r"Interrupted at step (\d+)", first.stdout)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step}" and (checkpoint / "complete").is_file()
    assert {path.name for path in checkpoint.glob("rng_state_*.pth")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert "Interrupted" not in second.stdout


def test_the_second_signal_to_one_of_several_processes_is_the_systems(monkeypatch):
    """One that waits for another does not come to raise an exception."""
    monkeypatch.setattr(run_folder, "process_rank", lambda: (1, 2))
    with StopAtSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.pressed and signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_run_whose_terminal_is_closed_saves_and_prints_into_the_void(tmp_path):
    child, terminal = pty.fork()
    if child == 0:  # its leader, which gets SIGHUP
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        try:
            with StopAtSignal() as stop:
                print("ready", flush=True)
                deadline = time.monotonic() + 60
                while not stop.pressed and time.monotonic() < deadline:
                    time.sleep(0.01)
            for stream in (sys.stdout, sys.stderr):
                print("step 1", file=stream, flush=True)
            (tmp_path / "pressed").write_text(str(stop.pressed))
        finally:
            os._exit(0)
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 100)
    os.close(terminal)
    os.waitpid(child, 0)
    assert (tmp_path / "pressed").read_text() == "True"


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopAtSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.pressed and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
