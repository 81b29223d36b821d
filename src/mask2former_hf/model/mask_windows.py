"""The part of a result that a mask can reach, on CPUs: what is outside of it is neither resized nor looked at.

Resizing blends neighbours, so a pixel of the result is above a threshold only if a cell of the mask logits that it is
blended of is. Sizes are (rows, columns) in pixels and mean what they do in postprocessing.py; a window is (left, top,
right, bottom), the last two exclusive.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .mask_resizing import resize_mask_logits, source_rows
from .panoptic_rules import CACHED

MARGIN = 1e-5  # of the threshold: rounding may lift a blend of equal cells above them


class Resize(NamedTuple):
    """Of one side: output n is a blend of `upper[n]` and, with `weight[n]`, of `lower[n]`."""

    upper: Tensor
    lower: Tensor
    weight: Tensor

    @classmethod
    def of(cls, length: int, resized: int, used: int) -> "Resize":
        """Of the first `used` outputs of a resize to `resized`."""
        upper, lower, weight = source_rows(length, resized, 0, used)
        return cls(upper, lower, weight[:, 0])

    def touched(self, first: int, last: int) -> tuple[int, int]:
        """First and last output that the inputs first ... last take part in; (0, -1) if there is none."""
        outputs = ((self.lower >= first) & (self.upper <= last)).nonzero()
        return (int(outputs[0]), int(outputs[-1])) if len(outputs) else (0, -1)

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """First and last input that the outputs first ... last are blended of."""
        return int(self.upper[first]), int(self.lower[last])

    def __call__(self, maps: Tensor, dim: int, held: int, first: int, last: int) -> Tensor:
        """Outputs first ... last along a dimension, of maps that hold the inputs from `held` on.

        In the order of `F.interpolate`, with one product fused into the sum: equal to the last bit on x86, for results
        of more than 128 rows and columns together (for smaller ones torch has another kernel); else to rounding.
        """
        part = slice(first, last + 1)
        weight = self.weight[part] if dim == 1 else self.weight[part, None]
        lower = maps.index_select(dim, self.lower[part] - held)
        return lower.mul_(weight).addcmul_(maps.index_select(dim, self.upper[part] - held), 1 - weight)


class Side:
    """Rows or columns, from cells of mask logits over pixels of the canvas to those of the result."""

    def __init__(self, cells: int, canvas: int, image: int, target: int):
        self.to_canvas = Resize.of(cells, canvas, image) if cells != canvas else None
        self.to_target = Resize.of(image, target, target) if image != target else None
        self.image = image

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """First and last pixel of the result that cells first ... last take part in; (0, -1) if there is none."""
        if self.to_canvas is not None:
            first, last = self.to_canvas.touched(first, last)
        last = min(last, self.image - 1)
        return (first, last) if self.to_target is None else self.to_target.touched(first, last)

    def steps(self, first: int, last: int) -> list[tuple[Resize | None, int, int]]:
        """The cells to begin with, and then each resize with the first and last output that is needed of it."""
        steps = []
        for resize in (self.to_target, self.to_canvas):
            steps.insert(0, (resize, first, last))
            if resize is not None:
                first, last = resize.needed(first, last)
        return [(None, first, last), *steps]


class MaskWindows:
    """Logits of masks in the part of the result where they may exceed a threshold.

    Args:
        cells: (rows, columns) of the mask logits.
        threshold: logit above which a pixel belongs to a mask.
    """

    def __init__(self, cells, canvas_size, image_size, target_size, threshold: float):
        self.rows, self.columns = (Side(*s) for s in zip(cells, canvas_size, image_size, target_size, strict=True))
        self.sizes = canvas_size, image_size, target_size
        self.bound = threshold - MARGIN * max(1.0, abs(threshold))

    def of(self, logits: Tensor) -> tuple[tuple[int, int, int, int], Iterator[tuple[int, Tensor]]]:
        """(h, w) logits of a mask → a window of the result, and its resized rows in bands.

        Returns:
            the window, empty for a mask that exceeds the threshold nowhere; and from top to bottom its bands, with the
            number of their first row in the window: (row, (rows, columns) logits).
        """
        above = logits > self.bound
        spans = []
        for side, cells in ((self.rows, above.any(1)), (self.columns, above.any(0))):
            found = cells.nonzero()
            spans.append(side.reach(int(found[0]), int(found[-1])) if len(found) else (0, -1))
        (top, bottom), (left, right) = spans
        if top > bottom or left > right:
            return (0, 0, 0, 0), iter(())
        window = (left, top, right + 1, bottom + 1)
        if 2 * (bottom + 1 - top) * (right + 1 - left) > math.prod(self.sizes[-1]):
            # F.interpolate takes 0.6 of the time for a pixel.
            whole = resize_mask_logits(logits[None], *self.sizes)[0, top : bottom + 1, left : right + 1]
            step = max(1, CACHED // whole.shape[1])
            return window, zip(range(0, len(whole), step), whole.split(step), strict=True)
        return window, self._bands(logits, spans)

    def _bands(self, logits: Tensor, spans: list[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
        (_, row, last_row), *down = self.rows.steps(*spans[0])
        (_, column, last_column), *across = self.columns.steps(*spans[1])
        part = logits[row : last_row + 1, column : last_column + 1]
        for (to_rows, *some_rows), (to_columns, *some_columns) in zip(down, across, strict=True):
            part = part if to_columns is None else to_columns(part, 1, column, *some_columns)
            column = some_columns[0]
            if to_rows is not None and to_rows is not down[-1][0]:
                part = to_rows(part, 0, row, *some_rows)
                row = some_rows[0]
        to_rows, top, bottom = down[-1]
        step = max(1, CACHED // part.shape[1])
        for start in range(top, bottom + 1, step):
            last = min(start + step - 1, bottom)
            band = part[start - row : last - row + 1] if to_rows is None else to_rows(part, 0, row, start, last)
            yield start - top, band
