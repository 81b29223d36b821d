"""Masks as runs of pixels: what an object costs is the length of its outline, in an image of any size.

A position is (column << 32) + row. Positions rise in COCO's order, down the columns, whatever the height of the image,
and no run goes on in the next column: runs are moved, cut, joined and compared by arithmetic on sorted numbers.
A window is (left, top, right, bottom) in pixels, the last two exclusive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLUMN_BITS = 32
ROW = (1 << COLUMN_BITS) - 1
PAINTED_COLUMNS = 512  # at a time: a map is painted down the columns, and stored along the rows


@dataclass(frozen=True, eq=False, slots=True)
class Runs:
    """One mask.

    Args:
        starts, stops: (R,) int64 positions, rising, `stops` exclusive; no two runs touch.
    """

    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> "Runs":
        """The runs of an (H, W) bool mask."""
        starts, stops, _ = _runs(mask.astype(bool, copy=False))
        return cls(starts, stops)

    @property
    def area(self) -> int:
        """Pixels."""
        return int((self.stops - self.starts).sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The smallest window around them, zeros if there is no pixel."""
        if not len(self.starts):
            return 0, 0, 0, 0
        left, right = int(self.starts[0] >> COLUMN_BITS), int(self.starts[-1] >> COLUMN_BITS) + 1
        return left, int((self.starts & ROW).min()), right, int((self.stops & ROW).max())

    def moved(self, left: int, top: int) -> "Runs":
        """Further to the right and down by a number of pixels."""
        offset = (left << COLUMN_BITS) + top
        return Runs(self.starts + offset, self.stops + offset)

    def cut(self, window: tuple[int, int, int, int]) -> "Runs":
        """What lies in a window; positions stay those of the image."""
        left, top, right, bottom = window
        inside = slice(*np.searchsorted(self.starts, (left << COLUMN_BITS, right << COLUMN_BITS)))
        starts, stops = self.starts[inside], self.stops[inside]
        column = starts & ~ROW
        starts, stops = np.maximum(starts, column + top), np.minimum(stops, column + bottom)
        kept = starts < stops
        return Runs(starts[kept], stops[kept])

    def overlap(self, other: "Runs") -> int:
        """Pixels of both."""
        first = np.searchsorted(other.stops, self.starts, side="right")
        last = np.searchsorted(other.starts, self.stops)
        ours, theirs = _ranges(first, np.maximum(last - first, 0))
        common = np.minimum(self.stops[ours], other.stops[theirs]) - np.maximum(
            self.starts[ours], other.starts[theirs]
        )
        return int(common.sum())

    def counts(self, window: tuple[int, int, int, int]) -> np.ndarray:
        """COCO's uncompressed run lengths of a window: pixels outside and inside in turn, down the columns."""
        left, top, right, bottom = window
        part, H = self.cut(window), bottom - top
        starts, stops = (((p >> COLUMN_BITS) - left) * H + (p & ROW) - top for p in (part.starts, part.stops))
        apart = starts[1:] != stops[:-1]  # COCO's runs go on in the next column
        starts, stops = starts[np.r_[True, apart][: len(starts)]], stops[np.r_[apart, True][: len(stops)]]
        bounds = np.concatenate([[0], np.stack([starts, stops], 1).ravel(), [H * (right - left)]])
        counts = np.diff(bounds)
        return counts[:-1] if len(counts) > 1 and not counts[-1] else counts

    def crop(self, window: tuple[int, int, int, int]) -> np.ndarray:
        """The (h, w) bool mask in a window."""
        left, top, right, bottom = window
        counts = self.counts(window)
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return np.ascontiguousarray(inside.reshape(right - left, bottom - top).T)

    def every(self, step: int) -> "Runs":
        """Of every step-th row and column the pixel, as runs in the image that is smaller by that factor."""
        starts, stops = self.starts, self.stops
        columns, tops, bottoms = starts >> COLUMN_BITS, -(-(starts & ROW) // step), -(-(stops & ROW) // step)
        kept = (columns % step == 0) & (tops < bottoms)
        column = columns[kept] // step << COLUMN_BITS
        return joined(Runs(column + tops[kept], column + bottoms[kept]))


NOTHING = Runs(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def runs_of_map(ids: np.ndarray) -> dict[int, Runs]:
    """The runs of every id above 0 of an (H, W) map, in the order of the ids."""
    starts, stops, values = _runs(ids)
    order = np.argsort(values, kind="stable")
    starts, stops, values = starts[order], stops[order], values[order]
    present, first = np.unique(values, return_index=True)
    bounds = [*first.tolist(), len(values)]
    return {
        value: Runs(starts[bounds[n] : bounds[n + 1]], stops[bounds[n] : bounds[n + 1]])
        for n, value in enumerate(present.tolist())
    }


def joined(*parts: Runs) -> Runs:
    """All pixels of several masks."""
    starts, stops = (np.concatenate([getattr(part, name) for part in parts]) for name in ("starts", "stops"))
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(stops[order])
    first = np.ones(len(starts), dtype=bool)
    first[1:] = starts[1:] > reach[:-1]
    return Runs(starts[first], reach[np.r_[first[1:], True]] if len(starts) else reach)


def visible(masks: Sequence[Runs]) -> list[Runs]:
    """What is seen of each mask when they lie on each other, the first on top."""
    if not masks:
        return []
    starts, stops = (np.concatenate([getattr(mask, name) for mask in masks]) for name in ("starts", "stops"))
    layers = np.repeat(np.arange(len(masks)), [len(mask.starts) for mask in masks])
    bounds = np.unique(np.concatenate([starts, stops]))
    first = np.searchsorted(bounds, starts)
    runs, pieces = _ranges(first, np.searchsorted(bounds, stops) - first)  # a run is a row of pieces between bounds
    top = np.full(len(bounds), len(masks))
    np.minimum.at(top, pieces, layers[runs])
    order = np.argsort(top, kind="stable")
    ends = np.searchsorted(top[order], np.arange(len(masks) + 1)).tolist()
    result = []
    for n in range(len(masks)):
        own = order[ends[n] : ends[n + 1]]
        result.append(joined(Runs(bounds[own], bounds[np.minimum(own + 1, len(bounds) - 1)])))
    return result


def paint(size: tuple[int, int], masks: Sequence[Runs], values: Sequence[int], ground: int = 0) -> np.ndarray:
    """(H, W) int32: a value on the pixels of each of some masks that do not overlap, `ground` elsewhere."""
    painted, lengths = np.full(size, ground, dtype=np.int32), [len(mask.starts) for mask in masks]
    if not sum(lengths):
        return painted
    starts, stops = (np.concatenate([getattr(mask, name) for mask in masks]) for name in ("starts", "stops"))
    values, order = np.repeat(np.asarray(values, dtype=np.int32), lengths), np.argsort(starts, kind="stable")
    starts, stops, values = starts[order], stops[order], values[order]
    H, W = size
    for left in range(0, W, PAINTED_COLUMNS):
        right = min(left + PAINTED_COLUMNS, W)
        part = slice(*np.searchsorted(starts, (left << COLUMN_BITS, right << COLUMN_BITS)))
        bounds = np.stack([starts[part], stops[part]], 1).ravel()
        bounds = np.concatenate([[0], ((bounds >> COLUMN_BITS) - left) * H + (bounds & ROW), [H * (right - left)]])
        colours = np.full(len(bounds) - 1, ground, dtype=np.int32)
        colours[1::2] = values[part]
        painted[:, left:right] = np.repeat(colours, np.diff(bounds)).reshape(right - left, H).T
    return painted


def _runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, stops and values of the runs of equal pixels above 0, in the order of positions."""
    H, W = ids.shape
    columns = np.zeros((W, H + 1), dtype=ids.dtype)  # a 0 below each column ends its last run
    columns[:, :H] = ids.T
    flat = columns.ravel()
    bounds = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if len(flat) and flat[0]:
        bounds = np.r_[0, bounds]
    if not len(bounds):
        return bounds, bounds, flat[:0]
    values = flat[bounds]
    stops = np.r_[bounds[1:], bounds[-1]]
    kept = values > 0
    starts, stops = (bounds[kept], stops[kept])
    return *((p // (H + 1) << COLUMN_BITS) + p % (H + 1) for p in (starts, stops)), values[kept]


def _ranges(first: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the ranges first[n], first[n] + 1, ..., lengths[n] numbers each: n and the number of all members."""
    owners = np.repeat(np.arange(len(first)), lengths)
    return owners, np.arange(len(owners)) + np.repeat(first - np.cumsum(lengths) + lengths, lengths)
