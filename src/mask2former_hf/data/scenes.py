"""Generated panoptic scenes: data for the demo and the tests where nothing can be downloaded.

Two textured stuff regions in muted colours meet at a wavy border; discs, boxes and triangles in strong colours lie on
them and hide each other. Most things take a hue of their class, the others any: colour, shape, texture and place all
help to tell classes apart and none is enough. Bands beyond red, green and blue are like infrared ones: in each, every
class has a brightness of its own, and no texture.
"""

import colorsys
from typing import NamedTuple

import numpy as np

from .classes import ClassTable
from .example import Example
from .reader import Reader

ID2LABEL = {0: "disc", 1: "box", 2: "triangle", 3: "sky", 4: "ground"}
STUFF_LABEL_IDS = (3, 4)
NUM_THING_CLASSES = 3
HELD_OUT_SEED = 1_000_003  # scenes of another seed are other scenes: to measure on; also of moving ones
MIN_VISIBLE = 12  # pixels; a thing of which less is left belongs to what lies around it


class ScenesDataset(Reader):
    """Scenes that are a function of (seed, index) alone: any order, process and machine gives the same.

    Every pixel of an `Example` belongs to a segment.

    Args:
        length: number of scenes.
        size: side of the square image in pixels, or (height, width).
        seed: another seed gives other scenes.
        num_things: smallest and largest number of things drawn; hidden ones are not annotated.
        noise: standard deviation of the pixel noise, in grey levels of 255.

    `channels`, which may be set, is the number of bands: red, green, blue and further ones; of fewer than three the
    first is grey. None is RGB.
    """

    task = "panoptic"
    classes = ClassTable.from_categories(
        {"id": index, "name": name, "isthing": index not in STUFF_LABEL_IDS} for index, name in ID2LABEL.items()
    )

    def __init__(
        self,
        length: int,
        size: int | tuple[int, int] = 128,
        seed: int = 0,
        num_things: tuple[int, int] = (2, 6),
        noise: float = 8.0,
    ):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if length < 0:
            raise ValueError(f"length={length}: must be 0 or more scenes")
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size={size}: must be at least 16 pixels, one number or (height, width)")
        if not 0 <= num_things[0] <= num_things[1]:
            raise ValueError(
                f"num_things={num_things}: must be a smallest and a largest number, 0 <= smallest <= largest"
            )
        if noise < 0:
            raise ValueError(f"noise={noise}: must be 0 or more grey levels")
        self.length, self.seed, self.num_things, self.noise = length, seed, num_things, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        self._check_index(index)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        H, W = self.size
        y, x = np.mgrid[0.5:H, 0.5:W].astype(np.float32)
        image, ids = background(rng, x, y, self.size, max(H, W))
        classes = {1: 3, 2: 4}
        for number in range(rng.integers(self.num_things[0], self.num_things[1] + 1)):
            label = int(rng.integers(NUM_THING_CLASSES))
            mask = outline(rng, label, self.size, min(H, W))(x, y)
            image = np.where(mask[..., None], paint(rng, label, x, y, self.size), image)
            ids[mask] = number + 3
            classes[number + 3] = label
        ids, classes = _drop_hidden(ids, classes)
        image = image * rng.uniform(0.75, 1.15) + rng.normal(0, self.noise, image.shape)
        segments = [
            {
                "id": number,
                "category_id": label,
                "isthing": int(label < NUM_THING_CLASSES),
                "iscrowd": 0,
                "area": int((ids == number).sum()),
            }
            for number, label in classes.items()
        ]
        image = image.clip(0, 255).astype(np.uint8)
        if self.channels is not None:
            image = self._bands(image, ids, classes, index)
        return Example(image, ids, segments, image_id=index)

    def _bands(self, image, ids, classes, index: int) -> np.ndarray:
        """(H, W, channels) of (H, W, 3) and its classes; the first bands do not depend on how many there are."""
        visible = list(np.moveaxis(image, -1, 0)) if self.channels >= 3 else [np.rint(image.mean(2)).astype(np.uint8)]
        for band in range(len(visible), self.channels):
            brightness = np.random.default_rng(band).permutation(np.linspace(40, 215, len(ID2LABEL)))
            table = np.zeros(max(classes) + 1)
            table[list(classes)] = brightness[list(classes.values())]
            rng = np.random.default_rng([self.seed, index, band])
            visible.append((table[ids] + rng.normal(0, self.noise, ids.shape)).clip(0, 255).astype(np.uint8))
        return np.stack(visible, axis=-1)


class Scenes(ScenesDataset):
    """Generated scenes as a data set with two splits: 2000 to train on, 100 others to measure."""

    def __init__(self, split: str):
        super().__init__(2000 if split == "train" else 100, size=128, seed=0 if split == "train" else HELD_OUT_SEED)


def _muted_colour(rng) -> np.ndarray:
    return _colour(rng, rng.uniform(), rng.uniform(0.05, 0.3))


def strong_colour(rng, label: int) -> np.ndarray:
    """Three of four things take the hues of their class, a third of the circle; the others any."""
    hue = (label + rng.uniform()) / NUM_THING_CLASSES if rng.random() < 0.75 else rng.uniform()
    return _colour(rng, hue, rng.uniform(0.7, 1.0))


def _colour(rng, hue: float, saturation: float) -> np.ndarray:
    return 255 * np.array(colorsys.hls_to_rgb(hue % 1, rng.uniform(0.3, 0.7), saturation), dtype=np.float32)


def background(rng, x, y, size, unit):
    """Sky (id 1), a smooth gradient with soft clouds, over ground (id 2), striped or chequered.

    Args:
        x, y: (h, w) positions in pixels of an image of `size` (H, W).
        unit: length in pixels that the pattern of the ground is a part of.
    """
    H, W = size
    u, v = x / W, y / H
    below = is_ground(rng, x, y, size)
    top, bottom = _muted_colour(rng), _muted_colour(rng)
    clouds = np.sin(2 * np.pi * (rng.uniform(0.5, 2) * u + rng.uniform())) * np.sin(
        2 * np.pi * rng.uniform(0.5, 2) * v
    )
    sky = top + (bottom - top) * v[..., None] + 12 * clouds[..., None]
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.05, 0.12) * unit
    phase = 2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period
    pattern = np.sign(np.sin(phase))
    if rng.random() < 0.5:
        pattern = pattern * np.sign(np.sin(2 * np.pi * (y * np.cos(angle) - x * np.sin(angle)) / period))
    ground = _muted_colour(rng) + rng.uniform(15, 35) * pattern[..., None]
    ids = np.where(below, 2, 1).astype(np.int32)
    return np.where(below[..., None], ground, sky).astype(np.float32), ids


def is_ground(rng, x, y, size) -> np.ndarray:
    """(h, w) bool: what lies below a wavy border."""
    u = x / size[1]
    border = rng.uniform(0.3, 0.7) + rng.uniform(-0.25, 0.25) * (u - 0.5)
    return y / size[0] > border + rng.uniform(0, 0.06) * np.sin(2 * np.pi * (rng.uniform(0.5, 3) * u + rng.uniform()))


def outline(rng, label, size, unit) -> "Outline":
    """A disc, box or triangle of random place in an image of `size`, proportion, rotation, and size in `unit`s."""
    H, W = size
    radius = rng.uniform(0.08, 0.2) * unit
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 1.0)
    return Outline(label, rng.uniform(0.08, 0.92) * W, rng.uniform(0.08, 0.92) * H, radius, angle, stretch)


class Outline(NamedTuple):
    """Where a thing is: called with positions (h, w) of x and y it gives (h, w) bool."""

    label: int
    x: float
    y: float
    radius: float
    angle: float
    stretch: float

    def __call__(self, x, y) -> np.ndarray:
        dx, dy = x - self.x, y - self.y
        a = (dx * np.cos(self.angle) + dy * np.sin(self.angle)) / self.radius
        b = (dy * np.cos(self.angle) - dx * np.sin(self.angle)) / (self.radius * self.stretch)
        if self.label == 0:
            return a**2 + b**2 <= 1
        if self.label == 1:
            return np.maximum(abs(a), abs(b)) <= 0.85
        return (b >= -0.6) & (b + 1.9 * abs(a) <= 1.1)


def paint(rng, label, x, y, size) -> np.ndarray:
    """A colour, with a gradient across the image half of the time."""
    colour = strong_colour(rng, label)
    if rng.random() < 0.5:
        return np.broadcast_to(colour, (*x.shape, 3))
    slope = rng.uniform(-30, 30, 2)
    return colour + (slope[0] * (x / size[1] - 0.5) + slope[1] * (y / size[0] - 0.5))[..., None]


def _drop_hidden(ids, classes):
    """Give what is left of hidden segments to the stuff behind it, and number the rest 1, 2, ..."""
    areas = np.bincount(ids.ravel(), minlength=max(classes) + 1)
    stuff = max((1, 2), key=lambda number: areas[number])
    table, kept = np.zeros(len(areas), dtype=np.int32), {}
    for number, label in classes.items():
        if areas[number] >= MIN_VISIBLE:
            kept[len(kept) + 1] = label
            table[number] = len(kept)
    for number in classes:
        if not table[number]:
            table[number] = table[stuff]
    return table[ids], kept
