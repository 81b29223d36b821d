"""One run per folder: a lock that ends with the process that holds it."""

import os
from pathlib import Path

from transformers import TrainerCallback

from ..data.file_lock import FileLock, Locked

LOCK = ".lock"


class FolderInUse(ValueError):
    """Another run trains in the folder."""


class RunLock(TrainerCallback):
    """Keeps other runs out of a folder while the block runs; of several processes the first one does.

    A worker that loads images may live on for seconds after its run was killed, and must not keep the folder from
    `--resume`; see `FileLock`. A folder that was removed meanwhile is taken anew, with the next checkpoint.

    Raises:
        FolderInUse: naming the folder and the process.
    """

    def __init__(self, folder: Path):
        self.path, self._lock = Path(folder) / LOCK, FileLock(Path(folder) / LOCK)
        self._first = os.environ.get("RANK", "0") == "0"  # before torch.distributed is initialised

    def __enter__(self):
        if self._first:
            self._ask(self._lock.take)
        return self

    def __exit__(self, *error):
        self._lock.release()

    def check(self):
        """Refuse a folder that another process has locked, and leave it as it is."""
        if self._first:
            self._ask(self._lock.check)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and self._first and not self._lock.is_held:
            self._ask(self._lock.take)

    def _ask(self, question):
        try:
            question()
        except Locked as error:
            raise FolderInUse(
                f"output={self.path.parent} is that of a run which is still training ({error}): wait for it, or name "
                "another folder"
            ) from error
