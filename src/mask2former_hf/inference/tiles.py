"""Where the overlapping tiles of a large image lie, and which of them decides what."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np

from ..data.windows import Window

OVERLAP = 0.2  # share of a tile that its neighbour sees too
MIN_TILE = 32  # pixels; the smallest canvas of the network


class Span(NamedTuple):
    """A tile along one side of the image, in pixels.

    Args:
        start, stop: what it sees.
        own_start, own_stop: what lies nearer to its middle than to another's; these parts make up the whole side.
        done: from `start` to here it is the last tile that sees the pixels.
    """

    start: int
    stop: int
    own_start: int
    own_stop: int
    done: int


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one image, numbered row by row; all have the same size, as far as the image has it.

    Args:
        size: (height, width) of the image.
        overlap: pixels that neighbours share at least.
        rows, columns: the tiles along either side.
    """

    size: tuple[int, int]
    overlap: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def _spans(self, number: int) -> tuple[Span, Span]:
        row, column = divmod(number, len(self.columns))
        return self.rows[row], self.columns[column]

    def window(self, number: int) -> Window:
        """What a tile sees."""
        row, column = self._spans(number)
        return column.start, row.start, column.stop, row.stop

    def own(self, number: int) -> Window:
        """The pixels that lie nearest to its middle; every pixel of the image is owned by one tile."""
        row, column = self._spans(number)
        return column.own_start, row.own_start, column.own_stop, row.own_stop

    def done(self, number: int) -> Window:
        """The pixels that no tile with a higher number sees, and that no lower number is the last to see."""
        row, column = self._spans(number)
        return column.start, row.start, column.done, row.done

    def owners(self, window: Window) -> Iterator[int]:
        """Tiles that own pixels of a window."""
        left, top, right, bottom = window
        for row in range(_place(self.rows, top), _place(self.rows, bottom - 1) + 1):
            for column in range(_place(self.columns, left), _place(self.columns, right - 1) + 1):
                yield row * len(self.columns) + column

    def later_neighbours(self, number: int) -> Iterator[int]:
        """Tiles with a higher number that share pixels with it."""
        row, column = self._spans(number)
        for other in range(number + 1, len(self)):
            below, beside = self._spans(other)
            if below.start >= row.stop:
                return
            if beside.start < column.stop and column.start < beside.stop:
                yield other

    def weights(self, number: int) -> np.ndarray:
        """(h, w) float32 in (0, 1]: a tile counts less towards its inner edges, where it sees less around."""
        ramps = []
        for span, length in zip(self._spans(number), self.size, strict=True):
            middle = np.arange(span.start, span.stop) + 0.5
            before = middle - span.start if span.start else np.full(len(middle), np.inf)
            after = span.stop - middle if span.stop < length else np.full(len(middle), np.inf)
            ramps.append(np.minimum(np.minimum(before, after) / max(1, self.overlap), 1).astype(np.float32))
        return ramps[0][:, None] * ramps[1]


def plan_tiles(size: tuple[int, int], tile: int, overlap: float) -> TilePlan:
    """As few tiles as cover the image with the overlap, evenly spread.

    Args:
        size: (height, width) of the image in pixels.
        tile: side of a tile in pixels.
        overlap: share of the side that neighbours have in common at least, 0 to 0.5.

    Raises:
        ValueError: for a tile or overlap that is out of range.
    """
    check_tiling(tile, overlap)
    shared = round(tile * overlap)
    return TilePlan(tuple(size), shared, *(_spans(length, tile, shared) for length in size))


def check_tiling(tile, overlap, level=0):
    """Raise ValueError for a tile, an overlap or a level that is out of range."""
    if isinstance(tile, bool) or not isinstance(tile, int | np.integer) or tile < MIN_TILE:
        raise ValueError(f"tile={tile!r}: must be a side of at least {MIN_TILE} pixels, 'auto', or None")
    if not isinstance(overlap, Real) or isinstance(overlap, bool) or not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap={overlap!r}: must be the share of a tile that its neighbour sees too, 0 to 0.5")
    if isinstance(level, bool) or not isinstance(level, int | np.integer) or level < 0:
        raise ValueError(f"level={level!r}: must be that of a pyramid, 0 for the full image, 1 for its first overview")


def _spans(length: int, tile: int, shared: int) -> tuple[Span, ...]:
    if length <= tile:
        return (Span(0, length, 0, length, length),)
    count = -(-(length - shared) // (tile - shared))
    starts = [round(n * (length - tile) / (count - 1)) for n in range(count)]
    middles = [0, *((start + before + tile) // 2 for before, start in zip(starts, starts[1:], strict=False)), length]
    return tuple(
        Span(start, start + tile, middles[n], middles[n + 1], starts[n + 1] if n + 1 < count else length)
        for n, start in enumerate(starts)
    )


def _place(spans: tuple[Span, ...], position: int) -> int:
    return bisect_right(spans, position, key=lambda span: span.own_start) - 1
