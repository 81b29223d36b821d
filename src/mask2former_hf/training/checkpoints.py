"""Checkpoints of a run: which one is complete, and what becomes of one that cannot be written."""

import contextlib
import errno
import os
import re
import traceback
from pathlib import Path

import torch
from safetensors import SafetensorError

COMPLETE = "complete"  # an empty file that is written into a checkpoint's folder last
_UNKNOWN = "could not be written to the end: the disk is full, or over a quota or a limit of file sizes"


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-<step>` that was saved to the end; None if there is none."""
    folder = Path(output_dir)
    steps = [
        int(path.name.removeprefix("checkpoint-"))
        for path in (folder.glob("checkpoint-*") if folder.is_dir() else ())
        if path.name.removeprefix("checkpoint-").isdigit() and (path / COMPLETE).is_file()
    ]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None


@contextlib.contextmanager
def saving(folder: str | Path):
    """Turn whatever the writers of weights and optimizers raise on a full or lost disk into one kind of error.

    Raises:
        OSError: with the system's reason and, if it is not known better, `folder` as the file.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from error
    except SafetensorError as error:  # "... I/O error: No space left on device (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not _is_of_torch_writer(error):
            raise
        if not Path(folder).is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(folder)) from error
        raise OSError(errno.EIO, _UNKNOWN, str(folder)) from error


def _is_of_torch_writer(error: RuntimeError) -> bool:
    """Whether `torch.save` raised it: its words for a full disk are many ("unexpected pos", "iostream error", ...)."""
    return any(frame.filename == torch.serialization.__file__ for frame in traceback.extract_tb(error.__traceback__))
