"""Signals that end a process unwind it as Ctrl-C does, so that nothing half-written stays behind."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = ("SIGTERM", "SIGHUP")  # of `kill`, `timeout` and schedulers; of a terminal that was closed, not on Windows


class Ended(SystemExit):
    """By a signal; its code is the one that shells give such a process."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """In the block the first such signal raises `Ended`; a second one ends the process at once.

    Signals that are ignored, as under nohup, stay so. A training has a handler of its own.
    """
    process, before = os.getpid(), {}

    def end(number: int, frame):
        for known in before:
            signal.signal(known, signal.SIG_DFL)
        if os.getpid() != process:  # a forked worker, which has nothing of its own to put away
            os.kill(os.getpid(), number)
        raise Ended(number)

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
