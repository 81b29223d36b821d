"""Generated scenes of any size with any number of things, drawn window by window."""

import numpy as np

from .images import to_rgb
from .runs import Runs
from .scenes import NUM_THING_CLASSES, background, is_ground, outline, paint
from .windows import ImageWindows, Window

NOISE_BLOCK = 256  # pixels; noise is a function of the place, whatever the window
REACH = 1.85  # radii from the middle of a thing to its farthest point: the top of a triangle


class LargeScene(ImageWindows):
    """A scene like those of `ScenesDataset` that is never there as a whole: a function of its arguments alone.

    Args:
        size: (height, width) in pixels.
        num_things: drawn one after the other; later ones hide earlier ones.
        unit: things and patterns have the size in pixels that they have in a `ScenesDataset` of this size: radii are
            0.08 to 0.2 of it.
        seed: another seed gives another scene.
        apart: leave out things whose circles touch one that is there; `len(scene.things)` says how many are left.
        noise: standard deviation of the pixel noise, in grey levels of 255.
    """

    def __init__(
        self, size: tuple[int, int], num_things: int, unit: int = 128, seed: int = 0, apart=False, noise: float = 8.0
    ):
        if min(size) < 16 or num_things < 0 or unit < 16 or noise < 0:
            raise ValueError(
                f"size={size}, num_things={num_things}, unit={unit}, noise={noise}: sides and unit must be at least "
                "16 pixels, and the others 0 or more"
            )
        self.size, self.unit, self.seed, self.noise = tuple(size), unit, seed, noise
        self.things, self._cells, self._cell = [], {}, int(0.4 * REACH * unit)
        for number in range(num_things):
            rng = self._rng(0, number)
            thing = outline(rng, int(rng.integers(NUM_THING_CLASSES)), self.size, unit)
            if not apart or self._is_free(thing):
                for cell in self._cells_of(self._box(thing)):
                    self._cells.setdefault(cell, []).append(len(self.things))
                self.things.append(thing)

    def read(self, window: Window, step: int = 1) -> np.ndarray:
        """(h, w, 3) uint8 of a window; of a step above 1 every step-th row and column."""
        x, y = self._positions(window, step)
        image, _ = background(self._rng(1), x, y, self.size, self.unit)
        for number, part, mask in self._drawn(window, x, y):
            label = self.things[number].label
            image[part][mask] = paint(self._rng(2, number), label, x[part][mask], y[part][mask], self.size)
        image = image * self._rng(3).uniform(0.75, 1.15) + self._noise(window, step)[..., None]
        return to_rgb(image.clip(0, 255).astype(np.uint8), "scene")

    def ids(self, window: Window, step: int = 1) -> np.ndarray:
        """(h, w) int32 of a window: 1 for sky, 2 for ground, n + 3 for things[n]."""
        x, y = self._positions(window, step)
        ids = np.where(is_ground(self._rng(1), x[:1], y, self.size), 2, 1).astype(np.int32)
        for number, part, mask in self._drawn(window, x, y):
            ids[part][mask] = number + 3
        return ids

    def labels(self) -> dict[int, int]:
        """The class of every id."""
        return {1: 3, 2: 4} | {number + 3: thing.label for number, thing in enumerate(self.things)}

    def runs(self, number: int) -> Runs:
        """The whole of things[number], whatever hides it."""
        left, top, right, bottom = window = self._box(self.things[number])
        return Runs.of_mask(self.things[number](*self._positions(window, 1))).moved(left, top)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, *key])))

    def _positions(self, window: Window, step: int):
        left, top, right, bottom = window
        y, x = np.mgrid[top:bottom:step, left:right:step].astype(np.float32)
        return x + 0.5, y + 0.5

    def _box(self, thing) -> Window:
        reach = thing.radius * REACH
        left, top = max(0, int(thing.x - reach)), max(0, int(thing.y - reach))
        return left, top, min(self.size[1], int(thing.x + reach) + 1), min(self.size[0], int(thing.y + reach) + 1)

    def _cells_of(self, box: Window):
        left, top, right, bottom = (side // self._cell for side in box)
        return ((row, column) for row in range(top, bottom + 1) for column in range(left, right + 1))

    def _near(self, box: Window) -> list[int]:
        return sorted({number for cell in self._cells_of(box) for number in self._cells.get(cell, ())})

    def _is_free(self, thing) -> bool:
        near = (self.things[number] for number in self._near(self._box(thing)))
        return all(np.hypot(o.x - thing.x, o.y - thing.y) > 1.25 * (o.radius + thing.radius) for o in near)

    def _drawn(self, window: Window, x, y):
        """Number, rows and columns, and mask in them of each thing in a window, in the order of drawing."""
        step = int(x[0, 1] - x[0, 0]) if x.shape[1] > 1 else 1
        for number in self._near(window):
            box = self._box(self.things[number])
            left, right = (-(-(min(max(side, window[0]), window[2]) - window[0]) // step) for side in box[::2])
            top, bottom = (-(-(min(max(side, window[1]), window[3]) - window[1]) // step) for side in box[1::2])
            part = slice(top, bottom), slice(left, right)
            if left < right and top < bottom:
                yield number, part, self.things[number](x[part], y[part])

    def _noise(self, window: Window, step: int) -> np.ndarray:
        left, top, right, bottom = window
        rows, columns = np.arange(top, bottom, step), np.arange(left, right, step)
        noise = np.empty((len(rows), len(columns)), dtype=np.float32)
        for row in np.unique(rows // NOISE_BLOCK):
            for column in np.unique(columns // NOISE_BLOCK):
                block = self._rng(4, int(row), int(column)).normal(0, self.noise, (NOISE_BLOCK, NOISE_BLOCK))
                ys, xs = rows // NOISE_BLOCK == row, columns // NOISE_BLOCK == column
                noise[np.ix_(ys, xs)] = block[np.ix_(rows[ys] % NOISE_BLOCK, columns[xs] % NOISE_BLOCK)]
        return noise
