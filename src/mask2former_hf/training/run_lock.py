"""One run per folder: a lock that ends with the process that holds it."""

import errno
import os
import socket
from pathlib import Path

from transformers import TrainerCallback

try:
    import fcntl
except ImportError:  # not a Unix: runs are not kept apart
    fcntl = None

LOCK = ".lock"


class FolderInUse(ValueError):
    """Another run trains in the folder."""


class RunLock(TrainerCallback):
    """Keeps other runs out of a folder while the block runs; of several processes the first one does.

    The lock is of the kind that a forked process does not inherit: a worker that loads images may live on for seconds
    after its run was killed, and must not keep the folder from `--resume`. Where the file system has no locks, nothing
    is kept out. A folder that was removed meanwhile is taken anew, with the next checkpoint.

    Raises:
        FolderInUse: naming the folder and the process.
    """

    def __init__(self, folder: Path):
        self.path, self._file = Path(folder) / LOCK, None
        self._first = os.environ.get("RANK", "0") == "0"  # before torch.distributed is initialised

    def __enter__(self):
        if fcntl is not None and self._first:
            self._take()
        return self

    def __exit__(self, *error):
        if self._file is not None:
            self._file.close()
            self._file = None

    def check(self):
        """Refuse a folder that another process has locked, and leave it as it is."""
        if fcntl is not None and self._first and self.path.exists():
            try:
                with open(self.path, "r+") as file:
                    self._lock(file)
            except OSError:  # a folder that one may read only
                pass

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and self._file is not None and not self._is_there():
            self._take()

    def _take(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+")
        try:
            self._lock(file)
        except FolderInUse:
            file.close()
            raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.__exit__()
        self._file = file

    def _is_there(self) -> bool:
        return self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())

    def _lock(self, file):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks, as some NFS
                return
            file.seek(0)
            owner = file.read().strip()
            raise FolderInUse(
                f"output={self.path.parent} is that of a run which is still training ({owner}): wait for it, or name "
                "another folder"
            ) from error
