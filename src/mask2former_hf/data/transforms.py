"""Random transforms of an image and its map of segment ids, with the rounding rules of the original's recipes.

A transform draws its parameters, and what it does is a function of the `Example` and those parameters alone: called
with a generator it appends `[name, parameters]`, plain values, to the example's `augmentation`, for `replay` in
augmentation.py. The rules are those of the original's dataset mappers and of detectron2's transforms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .bands import resize_bands
from .classes import count_ids
from .example import Example

IMAGE_PADDING = 128  # grey level, before normalisation
CROP_TRIES = 10


class Transform:
    """One step; called with an example and a generator it draws, applies and records."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        parameters = self.draw(example, rng)
        record = [*example.augmentation, [type(self).__name__, parameters]]
        return replace(self.apply(example, parameters), augmentation=record)

    def draw(self, example: Example, rng: np.random.Generator) -> dict:
        """The parameters of one application: plain values, all that is random."""
        raise NotImplementedError

    @staticmethod
    def apply(example: Example, parameters: dict) -> Example:
        """The new example; the old one stays as it is."""
        raise NotImplementedError


@dataclass(frozen=True)
class HorizontalFlip(Transform):
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p}: must be a probability, 0 to 1")

    def draw(self, example, rng) -> dict:
        return {"flip": bool(rng.random() < self.p)}

    @staticmethod
    def apply(example, parameters) -> Example:
        if not parameters["flip"]:
            return example
        return example.moved(example.image[:, ::-1].copy(), example.segmentation[..., ::-1].copy())


class _Resize(Transform):
    @staticmethod
    def apply(example, parameters) -> Example:
        size = (parameters["height"], parameters["width"])
        if size == example.size:
            return example
        image = resize_bands(example.image, size)
        return example.moved(image, _resize_map(example.segmentation, size, parameters["nearest"]))


@dataclass(frozen=True)
class LargeScaleJitter(_Resize):
    """Resize to fit a box of `size` times a factor, uniform in [min_scale, max_scale]; the aspect is kept.

    Args:
        size: side of the square box, or its (height, width), in pixels.
    """

    size: int | tuple[int, int]
    min_scale: float = 0.1
    max_scale: float = 2.0

    def __post_init__(self):
        _check_size("size", self.size)
        if not 0 < self.min_scale <= self.max_scale:
            raise ValueError(
                f"min_scale={self.min_scale}, max_scale={self.max_scale}: must be 0 < min_scale <= max_scale"
            )

    def draw(self, example, rng) -> dict:
        sides = example.size
        scale = rng.uniform(self.min_scale, self.max_scale)
        ratio = min(scale * box / side for box, side in zip(as_pair(self.size), sides, strict=True))
        height, width = (max(1, round(side * ratio)) for side in sides)
        return {"height": height, "width": width, "nearest": "centre"}


@dataclass(frozen=True)
class ResizeShortestEdge(_Resize):
    """Resize the short side to one of `choices`, less if the long side would exceed `max_size`.

    Args:
        choices: lengths in pixels, equally likely.
        max_size: bound on the long side.
        nearest: where a map is sampled, at the `"centre"` of a new pixel, as the image, or at its upper left
            `"corner"`: the original resizes label maps so, up to half a new pixel beside the image.
    """

    choices: Sequence[int]
    max_size: int
    nearest: str = "centre"

    def __post_init__(self):
        if not len(self.choices) or min(self.choices) < 1 or self.max_size < 1:
            raise ValueError(f"choices={self.choices}, max_size={self.max_size}: must be lengths of 1 or more pixels")
        if self.nearest not in ("centre", "corner"):
            raise ValueError(f"nearest={self.nearest!r}: must be 'centre' or 'corner'")

    def draw(self, example, rng) -> dict:
        sides = example.size
        short = int(self.choices[rng.integers(len(self.choices))])
        ratio = short / min(sides)
        sides = [short if side == min(sides) else ratio * side for side in sides]
        ratio = min(1.0, self.max_size / max(sides))
        height, width = (max(1, int(side * ratio + 0.5)) for side in sides)
        return {"height": height, "width": width, "nearest": self.nearest}


@dataclass(frozen=True)
class RandomCrop(Transform):
    """Cut out a window of `size`, or less where the image is smaller.

    Args:
        size: side of the square window, or its (height, width), in pixels.
        single_category_max_area: below 1, up to 10 windows are drawn until one has two categories or more, and none
            on this share or more of the annotated pixels; the last one stands.
    """

    size: int | tuple[int, int]
    single_category_max_area: float = 1.0

    def __post_init__(self):
        _check_size("size", self.size)
        if not 0 < self.single_category_max_area <= 1:
            raise ValueError(f"single_category_max_area={self.single_category_max_area}: must be in (0, 1]")

    def draw(self, example, rng) -> dict:
        sides = example.size
        size = [min(wanted, side) for wanted, side in zip(as_pair(self.size), sides, strict=True)]
        for _ in range(CROP_TRIES):
            top, left = (int(rng.integers(side - cut + 1)) for side, cut in zip(sides, size, strict=True))
            parameters = {"top": top, "left": left, "height": size[0], "width": size[1]}
            if self.single_category_max_area == 1 or self._is_mixed(example, parameters):
                break
        return parameters

    def _is_mixed(self, example, parameters) -> bool:
        categories = {segment["id"]: segment["category_id"] for segment in example.segments}
        rows, columns = _window(parameters)
        areas = {}
        for number, area in zip(*count_ids(example.segmentation[..., rows, columns]), strict=True):
            if number in categories:
                category = categories[number]
                areas[category] = areas.get(category, 0) + area
        return len(areas) > 1 and max(areas.values()) < self.single_category_max_area * sum(areas.values())

    @staticmethod
    def apply(example, parameters) -> Example:
        rows, columns = _window(parameters)
        return example.moved(example.image[rows, columns].copy(), example.segmentation[..., rows, columns].copy())


@dataclass(frozen=True)
class PadTo(Transform):
    """Pad right and bottom to exactly `size`: a photo with 128, bands with their own means, the map with `padding_id`.

    Args:
        size: side of the square, or (height, width), in pixels; a larger image is an error.
        padding_id: `BACKGROUND_ID` if "no segment" is to be learnt there, 0 if it is to be ignored.
    """

    size: int | tuple[int, int]
    padding_id: int

    def __post_init__(self):
        _check_size("size", self.size)

    def draw(self, example, rng) -> dict:
        height, width = as_pair(self.size)
        return {"height": height, "width": width, "padding_id": self.padding_id}

    @staticmethod
    def apply(example, parameters) -> Example:
        image, ids = example.image, example.segmentation
        (H, W), size = image.shape[:2], (parameters["height"], parameters["width"])
        if H > size[0] or W > size[1]:
            raise ValueError(f"the image is {H}x{W}, larger than the {size[0]}x{size[1]} to pad to: crop it before")
        if (H, W) == size:
            return example
        photo = image.dtype == np.uint8 and image.shape[2] == 3
        grey = IMAGE_PADDING if photo else image.mean((0, 1), dtype=np.float64)
        canvas = np.empty((*size, image.shape[2]), dtype=image.dtype)
        canvas[:] = grey
        canvas[:H, :W] = image
        padded = np.full((*ids.shape[:-2], *size), parameters["padding_id"], dtype=np.int32)
        padded[..., :H, :W] = ids
        return example.moved(canvas, padded)


@dataclass(frozen=True)
class FixedSizeCrop(PadTo):
    """Cut out a window of `size` where the image is larger, pad as `PadTo` where it is smaller.

    One uniform number places the window on both axes, as in the original: windows lie on the diagonal.
    """

    def draw(self, example, rng) -> dict:
        place, size = rng.random(), as_pair(self.size)
        sides = zip(example.size, size, strict=True)
        top, left = (round(max(side - cut, 0) * place) for side, cut in sides)
        return {"top": top, "left": left, **super().draw(example, rng)}

    @staticmethod
    def apply(example, parameters) -> Example:
        return PadTo.apply(RandomCrop.apply(example, parameters), parameters)


@dataclass(frozen=True)
class DropEmptySegments(Transform):
    """Remove segments without a pixel."""

    def draw(self, example, rng) -> dict:
        return {}

    @staticmethod
    def apply(example, parameters) -> Example:
        present = set(count_ids(example.segmentation)[0])
        kept = [segment for segment in example.segments if segment["id"] in present]
        return replace(example, segments=kept)


def _resize_map(ids, size, nearest) -> np.ndarray:
    """Nearest neighbour over the last two axes."""
    if nearest == "corner":
        rows, columns = (np.arange(new) * old // new for new, old in zip(size, ids.shape[-2:], strict=True))
        return ids[..., rows[:, None], columns]
    result = np.empty((*ids.shape[:-2], *size), dtype=np.int32)
    for index in np.ndindex(ids.shape[:-2]):
        result[index] = Image.fromarray(ids[index]).resize(size[::-1], Image.Resampling.NEAREST)
    return result


def _window(parameters) -> tuple[slice, slice]:
    top, left = parameters["top"], parameters["left"]
    return slice(top, top + parameters["height"]), slice(left, left + parameters["width"])


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """One number for both sides, or (height, width)."""
    return tuple(size) if isinstance(size, Sequence) else (size, size)


def _check_size(name, size) -> None:
    sides = as_pair(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name}={size}: must be 1 or more whole pixels, one number or (height, width)")
