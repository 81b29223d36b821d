"""The images that a report shows: drawn small when they are among the worst or the best so far, and let go after."""

import io
import math
from bisect import insort
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from ..data.example import Example
from ..data.pictures import to_picture
from ..data.runs import NOTHING, joined, runs_of_map
from ..inference.segmentation import Segmentation, result_of_runs

COUNT = 12  # of the worst images, and of the best
SIDE = 480  # pixels of a picture; 72 of them as JPEG are about 3 MB


class Picture(NamedTuple):
    """An image, its truth and its prediction, as JPEG; pictures sort by quality, equal ones by number or name."""

    quality: float
    number: str
    name: str
    image: bytes
    truth: bytes
    prediction: bytes


class Kept:
    """The `COUNT` worst and best images, `worst` and `best` first."""

    def __init__(self):
        self.worst: list[Picture] = []
        self.best: list[Picture] = []

    def offer(
        self,
        quality: float,
        image_id: Hashable,
        name: str,
        example: Example,
        result: Segmentation,
        stuff: set[int],
        threshold: float,
    ):
        """Draw and keep an image if it is among the worst or the best.

        Args:
            quality: in [0, 1]; an image of nan is not kept.
            stuff: classes that are stuff.
            threshold: segments of lower scores are not drawn.
        """
        key = (quality, str(image_id).rjust(12))  # whole numbers sort as numbers
        wanted = not math.isnan(quality) and (
            len(self.worst) < COUNT or key < self.worst[-1][:2] or key > self.best[-1][:2]
        )
        if wanted:
            self._keep(Picture(*key, name, *_panels(example, result, stuff, threshold)))

    def merge(self, other: "Kept"):
        """Keep the worst and the best of both."""
        for picture in {picture[:2]: picture for picture in [*other.worst, *other.best]}.values():
            self._keep(picture)

    def _keep(self, picture: Picture):
        insort(self.worst, picture)
        insort(self.best, picture, key=lambda p: (-p.quality, *map(_Reversed, p[1:3])))
        del self.worst[COUNT:], self.best[COUNT:]


class _Reversed:
    """Text that sorts the other way round."""

    def __init__(self, text: str):
        self.text = text

    def __lt__(self, other: "_Reversed") -> bool:
        return other.text < self.text

    def __eq__(self, other) -> bool:
        return self.text == other.text


def _panels(example: Example, result: Segmentation, stuff: set[int], threshold: float) -> list[bytes]:
    step = -(-max(example.size) // SIDE)
    image = Image.fromarray(to_picture(example.image)).reduce(step)
    sure = [n for n, s in enumerate(result.segments) if s.score is None or s.score >= threshold]
    shown = replace(result, segments=tuple(result.segments[n] for n in sure), runs=tuple(result.runs[n] for n in sure))
    truth = _truth(example, result, stuff)
    nothing = replace(result, task="instance", segments=(), runs=())
    return [_jpeg(part.reduced(step).plot(image)) for part in (nothing, truth, shown)]


def _truth(example: Example, result: Segmentation, stuff: set[int]) -> Segmentation:
    """The annotation as a result of the same kind."""
    layers = [runs_of_map(layer) for layer in example.layers]
    segments = [s for s in example.segments if result.task != "instance" or s["category_id"] not in stuff]
    rows = [
        (s["id"], s["category_id"], None, joined(*(layer.get(s["id"], NOTHING) for layer in layers))) for s in segments
    ]
    if result.task == "semantic":
        labels = sorted({row[1] for row in rows})
        rows = [(label, label, None, joined(*(row[3] for row in rows if row[1] == label))) for label in labels]
    return result_of_runs(result.task, example.size, rows, result.id2label, tuple(stuff))


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return buffer.getvalue()
