"""Python processes for tests, forked from one that has imported torch and transformers and nothing of this package.

A process that imports them itself takes some 5 s of a core; one that is forked takes what its code takes. It begins
as `python WORDS` does: in a session of its own, with its own output, environment, modules of ours, and one thread.
What a launcher, an environment variable that torch or the Hub's client reads once, or the import itself does to a
process is tested with `subprocess`.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

IMPORTED = ("torch.distributed", "transformers.trainer", "transformers.models.swin.modeling_swin")
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(list(IMPORTED))


class Python:
    """`python WORDS`, begun: `-c CODE …`, `-m MODULE …` or `SCRIPT …`.

    Args:
        words: turned into text.
        directory: where it begins; None for that of this process.
        environment: variables beside those of this process.
    """

    def __init__(self, *words, directory=None, **environment):
        self.output = tempfile.TemporaryDirectory(prefix="forked-")  # it goes with this object
        variables = {name: str(value) for name, value in (os.environ | {"OMP_NUM_THREADS": 1} | environment).items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # of several threads a fork has one
            ensure_running()
        arguments = ([str(word) for word in words], variables, str(directory or os.getcwd()), self.output.name)
        self.process = _forked.Process(target=_begin, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    @property
    def stdout(self) -> str:
        return _text(Path(self.output.name, "stdout"))

    @property
    def stderr(self) -> str:
        return _text(Path(self.output.name, "stderr"))

    def wait_until(self, said, timeout: float = 120):
        """Until `said(self)` is true, or the process has ended."""
        deadline = time.monotonic() + timeout
        while not (found := said(self)) and self.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def kill(self, number: int = signal.SIGKILL):
        """A signal to the process and those that it began."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout: float = 240) -> SimpleNamespace:
        """returncode (minus the signal that ended it, or None for one that had to be killed), stdout, stderr."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.kill()
            self.process.join()
        return SimpleNamespace(returncode=code, stdout=self.stdout, stderr=self.stderr)


def python(*words, **options) -> SimpleNamespace:
    """`Python(...)` to its end, as `Python.wait` gives it."""
    return Python(*words, **options).wait()


@contextlib.contextmanager
def group_of_two():
    """Variables of each of two processes that torchrun would start; while it is open they find each other."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # of torchrun's agent
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    group |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    yield [group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]


def two_pythons(*words, **environment) -> list[SimpleNamespace]:
    """`python WORDS` as each of two processes that torchrun would start, both to their ends."""
    with group_of_two() as group:
        running = [Python(*words, **environment | variables) for variables in group]
        return [process.wait() for process in running]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _begin(words: list[str], environment: dict[str, str], directory: str, folder: str):
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
