"""Columns of images into columns of segments: what engines for many machines hand out and take back."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from ..data.errors import DataError, data_errors
from ..data.formats.parquet import row_schema
from .rules import Rules
from .segmentation import Segmentation

PROBLEM = "problem"
COLUMNS = (
    *("image_id", "file_name", "height", "width", "label_id", "label", "score", "iscrowd", "area", "box", "counts"),
    PROBLEM,
)


def batch_schema():
    """`pyarrow.schema` of `rows_of_batch`."""
    import pyarrow

    return row_schema().append(pyarrow.field(PROBLEM, pyarrow.string()))


@contextmanager
def one_thread_of_torch_if_forked() -> Iterator[None]:
    """`model.forked_processes.one_thread_if_forked` where torch is; an export's runtime does without."""
    if "torch" not in sys.modules:
        yield
        return
    from ..model.forked_processes import one_thread_if_forked

    with one_thread_if_forked():
        yield


def rows_of_batch(
    segmenter,
    batch: Mapping[str, Sequence],
    indices: Sequence[int] | None,
    image: str,
    image_id: str | None,
    batch_size: int,
    rules: Rules,
) -> dict[str, list]:
    """See `Segmenter.on_batch`."""
    values = [_image(value) for value in _column(batch, image, "image")]
    paths = [path for _, path in values]
    if image_id is not None:
        ids = list(_column(batch, image_id, "image_id"))
    else:
        ids = paths if indices is None else list(indices)
    if any(value is None for value in ids):
        raise ValueError(
            f"image_id={image_id!r}: images need an id; name the column that has it ({_names(batch)}), or give indices"
        )
    rows = {name: [] for name in COLUMNS}
    for number, found in _results(segmenter, [value for value, _ in values], batch_size, rules):
        file_name = paths[number] or str(ids[number])
        if isinstance(found, DataError):
            new = [{"image_id": str(ids[number]), "file_name": file_name, PROBLEM: str(found)}]
        else:
            new = found.to_rows(ids[number], file_name)
        for name, column in rows.items():
            column += [row.get(name) for row in new]
    return rows


def _results(segmenter, images: list, batch_size: int, rules: Rules) -> Iterator[tuple[int, Segmentation | DataError]]:
    """Per image, in their order, its result, or why it cannot be read."""
    for first in range(0, len(images), batch_size):
        opened, found = [], {}
        for number in range(first, min(first + batch_size, len(images))):
            try:
                with data_errors():
                    windows = segmenter.open(images[number])
                    if segmenter.tile is not None:  # windows of a file are read with the tiles
                        found[number] = segmenter.segment_windows(windows, rules, batch_size)
                        continue
                opened.append((number, windows))
            except DataError as error:
                found[number] = error
        if opened:
            pixels = [windows.read((0, 0, *windows.size[::-1])) for _, windows in opened]
            results = segmenter.segment(pixels, rules)
            found |= {number: result for (number, _), result in zip(opened, results, strict=True)}
        yield from sorted(found.items())


def _image(value) -> tuple:
    """What `Segmenter.open` takes, and its path if it has one."""
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        content, path = value.get("bytes"), value.get("path")
        return (path if content is None else content), path
    if isinstance(value, bytearray | memoryview):
        return bytes(value), None
    if isinstance(value, np.ndarray) and value.dtype == object:  # rows of rows, as pandas and Arrow have arrays
        value = np.array(value.tolist())
    if isinstance(value, list):
        value = np.array(value)
    return value, str(value) if isinstance(value, str) else None


def _column(batch: Mapping[str, Sequence], name: str, argument: str) -> Sequence:
    if name not in batch:
        raise ValueError(f"{argument}={name!r}: the batch has the columns {_names(batch)}; name one")
    return batch[name]


def _names(batch: Mapping[str, Sequence]) -> str:
    return ", ".join(map(str, batch))
