"""How many of torch's threads a training step on a CPU is worth."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .memory import bytes_per_pixel

# A step is a thousand small parts, after each of which all threads wait for the last. 60 steps of the tiny model at
# 128 x 128, batch 4 (30 MB), took 5 s with one thread and 4 s with two on a quiet machine of 2 cores; under a load of
# 9 they took 27 s and 409 s, and where threads wait asleep (`cli.main`) half as long again with two as with one.
BYTES_PER_THREAD = 128e6
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # variables by which a user, or torchrun, says the number


def threads_for(model: nn.Module, side: int, batch_size: int) -> int:
    """Threads for steps of so many square images: one for each `BYTES_PER_THREAD` of their layers' outputs.

    Returns:
        At least 1, at most what torch would take.
    """
    work = bytes_per_pixel(model) * batch_size * side**2
    return max(1, min(torch.get_num_threads(), round(work / BYTES_PER_THREAD)))


@contextmanager
def fewer_threads(model: nn.Module, side: int, batch_size: int) -> Iterator[str]:
    """Within the block torch uses `threads_for` threads, on a CPU and unless one of `CHOSEN_BY` is set.

    Yields:
        In words what was chosen; "" where torch's own number stays.
    """
    usual = torch.get_num_threads()
    free = next(model.parameters()).device.type == "cpu" and not any(os.environ.get(name) for name in CHOSEN_BY)
    chosen = threads_for(model, side, batch_size) if free else usual
    torch.set_num_threads(chosen)
    try:
        sets = f"{CHOSEN_BY[0]} sets another number"
        yield "" if chosen == usual else f"{chosen} of {usual} threads: a step is too small for more ({sets})"
    finally:
        torch.set_num_threads(usual)
