"""What overlapping tiles saw → one result for the image, without a seam.

Things are compared where two tiles both see, by the overlap of their runs, and everything that is the same thing is
united, transitively: the order of tiles does not matter, and a thing may be larger than a tile. Each pixel is decided
by the tile that owns it (whose middle is nearest) as far as that tile knows the thing, otherwise by those that do.
Stuff and semantic classes have scores, whose average over the tiles that see a pixel decides; a tile counts less
towards its edges. Scores wait only in the strips that a later tile sees too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..data.runs import NOTHING, Runs, joined, runs_of_map, visible
from ..data.windows import ImageWindows, Window
from .rules import Rules
from .segmentation import Segmentation, result_of_runs
from .tiles import TilePlan

VOID = -1  # among labels of scores
SAME = 0.5  # IoU in the strip from which on two things that are each other's best are one; panoptic quality's limit
CONTAINED = 0.7  # share in the strip of a thing, cut by its tile's edge, from which on another is its continuation
EDGE = 4  # pixels from the edge of its tile that count as cut: the stride of the network's masks


class Thing(NamedTuple):
    """A thing that one tile sees, in the pixels of the image."""

    label: int
    score: float
    runs: Runs


@dataclass(frozen=True)
class TileResult:
    """What one tile shows, in its own pixels.

    Args:
        things: of panoptic and instance results.
        labels: whose scores are given: all of a semantic result, void and the stuff that is there of a panoptic one.
        scores: (len(labels), h, w) float32.
        stuff_scores: label -> score of that stuff as a segment.
    """

    things: Sequence[Thing] = ()
    labels: Sequence[int] = ()
    scores: np.ndarray | None = None
    stuff_scores: dict[int, float] | None = None


def segment_tiles(
    image: ImageWindows,
    plan: TilePlan,
    rules: Rules,
    find: Callable[[list[np.ndarray]], Iterable[TileResult]],
    batch_size: int = 1,
    progress: bool = False,
) -> Segmentation:
    """The result of an image of which tiles are looked at, one row after the other.

    Args:
        find: (h, w, 3) uint8 RGB of a batch of tiles → their results.
        batch_size: tiles that `find` gets at a time.
        progress: show a bar over the tiles.
    """
    merger = TileMerger(plan, rules)
    with tqdm(total=len(plan), desc="tiles", unit="tile", disable=not progress, leave=False) as bar:
        for first in range(0, len(plan), batch_size):
            numbers = range(first, min(first + batch_size, len(plan)))
            tiles = [image.read(plan.window(number)) for number in numbers]
            for number, found in zip(numbers, find(tiles), strict=True):
                merger.add(number, found)
                bar.update()
    return replace(merger.result(), georeference=image.georeference)


class TileMerger:
    """Takes the results of all tiles, by rising number, and gives that of the image."""

    def __init__(self, plan: TilePlan, rules: Rules):
        self.plan, self.rules = plan, rules
        self._strips, self._labelled = _Strips(plan), {}
        self._things: dict[int, list[Thing]] = {}
        self._stuff_scores: dict[int, float] = {}

    def add(self, number: int, found: TileResult):
        left, top, _, _ = self.plan.window(number)
        self._things[number] = [thing._replace(runs=thing.runs.moved(left, top)) for thing in found.things]
        for label, score in (found.stuff_scores or {}).items():
            self._stuff_scores[label] = max(score, self._stuff_scores.get(label, 0.0))
        if found.scores is not None:
            left, top, _, _ = self.plan.done(number)
            decided = self._strips.decide(number, found.labels, found.scores)
            for value, runs in runs_of_map(decided + 2).items():  # void is -1, and 0 is a label
                if value - 2 != VOID:
                    self._labelled.setdefault(value - 2, []).append(runs.moved(left, top))

    def result(self) -> Segmentation:
        labelled = {label: joined(*parts) for label, parts in sorted(self._labelled.items())}
        if self.rules.task == "semantic":
            rows = [(label, label, None, runs) for label, runs in labelled.items()]
        else:
            exclusive = self.rules.task == "panoptic"
            merged = merge_things(self._things, self.plan, any_label=exclusive)
            rows = self._panoptic(merged, labelled) if exclusive else _instances(merged)
        numbers = {"id2label": self.rules.id2label, "stuff_label_ids": self.rules.stuff_label_ids}
        return result_of_runs(self.rules.task, self.plan.size, rows, **numbers)

    def _panoptic(self, merged: list["Merged"], stuff: dict[int, Runs]) -> Iterable[tuple]:
        layers = [thing.own for thing in merged] + [thing.beyond for thing in merged] + list(stuff.values())
        seen, count = visible(layers), len(merged)
        found = [
            (thing.label, thing.score, joined(own, beyond) if len(beyond.starts) else own)
            for thing, own, beyond in zip(merged, seen[:count], seen[count : 2 * count], strict=True)
        ]
        found += [
            (label, self._stuff_scores[label], runs) for label, runs in zip(stuff, seen[2 * count :], strict=True)
        ]
        present = [row for row in found if len(row[-1].starts)]
        return ((number, *row) for number, row in enumerate(present, start=1))


def _instances(merged: list["Merged"]) -> Iterable[tuple]:
    for number, thing in enumerate(merged, start=1):
        yield number, thing.label, thing.score, joined(thing.own, thing.beyond)


class Merged(NamedTuple):
    """A thing of the image.

    Args:
        label: of the parts, the one with the largest sum of score × pixels.
        score: mean of the parts with that label, weighted by the pixels that each decides.
        own: pixels that are decided by the tile that owns them.
        beyond: pixels owned by a tile that does not know the thing.
    """

    label: int
    score: float
    own: Runs
    beyond: Runs


def merge_things(things: dict[int, list[Thing]], plan: TilePlan, any_label: bool) -> list[Merged]:
    """Unite what several tiles saw of the same thing, best first.

    A thing of which the tiles that see it own less than half is left out: those that see more of it have none there.

    Args:
        things: by the number of their tile, in any order.
        any_label: things of different classes may be the same, as where every pixel belongs to one thing.
    """
    parts = [(tile, thing) for tile in sorted(things) for thing in things[tile]]
    first, count = {}, 0
    for tile in sorted(things):
        first[tile], count = count, count + len(things[tile])
    groups = _Groups(count)
    for tile in first:
        for other in plan.later_neighbours(tile):
            if other in first:
                for one, two in same_things(things[tile], things[other], plan, (tile, other), any_label):
                    groups.unite(first[tile] + one, first[other] + two)
    merged = [_unite([parts[member] for member in members], plan) for members in groups.members()]
    merged = [thing for thing in merged if thing is not None]
    return sorted(merged, key=lambda thing: (-thing.score, thing.label, thing.own.box))


def same_things(
    ours: list[Thing], theirs: list[Thing], plan: TilePlan, tiles: tuple[int, int], any_label: bool
) -> list[tuple[int, int]]:
    """Pairs of things of two tiles that are one, by what both tiles see of them.

    Two are one if each is the other's best by IoU, and that is `SAME` at least; or if one is cut by the edge of its
    tile and lies in the other by `CONTAINED`. What is complete may lie in another thing without being it.
    """
    windows = [plan.window(tile) for tile in tiles]
    strip = _intersection(*windows)
    sides = []
    for side, window in ((ours, windows[0]), (theirs, windows[1])):
        cut = [(n, thing.label, thing.runs.cut(strip)) for n, thing in enumerate(side)]
        sides.append([(n, label, runs, _is_cut(runs.box, window, plan)) for n, label, runs in cut if len(runs.starts)])
    if not sides[0] or not sides[1]:
        return []
    common = np.zeros([len(side) for side in sides], dtype=np.int64)
    for one, two in np.argwhere(_meet(*([runs.box for _, _, runs, _ in side] for side in sides))).tolist():
        (_, label, runs, _), (_, other_label, other, _) = sides[0][one], sides[1][two]
        if any_label or label == other_label:
            common[one, two] = runs.overlap(other)
    areas = [np.array([runs.area for _, _, runs, _ in side]) for side in sides]
    iou = common / (areas[0][:, None] + areas[1] - common)
    same = (iou == iou.max(1, keepdims=True)) & (iou == iou.max(0)) & (iou >= SAME)
    for axis in (0, 1):
        is_cut = np.array([row[-1] for row in sides[axis]])
        share = common / (areas[axis][:, None] if axis == 0 else areas[axis])
        best = share == share.max(1 - axis, keepdims=True)
        same |= best & (share >= CONTAINED) & (is_cut[:, None] if axis == 0 else is_cut)
    return [(sides[0][one][0], sides[1][two][0]) for one, two in np.argwhere(same).tolist()]


def _meet(boxes: list[Window], others: list[Window]) -> np.ndarray:
    """(N, M) bool: which windows have pixels in common."""
    one, two = np.array(boxes)[:, None], np.array(others)
    return (np.maximum(one[..., :2], two[..., :2]) < np.minimum(one[..., 2:], two[..., 2:])).all(-1)


def _is_cut(box: Window, window: Window, plan: TilePlan) -> bool:
    """Whether a box reaches an edge of its tile that is no edge of the image."""
    H, W = plan.size
    inner = (window[0] > 0, window[1] > 0, window[2] < W, window[3] < H)
    return any(edge and abs(side - end) < EDGE for side, end, edge in zip(box, window, inner, strict=True))


def _unite(parts: list[tuple[int, Thing]], plan: TilePlan) -> Merged | None:
    owned = [thing.runs.cut(plan.own(tile)) for tile, thing in parts]
    weights = np.array([runs.area for runs in owned], dtype=float)
    if not weights.any():
        return None  # all of it is decided by tiles that do not know it
    votes: dict[int, float] = {}
    for weight, (_, thing) in zip(weights, parts, strict=True):
        votes[thing.label] = votes.get(thing.label, 0.0) + weight * thing.score
    label = max(sorted(votes), key=votes.get)
    score = float(votes[label] / weights[[thing.label == label for _, thing in parts]].sum())
    whole, known = joined(*(thing.runs for _, thing in parts)), {tile for tile, _ in parts}
    own = joined(*owned)
    beyond = [whole.cut(plan.own(tile)) for tile in plan.owners(whole.box) if tile not in known]
    beyond = joined(*beyond) if beyond else NOTHING
    return Merged(label, score, own, beyond) if own.area >= beyond.area else None


class _Groups:
    """Numbers that are united step by step."""

    def __init__(self, count: int):
        self._parents = list(range(count))

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def unite(self, one: int, two: int):
        one, two = self._root(one), self._root(two)
        self._parents[max(one, two)] = min(one, two)

    def members(self) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for number in range(len(self._parents)):
            groups.setdefault(self._root(number), []).append(number)
        return list(groups.values())


class _Waiting(NamedTuple):
    window: Window
    labels: Sequence[int]
    scores: np.ndarray  # (len(labels), h, w), weighted


class _Strips:
    """Weighted scores of pixels that a later tile sees too."""

    def __init__(self, plan: TilePlan):
        self.plan = plan
        self._waiting: list[_Waiting] = []

    def decide(self, number: int, labels: Sequence[int], scores: np.ndarray) -> np.ndarray:
        """(h, w) int32 labels of the part of the image that this tile is the last to see.

        Sums need not be divided by those of the weights: the largest one is the same.
        """
        window, done = self.plan.window(number), self.plan.done(number)
        tile = _Waiting(window, labels, scores * self.plan.weights(number))
        self._waiting = [other for other in self._waiting if not _is_past(other.window, done)]
        present = sorted({label for other in (tile, *self._waiting) for label in other.labels})
        total = np.zeros((len(present), done[3] - done[1], done[2] - done[0]), dtype=np.float32)
        for other in (*self._waiting, tile):
            part = _part(other, _intersection(other.window, done))
            if part is not None:
                left, top, right, bottom = part.window
                rows, columns = slice(top - done[1], bottom - done[1]), slice(left - done[0], right - done[0])
                for label, score in zip(part.labels, part.scores, strict=True):
                    total[present.index(label), rows, columns] += score
        for rest in ((done[2], done[1], window[2], done[3]), (window[0], done[3], window[2], window[3])):
            part = _part(tile, rest)
            if part is not None:
                self._waiting.append(part._replace(scores=part.scores.copy()))  # the rest of the tile can go
        return np.array(present, dtype=np.int32)[total.argmax(0)]


def _is_past(window: Window, done: Window) -> bool:
    return window[3] <= done[1] or (window[2] <= done[0] and window[3] <= done[3])


def _part(waiting: _Waiting, window: Window) -> _Waiting | None:
    left, top, right, bottom = window
    if left >= right or top >= bottom:
        return None
    x, y = waiting.window[:2]
    return waiting._replace(window=window, scores=waiting.scores[:, top - y : bottom - y, left - x : right - x])


def _intersection(one: Window, two: Window) -> Window:
    return max(one[0], two[0]), max(one[1], two[1]), min(one[2], two[2]), min(one[3], two[3])
