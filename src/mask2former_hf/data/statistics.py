"""What a data set holds, looked through before training: pixels, objects, and what of it counts for nothing."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from .classes import BACKGROUND_ID, ClassTable, count_ids
from .example import Example
from .findings import WARNING, Finding
from .reader import annotation


@dataclass(frozen=True)
class Statistics:
    """Counts over the examples that were looked at.

    Args:
        classes: of the data set.
        examples: how many were looked at.
        pixels: per class; crowds do not count, segments that overlap count fully.
        objects: segments that are no crowds, those without a pixel included.
        most: the largest number of objects in an example.
        empty: objects without a pixel.
        crowds: segments with `iscrowd` 1.
        without: examples without an object.
        overlapping: examples with segments that overlap.
        background, void: pixels that are stated to be no segment, and pixels that are ignored, over all layers.
        all_void: examples in which every pixel is ignored.
        left_out: examples that the reader leaves out because they have no object (`Reader.left_out`).
    """

    classes: ClassTable
    examples: int = 0
    pixels: tuple[int, ...] = ()
    objects: int = 0
    most: int = 0
    empty: int = 0
    crowds: int = 0
    without: int = 0
    overlapping: int = 0
    background: int = 0
    void: int = 0
    all_void: int = 0
    left_out: int = 0

    @property
    def mean(self) -> float:
        """Objects per example."""
        return self.objects / max(self.examples, 1)

    def lines(self) -> list[str]:
        """What counts for nothing, a sentence each; none if everything counts."""
        segments, images = self.objects + self.crowds, self.examples
        found = [
            (self.empty, f"{self.empty} of {segments} objects have no pixel: there is nothing to learn from them"),
            (self.crowds, f"{self.crowds} of {segments} objects are crowds (iscrowd is 1), which are ignored"),
            (self.without, f"{self.without} of {images} images have no object; they are used"),
            (self.left_out, f"{self.left_out} of {self.left_out + images} images have no object and are not used"),
            (self.all_void, f"{self.all_void} of {images} images are ignored in every pixel"),
        ]
        return [line for number, line in found if number]

    def findings(self, where: str) -> list[Finding]:
        """What is probably a mistake."""
        used = [row.name for row, count in zip(self.classes.rows, self.pixels, strict=True) if count]
        share = self.void / max(self.void + self.background + sum(self.pixels), 1)
        names = ", ".join([row.name for row in self.classes.rows if row.name not in used][:5])
        absent = len(self.classes) - len(used)
        found = [
            (
                self.crowds > self.objects,
                f"{self.crowds} of {self.objects + self.crowds} objects are crowds (iscrowd is 1)",
                "crowds are ignored, and some tools export masks drawn with a brush so",
                "set iscrowd to 0 for single objects",
            ),
            (
                len(used) == 1 and not self.background,
                f"every pixel that counts is {used[0] if used else ''!r}, so that any model is right",
                "nothing else is stated to be learnt",
                "give the other pixels a class of their own, such as {0: 'background'}, instead of ignoring them",
            ),
            (
                share > 0.5,
                f"{share:.0%} of the pixels are ignored",
                "the masks do not cover the images, and nothing is learnt in the rest",
                "declare what is to be learnt there as a class",
            ),
            (
                2 * absent > len(self.classes) > 2,
                f"{absent} of {len(self.classes)} classes do not occur, such as {names}",
                "they can be neither learnt nor measured here",
                "if they should occur, the labels are those of another class set: give the right one",
            ),
        ]
        return [Finding(WARNING, where, *texts) for is_so, *texts in found if is_so]

    def warnings(self) -> list[str]:
        """What is probably a mistake, each with its reason and repair."""
        return [finding.line for finding in self.findings("")]

    def check(self):
        """Refuse data from which nothing can be learnt.

        Raises:
            ValueError: says why nothing counts.
        """
        if sum(self.pixels) == 0:
            reasons = "; ".join(self.lines()) or "no segment has a pixel"
            raise ValueError(f"nothing to learn in the {self.examples} examples looked at: {reasons}")


def look_through(
    dataset, most: int = 5000, progress: Callable[[Iterable], Iterable] = lambda examples: examples
) -> Statistics:
    """Count what a data set holds, from its annotations.

    Args:
        dataset: has `classes` and gives examples; of readers of files no image is read.
        most: examples looked at, spread evenly; of a stream the first.
        progress: wraps the numbers of the examples, such as tqdm.
    """
    counts, pixels, most_objects = Counter(), [0] * len(dataset.classes), 0
    for example in _annotations(dataset, most, progress):
        areas = dict(zip(*count_ids(example.segmentation), strict=True))
        for segment in example.objects:
            if not 0 <= segment["category_id"] < len(pixels):
                raise ValueError(
                    f"{example.name}: category_id {segment['category_id']} is no index of the {len(pixels)} classes; "
                    f"it must be 0 to {len(pixels) - 1}"
                )
            pixels[segment["category_id"]] += areas.get(segment["id"], 0)
        most_objects = max(most_objects, len(example.objects))
        counts.update(
            examples=1,
            objects=len(example.objects),
            empty=sum(segment["id"] not in areas for segment in example.objects),
            crowds=len(example.crowds),
            without=int(not example.objects),
            overlapping=int(len(example.layers) > 1),
            background=areas.get(BACKGROUND_ID, 0),
            void=areas.get(0, 0),
            all_void=int(areas.keys() == {0}),
        )
    left_out = getattr(dataset, "left_out", 0)
    return Statistics(dataset.classes, pixels=tuple(pixels), most=most_objects, left_out=left_out, **counts)


def _annotations(dataset, most: int, progress) -> Iterator[Example]:
    if not hasattr(dataset, "__len__"):
        yield from map(Example.of, progress(islice(dataset, most)))
        return
    for index in progress(evenly_spread(len(dataset), most)):
        yield annotation(dataset, index)


def evenly_spread(number: int, most: int) -> range:
    """Indices of the examples that are looked at: about `most` of `number`."""
    return range(0, number, max(1, number // most))


class BandStatistics(NamedTuple):
    """Type of the numbers, mean and standard deviation of each band, and how many images were looked at."""

    dtype: np.dtype
    mean: np.ndarray
    std: np.ndarray
    images: int


def measure_bands(dataset, most: int) -> BandStatistics:
    """Of the pixels of up to `most` images, evenly spread over a data set; every image counts the same.

    A band that is the same number everywhere has the deviation 1.

    Raises:
        ValueError: for images that differ in their type or number of bands.
    """
    images = min(most, len(dataset))
    first, moments = None, []
    for index in np.linspace(0, len(dataset) - 1, images).round().astype(int).tolist():
        example = Example.of(dataset[index])
        image = example.image
        kind = f"{image.shape[2]} bands of {image.dtype}"
        first = first or (kind, example.name)
        if kind != first[0]:
            raise ValueError(
                f"{first[1]} has {first[0]} and {example.name} {kind}: one scale does not fit both; save one type"
            )
        pixels = image.reshape(-1, image.shape[2]).astype(np.float64)
        moments.append((pixels.mean(0), pixels.var(0)))
    means, variances = (np.stack(column) for column in zip(*moments, strict=True))
    std = np.sqrt(variances.mean(0) + means.var(0))
    return BandStatistics(image.dtype, means.mean(0), np.where(std > 0, std, 1.0), images)
