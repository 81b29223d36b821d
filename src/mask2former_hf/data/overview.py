"""What a data set holds: read and counted before a training run starts."""

from .classes import count_ids
from .example import Example


def annotation(dataset, index: int) -> Example:
    """An example of a data set, without opening the image where the reader can do that."""
    return Example.of(dataset.annotation(index) if hasattr(dataset, "annotation") else dataset[index])


def scan(dataset, most: int = 5000, progress=None) -> dict:
    """Look through the annotations before training.

    Args:
        dataset: has `classes`; files of images are not opened where the reader has `annotation`.
        most: examples looked at, spread evenly.
        progress: wraps the range of indices, for example tqdm.

    Returns:
        `{"examples", "pixels": per class, "segments": {"largest", "mean"}, "empty", "overlapping"}`, the last two
        numbers of examples; segments without crowds.
    """
    step = max(1, len(dataset) // most)
    indices = range(0, len(dataset), step)
    pixels, counts, overlapping = [0] * len(dataset.classes), [], 0
    for index in indices if progress is None else progress(indices):
        example = annotation(dataset, index)
        targets = {segment["id"]: segment["category_id"] for segment in example.objects}
        counts.append(len(targets))
        overlapping += len(example.layers) > 1
        for number, area in zip(*count_ids(example.segmentation), strict=True):
            if number in targets:
                pixels[targets[number]] += area
    mean = sum(counts) / len(counts)
    return {
        "examples": len(counts),
        "pixels": pixels,
        "segments": {"largest": max(counts), "mean": mean},
        "empty": counts.count(0),
        "overlapping": overlapping,
    }
