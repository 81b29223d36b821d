"""One segment of an image as every format takes it, from a result or from an annotation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..example import Example
from ..polygons import Polygon, polygons_of
from ..runs import Runs


@dataclass(frozen=True, eq=False)
class LabelledMask:
    """A segment, cut out of its image.

    Args:
        label_id: index of its class.
        label: name of its class.
        mask: (bottom - top, right - left) bool.
        box: (left, top, right, bottom) of the mask in pixels, the last two exclusive.
        score: in [0, 1]; None for annotations and semantic results.
        isthing: whether its class is countable.
        iscrowd: whether it is many objects that nobody told apart.
    """

    label_id: int
    label: str
    mask: np.ndarray
    box: tuple[int, int, int, int]
    score: float | None = None
    isthing: bool = True
    iscrowd: bool = False

    @property
    def area(self) -> int:
        """Pixels that belong to it."""
        return int(np.count_nonzero(self.mask))

    @property
    def runs(self) -> Runs:
        """Its runs of pixels in the image."""
        return Runs.of_mask(self.mask).moved(*self.box[:2])

    def row_counts(self, size: tuple[int, int]) -> np.ndarray:
        """Pixels outside and inside in turn, along the rows of its image of (H, W)."""
        left, top = self.box[:2]
        return Runs.of_mask(self.mask.T).moved(top, left).counts((0, 0, *size))

    def paint(self, whole: np.ndarray):
        """Set the pixels that belong to it in an (H, W) bool array of its image."""
        left, top, right, bottom = self.box
        whole[top:bottom, left:right] |= self.mask

    def polygons(self, tolerance: float = 0.0, inset: float = 0.0) -> list[Polygon]:
        """As `data.polygons.polygons_of`, in pixels of the image."""
        corner = np.array(self.box[:2])
        return [[ring + corner for ring in polygon] for polygon in polygons_of(self.mask, tolerance, inset)]


def cut_out(mask: np.ndarray, box: tuple[int, int, int, int] | None = None, **fields) -> LabelledMask:
    """From an (H, W) bool mask, and its box where that is known."""
    if box is None:
        box = box_of(mask)
    left, top, right, bottom = box
    return LabelledMask(mask=mask[top:bottom, left:right], box=box, **fields)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), exclusive right and bottom, of an (H, W) mask; zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def masks_of_example(example: Example, id2label: Mapping[int, str]) -> list[LabelledMask]:
    """The segments of an annotation that have a pixel, in their order."""
    from scipy.ndimage import find_objects  # results without torch import this file where SciPy is missing

    numbers = np.array(sorted(segment["id"] for segment in example.segments), dtype=np.int32)
    places = {}  # id -> where it is, and its mask there
    for layer in example.layers if len(numbers) else ():
        position = np.searchsorted(numbers, layer).clip(max=len(numbers) - 1)
        compact = np.where(numbers[position] == layer, position + 1, 0)  # boxes of all segments in one pass
        for number, window in zip(numbers.tolist(), find_objects(compact), strict=False):
            if window is not None:
                places[number] = window, layer[window] == number
    found = []
    for segment in example.segments:
        if segment["id"] in places:
            (rows, columns), mask = places[segment["id"]]
            label_id, box = segment["category_id"], (columns.start, rows.start, columns.stop, rows.stop)
            kind = {"isthing": bool(segment.get("isthing", True)), "iscrowd": bool(segment.get("iscrowd"))}
            found.append(LabelledMask(label_id, id2label[label_id], mask, box, **kind))
    return found


def without_overlaps(masks: Iterable[LabelledMask], size: tuple[int, int]) -> tuple[np.ndarray, list[LabelledMask]]:
    """Masks on one map, where a pixel belongs to the first that has it.

    Returns:
        (H, W) int32 numbers, 1 for the first of the list, 0 where there is none; and the masks of which something is
        left, with what is left of them.
    """
    ids, left = np.zeros(size, dtype=np.int32), []
    for mask in masks:
        x0, y0, x1, y1 = mask.box
        window = ids[y0:y1, x0:x1]
        free = mask.mask & (window == 0)
        if free.any():
            left.append(replace(mask, mask=free))
            window[free] = len(left)
    return ids, left
