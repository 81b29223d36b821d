"""Rows with COCO's run lengths in Parquet: for pandas, DuckDB, Spark and `datasets`."""

from collections.abc import Iterable
from pathlib import Path

from ..rle import coco_code
from .labelled_mask import LabelledMask


def rows(masks: Iterable[LabelledMask], size: tuple[int, int], image_id: int | str, file_name: str) -> list[dict]:
    """A row per segment."""
    codes = ((mask, coco_code(mask.runs, size)["counts"]) for mask in masks)
    return [row(mask, size, image_id, file_name, counts) for mask, counts in codes]


def row(mask: LabelledMask, size: tuple[int, int], image_id: int | str, file_name: str, counts: str) -> dict:
    """Of one segment; `counts` are COCO's compressed run lengths, of the size `height` x `width`."""
    height, width = size
    return {
        "image_id": str(image_id),
        "file_name": file_name,
        "height": height,
        "width": width,
        "label_id": mask.label_id,
        "label": mask.label,
        "score": mask.score,
        "iscrowd": mask.iscrowd,
        "area": mask.area,
        "box": list(mask.box),
        "counts": counts,
    }


def row_schema():
    """`pyarrow.schema` of the rows.

    Raises:
        ImportError: without pyarrow.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    text, whole = pyarrow.string(), pyarrow.int32()
    return pyarrow.schema(
        {
            "image_id": text,
            "file_name": text,
            "height": whole,
            "width": whole,
            "label_id": whole,
            "label": text,
            "score": pyarrow.float32(),
            "iscrowd": pyarrow.bool_(),
            "area": pyarrow.int64(),
            "box": pyarrow.list_(whole, 4),
            "counts": text,
        }
    )


class RowFile:
    """A Parquet file that grows by groups of rows, so that memory holds one group."""

    GROUP = 10_000  # rows

    def __init__(self, path: Path):
        self.schema = row_schema()
        import pyarrow
        from pyarrow import parquet

        self._table = pyarrow.Table.from_pylist
        self._file, self._rows = parquet.ParquetWriter(path, self.schema), []

    def add(self, new: list[dict]):
        self._rows += new
        if len(self._rows) >= self.GROUP:
            self._flush()

    def close(self):
        self._flush()
        self._file.close()

    def _flush(self):
        self._file.write_table(self._table(self._rows, schema=self.schema))
        self._rows = []
