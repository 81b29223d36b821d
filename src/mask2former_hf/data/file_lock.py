"""Locks of files, which end with the process that holds them."""

import errno
import os
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: nothing is locked
    fcntl = None


class Locked(OSError):
    """Another process holds the lock; its text says which."""


class FileLock:
    """A lock of the kind that a forked process does not inherit, so that workers of a killed run hold none.

    Where the file system has no locks, nothing is kept out.

    Raises:
        Locked: by `take` and `check`, naming the process that holds it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self._file = Path(path), None

    @property
    def is_held(self) -> bool:
        """Whether this process has it, and the file is still there."""
        return self._file is not None and self._is_there(self._file)

    def take(self):
        if fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(self.path, "a+")
            try:
                _lock(file)
            except Locked:
                file.close()
                raise
            if self._is_there(file):  # whoever had it may have removed it meanwhile
                break
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.release()
        self._file = file

    def release(self):
        """Give it back; the file stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def check(self):
        """Fail if another process has it, and leave it as it is."""
        if fcntl is not None and self.path.exists():
            try:
                with open(self.path, "r+") as file:
                    _lock(file)
            except Locked:
                raise
            except OSError:  # a folder that one may read only
                pass

    def _is_there(self, file) -> bool:
        return self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat())


def _lock(file):
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks, as some NFS
            return
        file.seek(0)
        raise Locked(file.read().strip()) from error
