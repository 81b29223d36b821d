"""What is wrong with someone's data, told apart from faults of the program wherever it comes to light."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DataError(OSError, ValueError):
    """An example that cannot be used, with its file or row and the reason.

    Its text stays that one line when a worker process of a `DataLoader` raised it: torch makes a new exception there,
    of the same class, whose text is the whole traceback.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip()


@contextmanager
def data_errors(where: str = "") -> Iterator[None]:
    """What the block, or the decorated function, raises about files and their content becomes a `DataError`.

    Args:
        where: file or row, of errors that do not name it.
    """
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error


@contextmanager
def naming(file: str | Path) -> Iterator[None]:
    """What the block says is wrong with the content of a file gets the file's name, unless it has it."""
    try:
        yield
    except ValueError as error:
        if str(file) in str(error):
            raise
        raise ValueError(f"{file}: {error}") from None
