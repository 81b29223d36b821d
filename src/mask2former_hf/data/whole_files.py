"""A file that is there whole, or as it was before."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, unique: str = "") -> Iterator[Path]:
    """A place beside a file, which takes the file's place at the end and disappears after an error.

    A link leads to the same file afterwards. Pipes and devices, as /dev/stdout, are written to: to take their place
    would be to take them away from everybody.

    Args:
        unique: part of its name, where several processes may write the file at a time.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()
    staging = path.with_name(f".{path.name}{unique}.part")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
