"""torch in processes that were forked, as those of `datasets.map(num_proc=2)` are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOADED_BY = os.getpid()


@contextmanager
def one_thread_if_forked() -> Iterator[None]:
    """Within the block, or the function, torch computes in one thread if this process was forked after the import.

    A fork takes the calling thread along and no other, but OpenMP's pool counts on those that the parent had begun:
    the first operation of several threads waits for them for ever, or crashes. torch's `DataLoader` has one thread in
    its workers for that reason, too.
    """
    usual = torch.get_num_threads()
    if os.getpid() == _LOADED_BY or usual == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
