"""Reader of the tables of segments that this package writes."""

from pathlib import Path

from .annotations import decode_mask
from .images import IMAGE_SUFFIXES
from .object_files import ObjectFiles, ObjectRecord
from .paths import files_by_name, locate


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
        for row in rows:
            file = files[row["file_name"]]
            sizes[file] = row["height"], row["width"]
            objects[file].append((row["label"], bool(row.get("iscrowd")), row["counts"]))
        records = [
            ObjectRecord(str(Path(file).with_suffix("")), folder / file, sizes.get(file), entries, source)
            for file, entries in objects.items()
        ]
        super().__init__(records, {row["label"] for row in rows}, classes, source)

    def draw(self, objects, size, source):
        for label, is_crowd, counts in objects:
            yield label, is_crowd, decode_mask({"size": list(size), "counts": counts}, size, source)


def read_rows(source: Path, most: int | None = None) -> list[dict]:
    """The rows of a table of segments, all or the first so many.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `ParquetRows`.
    """
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such table")
    rows, needed, optional = [], ["file_name", "height", "width", "label", "counts"], ["iscrowd"]
    try:
        table = parquet.ParquetFile(source)
        present = table.schema_arrow.names
        if missing := [name for name in needed if name not in present]:
            raise ValueError(f"{source}: has no column {', '.join(missing)}; it is no table of segments")
        columns = needed + [name for name in optional if name in present]
        for batch in table.iter_batches(batch_size=most or 10_000, columns=columns):
            rows += batch.to_pylist()
            if most is not None and len(rows) >= most:
                break
        return rows[:most]
    except ArrowInvalid as error:
        raise ValueError(f"{source}: not a Parquet file ({error})") from None
