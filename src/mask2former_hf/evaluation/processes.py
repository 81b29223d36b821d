"""The processes of `torchrun` or `accelerate launch`: which one this is, and how a run leaves them."""

import contextlib
import os

from torch import distributed


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) of `torch.distributed`; (0, 1) without it."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def process_group(backend: str | None = None):
    """A run of one process or of several, which ends the group of processes that begins in it.

    A process that exits with a group still open may be aborted while Python shuts down ("terminate called without an
    active exception": 4 of 12 runs of two processes that only averaged a tensor, 0 of 12 of those that ended the
    group). A run that succeeds waits for the others first, because gloo may hang if it is torn down right after its
    last exchange; after an error there may be nobody to wait for.

    Args:
        backend: begin a group with it if a launcher started several processes; by default whatever runs inside
            (Trainer, Accelerate) begins one. A group that exists before is used and left as it is.
    """
    if not distributed.is_available() or distributed.is_initialized():
        yield
        return
    try:
        if backend is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed.init_process_group(backend)
        yield
        if distributed.is_initialized():
            distributed.barrier()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
