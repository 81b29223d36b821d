"""Generated videos: things that move, cross, hide, leave and enter; data where nothing can be downloaded.

The still picture is that of `scenes.py`, with the same things and grounds; each thing moves on a line and turns, and
things in front hide those behind. Some enter or leave through the border, so that objects are absent in some frames.
"""

from dataclasses import dataclass

import numpy as np

from .classes import ClassTable
from .scenes import (
    ID2LABEL,
    MIN_VISIBLE,
    NUM_THING_CLASSES,
    STUFF_LABEL_IDS,
    Outline,
    ScenesDataset,
    background,
    strong_colour,
)
from .videos import Video, VideoObject, VideoReader


@dataclass(frozen=True)
class _Thing:
    label: int
    start: np.ndarray  # (x, y) of its middle in frame 0, in pixels
    velocity: np.ndarray  # pixels per frame
    radius: float
    stretch: float
    angle: float
    spin: float  # radians per frame
    colour: np.ndarray

    def mask(self, frame: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        middle = self.start + frame * self.velocity
        return Outline(self.label, *middle, self.radius, self.angle + frame * self.spin, self.stretch)(x, y)


class MovingScenes(VideoReader):
    """Videos that are a function of (seed, index) alone.

    An object of which fewer than 12 pixels are to be seen in a frame is not annotated there.

    Args:
        length: number of videos.
        num_frames: of each.
        size: side of the square frames in pixels, or (height, width).
        seed: another seed gives other videos.
        num_things: smallest and largest number of things.
        radius: smallest and largest size of a thing, as a part of the frame's shorter side.
        noise: standard deviation of the pixel noise, in grey levels of 255.
        stuff: annotate sky and ground as well, for panoptic results.
    """

    classes = ClassTable.from_categories(
        {"id": index, "name": ID2LABEL[index], "isthing": True} for index in range(NUM_THING_CLASSES)
    )

    def __init__(
        self,
        length: int,
        num_frames: int = 16,
        size: int | tuple[int, int] = 96,
        seed: int = 0,
        num_things: tuple[int, int] = (2, 5),
        radius: tuple[float, float] = (0.1, 0.2),
        noise: float = 6.0,
        stuff: bool = False,
    ):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if length < 0 or num_frames < 1:
            raise ValueError(f"length={length}, num_frames={num_frames}: must be 0 or more videos of 1 or more frames")
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size={size}: must be at least 16 pixels, one number or (height, width)")
        if not 0 <= num_things[0] <= num_things[1]:
            raise ValueError(
                f"num_things={num_things}: must be a smallest and a largest number, 0 <= smallest <= largest"
            )
        if not 0 < radius[0] <= radius[1]:
            raise ValueError(f"radius={radius}: must be a smallest and a largest size, 0 < smallest <= largest")
        self.length, self.num_frames, self.seed = length, num_frames, seed
        self.num_things, self.radius, self.noise, self.stuff = num_things, radius, noise, stuff
        if stuff:
            self.classes, self.task = ScenesDataset.classes, "panoptic"

    def __len__(self) -> int:
        return self.length

    def most_objects(self) -> int:
        return self.num_things[1] + 2 * self.stuff

    def __getitem__(self, index: int) -> Video:
        index = range(self.length)[index]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        H, W = self.size
        y, x = np.mgrid[0.5:H, 0.5:W].astype(np.float32)
        ground, behind = background(rng, x, y, self.size, max(self.size))
        ground = ground * rng.uniform(0.75, 1.15)
        things = [self._thing(rng) for _ in range(rng.integers(self.num_things[0], self.num_things[1] + 1))]
        noise_seed = int(rng.integers(2**31))
        visible = [self._visible(things, frame, x, y) for frame in range(self.num_frames)]
        objects = []
        for number, thing in enumerate(things):
            masks = [frame[number] if frame[number].sum() >= MIN_VISIBLE else None for frame in visible]
            if any(mask is not None for mask in masks):
                objects.append(VideoObject(number + 1, thing.label, masks))
        if self.stuff:
            free = [~np.logical_or.reduce([np.zeros_like(x, dtype=bool), *frame]) for frame in visible]
            objects += [
                VideoObject(len(things) + number, label, [left & (behind == number) for left in free])
                for number, label in enumerate(STUFF_LABEL_IDS, start=1)
            ]

        def read(frame: int) -> np.ndarray:
            image = ground.copy()
            for thing, mask in zip(things, visible[frame], strict=True):
                image[mask] = thing.colour
            image += np.random.default_rng([noise_seed, frame]).normal(0, self.noise, image.shape)
            return image.clip(0, 255).astype(np.uint8)

        return Video(index, self.size, self.num_frames, tuple(objects), read)

    def _thing(self, rng) -> _Thing:
        """One that is inside the picture at a random frame, so that some come in and some go out."""
        H, W = self.size
        side, label = min(H, W), int(rng.integers(NUM_THING_CLASSES))
        speed, course = rng.uniform(0.005, 0.08) * side, rng.uniform(0, 2 * np.pi)
        velocity = speed * np.array([np.cos(course), np.sin(course)])
        inside = np.array([rng.uniform(0.15, 0.85) * W, rng.uniform(0.15, 0.85) * H])
        return _Thing(
            label,
            inside - int(rng.integers(self.num_frames)) * velocity,
            velocity,
            rng.uniform(*self.radius) * side,
            rng.uniform(0.65, 1.0),
            rng.uniform(0, 2 * np.pi),
            rng.uniform(-0.12, 0.12),
            strong_colour(rng, label),
        )

    @staticmethod
    def _visible(things, frame, x, y) -> list[np.ndarray]:
        """What is to be seen of each thing: later ones lie in front."""
        masks, hidden = [], np.zeros(x.shape, dtype=bool)
        for thing in reversed(things):
            whole = thing.mask(frame, x, y)
            masks.append(whole & ~hidden)
            hidden |= whole
        return masks[::-1]
