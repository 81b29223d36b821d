"""What the doctor says of image files: how they are turned, and how many bits they have."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from .findings import WARNING, Finding
from .images import read_as
from .survey import Survey, spread_over

ORIENTATION = 0x0112
MOST_READ = 200  # headers; pixels are read of a tenth of them
DEEP = ("I", "F")  # first letter of Pillow's modes of more than 8 bits


def turned(split: Survey, plan) -> Iterator[Finding]:
    """By EXIF: this package turns them, the program that drew the masks may not have."""
    paths = [path for path in _some(split, MOST_READ) if _header(path, _orientation) not in (None, 1)]
    if paths:
        yield Finding(
            WARNING,
            split.split,
            f"{len(paths)} of the images looked at are turned by their EXIF tag, such as {paths[0].name}",
            "they are used upright; masks drawn by a program that ignores the tag are turned against them, which "
            "sizes show only if they are not square or turned by half",
            "look at one with its masks; save the images upright, without the tag",
        )


def sixteen_bits(split: Survey, plan) -> Iterator[Finding]:
    """Photos of 16 bits are divided by 257: 12 bits of a sensor become nearly black."""
    if getattr(split.dataset, "channels", None) is not None:
        return
    paths = [path for path in _some(split, MOST_READ) if str(_header(path, _mode))[0] in DEEP]
    if not paths:
        return
    most = max(int(read_as(path, lambda image, _: np.asarray(image).max())) for path in paths[: MOST_READ // 10])
    dark = f"; the brightest value is {most}, so they become nearly black" if most < 65535 / 8 else ""
    yield Finding(
        WARNING,
        split.split,
        f"{len(paths)} of the images looked at have 16 bits, such as {paths[0].name}{dark}",
        "they are divided by 257 to 8 bits, which keeps little of a scale that is not full",
        "save them scaled to 8 bits, or train on bands with their own numbers (--channels 1)",
    )


def one_image_of_another_kind(split: Survey, plan) -> Iterator[Finding]:
    """Grey among colours."""
    grey = [path for path in _some(split, MOST_READ) if _header(path, _mode) in ("1", "L")]
    seen = len(_some(split, MOST_READ))
    if grey and len(grey) < 0.5 * seen and len(grey) > 0.05 * seen:
        yield Finding(
            WARNING,
            split.split,
            f"{len(grey)} of the {seen} images looked at are grey, such as {grey[0].name}, and the others in colour",
            "colour then tells where an image is from, which is easily learnt instead of what is in it",
            "see that every class is in images of both kinds",
        )


def _some(split: Survey, most: int) -> list:
    return spread_over(split.image_paths(), most)


def _header(path, read):
    """What a header says; None for a file that `check_headers` finds."""
    try:
        return read_as(path, read, whole=False)
    except OSError:
        return None


def _orientation(image: Image.Image, where):
    return image.getexif().get(ORIENTATION)


def _mode(image: Image.Image, where) -> str:
    return image.mode


IMAGE_CHECKS = (turned, sixteen_bits, one_image_of_another_kind)
