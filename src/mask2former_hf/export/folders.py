"""The folder of an export: complete, or as it was before."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..inference.export_files import REPORT
from .errors import ExportError

PROGRAM_REPORT = "program.json"


@contextlib.contextmanager
def complete_or_nothing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the one that is wanted, which takes its place at the end and disappears after an error.

    Args:
        overwrite: an earlier export at `folder` may be replaced, nothing else.
    """
    _check_place(folder, overwrite)
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            new, old = Path(place) / "new", Path(place) / "old"
            new.mkdir()
            yield new
            _exchange(folder, new, old)
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # it has something else by now
                parent.rmdir()
        raise


def _check_place(folder: Path, overwrite: bool):
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ExportError(f"{folder}: would replace the folder that you are in; name a folder of its own")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not any((folder / name).is_file() for name in (REPORT, PROGRAM_REPORT)):
        raise ExportError(f"{folder}: exists already, and is no export that could be replaced; name another place")
    if not overwrite:
        raise ExportError(f"{folder}: exists already; name another place, or overwrite it")


def _exchange(folder: Path, new: Path, old: Path):
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
