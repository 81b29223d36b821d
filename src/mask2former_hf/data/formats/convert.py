"""A data set from any reader into the folder of any format."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from PIL import Image

from ..example import Example
from ..images import read_size
from ..reader import FileReader, annotation
from .data_sets import WRITERS
from .labelled_mask import LabelledMask, cut_out, masks_of_example
from .writers import FormatWriter, ImageFile

BACKGROUND = "background"
_SEMANTIC = ("label-maps", "colour-maps")


def convert(
    dataset,
    root: str | Path,
    name: str,
    split: str = "train",
    tolerance: float = 0.0,
    progress: Callable[[Iterable], Iterable] = lambda examples: examples,
) -> dict[str, int]:
    """Write a data set, images included, in the format `name` of `data_sets.WRITERS`.

    Image files are copied as they are; images that are in no file are written as PNG. For semantic formats the
    background of data of instances becomes a class, "background", the last.

    Args:
        dataset: a reader.
        root: the folder, which may have other splits of the same classes.
        split: "train" or "val".
        tolerance: of polygons; see `data.polygons.polygons_of`.
        progress: wraps the numbers of the examples, such as tqdm.

    Returns:
        What the format cannot say, in words, and how often it occurred.

    Raises:
        ValueError: for classes that the format cannot hold.
        ImportError: if a package that the format needs is missing.
    """
    labels, stuff = dict(dataset.classes.id2label), list(dataset.classes.stuff_label_ids)
    with_background = name in _SEMANTIC and dataset.task == "instance"
    if with_background:
        stuff.append(len(labels))
        labels[len(labels)] = BACKGROUND
    writer = WRITERS[name](root, labels, stuff, split, tolerance)
    try:
        for index in progress(range(len(dataset))):
            example, image = _image(dataset, index, writer)
            masks = masks_of_example(example, labels)
            if with_background:
                masks += _background(example, len(labels) - 1)
            writer.add(image, masks)
    finally:
        writer.close()
    return {text: count for text, count in writer.lost.items() if count}


def _image(dataset, index: int, writer: FormatWriter) -> tuple[Example, ImageFile]:
    """An example and the place of its image, which is there afterwards."""
    source = dataset.image_path(index) if isinstance(dataset, FileReader) else None
    example = Example.of(dataset[index]) if source is None else annotation(dataset, index)
    if source is not None and (size := read_size(source)) != example.size:
        raise ValueError(
            f"{source}: is {size[0]}x{size[1]} and its annotation {example.size[0]}x{example.size[1]}: both must have "
            "the same size"
        )
    name = example.file_name or f"{example.image_id if example.image_id is not None else index}"
    if source is None:
        name = f"{PurePosixPath(name).with_suffix('')}.png"
    path = writer.image_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        Image.fromarray(example.image).save(path)
    else:
        shutil.copyfile(source, path)
    stem = str(PurePosixPath(name).with_suffix(""))
    image_id = index if example.image_id is None else example.image_id
    return example, ImageFile(path, name, stem, example.size, image_id)


def _background(example: Example, label_id: int) -> list[LabelledMask]:
    covered = (example.layers > 0).any(0)
    return [] if covered.all() else [cut_out(~covered, label_id=label_id, label=BACKGROUND, isthing=False)]
