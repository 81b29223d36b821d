"""Colour jitter of SSD (Liu et al., 2016) on uint8 RGB images, with the integer HSV of OpenCV computed in numpy.

`rgb_to_hsv` equals `cv2.cvtColor(..., COLOR_RGB2HSV)` for all 256**3 colours and `hsv_to_rgb` equals the vector code
of COLOR_HSV2RGB for all 180 * 256 * 256 values (compared with OpenCV 4.10 and 5.0 on x86 with AVX2). That code
truncates; OpenCV's scalar code, for the last width % 32 pixels of a row, rounds: there a value may be 1 higher.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .example import Example
from .transforms import Transform

HUES = 180  # OpenCV's hue in degrees / 2, so that it fits a byte
_FRACTION_BITS = 12


@dataclass(frozen=True)
class SSDColour(Transform):
    """Colour jitter of SSD: brightness, contrast, saturation and hue, each with probability 1/2 (`ssd_colour`)."""

    def draw(self, example, rng) -> dict:
        parameters = {
            "brightness": rng.uniform(-32, 32),
            "contrast": rng.uniform(0.5, 1.5),
            "saturation": rng.uniform(0.5, 1.5),
            "hue": int(rng.integers(-18, 19)),
        }
        parameters = {name: number if rng.random() < 0.5 else None for name, number in parameters.items()}
        return {**parameters, "contrast_first": bool(rng.random() < 0.5)}

    @staticmethod
    def apply(example, parameters) -> Example:
        image = example.image
        if image.dtype != np.uint8 or image.shape[2] != 3:
            raise ValueError(
                f"image of {example.name} has {image.shape[2]} channels of {image.dtype}: colours are jittered of "
                "8-bit RGB alone; use an augmentation without SSDColour (colour=False)"
            )
        return example.with_image(ssd_colour(example.image, **parameters))


def ssd_colour(
    image: np.ndarray,
    brightness: float | None = None,
    contrast: float | None = None,
    saturation: float | None = None,
    hue: int | None = None,
    contrast_first: bool = True,
) -> np.ndarray:
    """Change the colours of an (H, W, 3) uint8 RGB image; None leaves a step out.

    Every step clips to [0, 255] and truncates to whole grey levels, as the original does.

    Args:
        brightness: grey levels that are added.
        contrast: factor on the grey levels.
        saturation: factor on the saturation.
        hue: units of 2 degrees by which the hue is turned.
        contrast_first: contrast before saturation and hue, else after them. Brightness comes before all.
    """
    if brightness is not None:
        image = scale_levels(image, 1.0, brightness)
    if contrast is not None and contrast_first:
        image = scale_levels(image, contrast)
    if saturation is not None:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = scale_levels(hsv[..., 1], saturation)
        image = hsv_to_rgb(hsv)
    if hue is not None:  # a second trip through HSV: what the first one rounds is part of the result
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = ((np.arange(256) + hue) % HUES).astype(np.uint8)[hsv[..., 0]]
        image = hsv_to_rgb(hsv)
    if contrast is not None and not contrast_first:
        image = scale_levels(image, contrast)
    return image


def scale_levels(levels: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
    """uint8 -> uint8: levels * factor + offset in float32, clipped and truncated."""
    table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return table.clip(0, 255).astype(np.uint8)[levels]


def rgb_to_hsv(image: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 RGB -> (..., 3) uint8: hue in [0, 180), saturation and value in [0, 255].

    Divisions are multiplications with reciprocals of 12 fractional bits, and lie in tables.
    """
    red, green, blue = _planes(image)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    is_red, is_green = value == red, value == green
    # Row of the table of hues: which colour is the largest, and by how much its two neighbours on the circle differ
    place = np.where(is_red, green, np.where(is_green, blue, red)).astype(np.int32)
    place -= np.where(is_red, blue, np.where(is_green, red, green))
    place += np.where(is_red, np.int32(255), np.where(is_green, np.int32(255 + 511), np.int32(255 + 2 * 511)))
    result = np.empty(image.shape, dtype=np.uint8)
    result[..., 0] = _hues().take((place << 8) + chroma, mode="clip")
    result[..., 1] = _saturations().take((chroma.astype(np.int32) << 8) + value, mode="clip")
    result[..., 2] = value
    return result


def hsv_to_rgb(image: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 as `rgb_to_hsv` returns -> (..., 3) uint8 RGB; hue must be below 180."""
    hue, saturation, value = _planes(image)
    index = (hue.astype(np.int32) << 8) + saturation
    levels = value * np.float32(1 / 255)
    result, share = np.empty(image.shape, dtype=np.uint8), np.empty(index.shape, dtype=np.float32)
    for channel, shares in enumerate(_shares()):
        shares.take(index, out=share, mode="clip")
        share *= levels
        share *= np.float32(255)
        result[..., channel] = share
    return result


def _planes(image: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(image[..., channel]) for channel in range(3)]


@cache
def _hues() -> np.ndarray:
    """uint8 by (third of the circle: red, green, blue; difference of the two other colours + 255; chroma), flat."""
    _, hue_of = _reciprocals()
    thirds, difference, chroma = np.ogrid[:3, -255:256, :256]
    hue = _round_off((difference + 2 * thirds * chroma) * hue_of)  # the product of sixths, in units of the chroma
    return (hue + HUES * (hue < 0)).astype(np.uint8).ravel()


@cache
def _saturations() -> np.ndarray:
    """uint8 by (chroma, value), flat."""
    saturation_of, _ = _reciprocals()
    return _round_off(np.arange(256)[:, None] * saturation_of).astype(np.uint8).ravel()


def _round_off(fixed: np.ndarray) -> np.ndarray:
    return (fixed + (1 << (_FRACTION_BITS - 1))) >> _FRACTION_BITS


@cache
def _reciprocals() -> tuple[np.ndarray, np.ndarray]:
    """255 / i and 30 / i in fixed point for i = 0 ... 255; 0 for i = 0."""
    numbers = np.arange(1, 256)
    tables = np.rint((255 << _FRACTION_BITS) / numbers), np.rint((HUES << _FRACTION_BITS) / (6.0 * numbers))
    return tuple(np.append(0, table).astype(np.int32) for table in tables)


@cache
def _shares() -> np.ndarray:
    """(3, 180 * 256) float32: what part of the value red, green and blue get at a hue and saturation.

    1 - s * x is rounded to float32 once, as a fused multiply-add does: float64 holds the product exactly.
    """
    hue = np.arange(HUES, dtype=np.float32)[:, None] * np.float32(6 / HUES)
    saturation = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    sector = np.floor(hue)
    past = hue - sector  # of the way through the sector of 60 degrees
    most = np.ones((HUES, 256), dtype=np.float32)
    least = np.broadcast_to(np.float32(1) - saturation, most.shape)
    falling = (1 - saturation.astype(np.float64) * past).astype(np.float32)
    rising = (1 - saturation.astype(np.float64) * (np.float32(1) - past)).astype(np.float32)
    sector = np.broadcast_to(sector.astype(np.intp), most.shape)
    red = np.choose(sector, (most, falling, least, least, rising, most))
    green = np.choose(sector, (rising, most, most, falling, least, least))
    blue = np.choose(sector, (least, least, rising, most, most, falling))
    return np.stack([red, green, blue]).reshape(3, -1)
