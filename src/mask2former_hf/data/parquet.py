"""Reader of the tables of segments that this package writes."""

from pathlib import Path

from .annotations import decode_mask
from .fields import FILE_NAME, FLAG, NAME, PIXELS, Rule, read_entry
from .images import IMAGE_SUFFIXES
from .object_files import FoundObject, ObjectFiles, ObjectRecord
from .paths import files_by_name, locate


def _counts(value) -> bytes | str:
    if not isinstance(value, bytes | str):
        raise ValueError
    return value


_ROW = {
    "file_name": FILE_NAME,
    "height": PIXELS,
    "width": PIXELS,
    "label": NAME,
    "counts": Rule(_counts, "COCO's compressed run lengths, a text"),
    "iscrowd": FLAG.optional(),
}


class ParquetRows(ObjectFiles):
    """A table with a row per segment (`formats.parquet`) and a folder of images.

    Images of the folder that no row names have no object. See `Example`.

    Args:
        images: folder of the images.
        annotations: the table, with the columns `file_name`, `height`, `width`, `label`, `counts`, and maybe
            `iscrowd`.
        classes: any form of `class_forms.class_table`; None for all labels, by the alphabet.

    Raises:
        ImportError: without pyarrow.
        FileNotFoundError: for images that are not there.
        ValueError: for columns that are not there.
    """

    def __init__(self, images: str | Path, annotations: str | Path, classes=None):
        folder, source = Path(images), Path(annotations)
        rows = read_rows(source)
        names = list(dict.fromkeys(row["file_name"] for row in rows))
        files = dict(zip(names, locate(folder, "images", names, source), strict=True))
        objects = {file: [] for file in files_by_name(folder, "images", IMAGE_SUFFIXES).values()}
        sizes = {}
        for number, row in enumerate(rows):
            file, size = files[row["file_name"]], (row["height"], row["width"])
            if sizes.setdefault(file, size) != size:
                raise ValueError(
                    f"{source}: row {number} says {size[0]} x {size[1]} pixels of {row['file_name']}, and an earlier "
                    f"row {sizes[file][0]} x {sizes[file][1]}; correct one of them"
                )
            found = FoundObject(row["label"], bool(row.get("iscrowd")), row["counts"], f"row {number}")
            objects[file].append(found)
        records = [
            ObjectRecord(str(Path(file).with_suffix("")), folder / file, sizes.get(file), entries, source)
            for file, entries in objects.items()
        ]
        super().__init__(records, classes, source)

    def draw(self, outline, size, where):
        return decode_mask({"size": list(size), "counts": outline}, size, where)


def read_rows(source: Path, most: int | None = None) -> list[dict]:
    """The rows of a table of segments, all or the first so many, checked.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `ParquetRows`.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such table")
    rows = []
    try:
        table = parquet.ParquetFile(source)
        present = table.schema_arrow.names
        if missing := [name for name, rule in _ROW.items() if rule.needed and name not in present]:
            raise ValueError(f"{source}: has no column {', '.join(missing)}; it is no table of segments")
        columns = [name for name in _ROW if name in present]
        for batch in table.iter_batches(batch_size=most or 10_000, columns=columns):
            rows += batch.to_pylist()
            if most is not None and len(rows) >= most:
                break
    except (ArrowException, OSError) as error:  # of a file whose first bytes are Parquet's, all kinds of them
        reason = " ".join(str(error).split())  # Arrow's have several lines
        raise ValueError(f"{source}: not a Parquet file ({reason})") from None
    return [read_entry(row, _ROW, f"{source}: row {number}") for number, row in enumerate(rows[:most])]
