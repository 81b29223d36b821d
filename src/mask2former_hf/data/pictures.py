"""What is shown of images of bands: three of them as red, green and blue, or one as grey."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .bands import is_for_pillow, read_raster, to_bands
from .images import ARRAY_SUFFIX, MOST_BANDS, is_tiff, load_array, read_as, read_image, to_rgb
from .rle import to_numpy

PERCENTILES = (2, 98)  # of a band that become black and white in a picture, as QGIS stretches it


def shown_bands(channels: int, show: Sequence[int] | None = None) -> Sequence[int]:
    """Three bands for red, green and blue, or one for grey, counted from 1: those given, or the first three, or the
    first of fewer.

    Raises:
        ValueError: naming `show_bands`, for others than the image has.
    """
    if show is None:
        return (1, 2, 3) if channels >= 3 else (1,)
    if len(show) not in (1, 3) or not all(1 <= band <= channels for band in show):
        raise ValueError(
            f"show_bands={list(show)}: must be three bands, for red, green and blue, or one, each from 1 to {channels}"
        )
    return show


def picture(image: np.ndarray, show: Sequence[int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 of an (H, W, C) image, to be looked at.

    8 bits are shown as they are. Others are stretched, each band for itself, from its 2nd to its 98th percentile.

    Args:
        show: see `shown_bands`.
    """
    chosen = [image[..., band - 1] for band in shown_bands(image.shape[2], show)]
    if image.dtype != np.uint8:
        chosen = [_stretched(band) for band in chosen]
    return np.stack(chosen * (3 // len(chosen)), axis=-1)


def to_picture(image, show: Sequence[int] | None = None, where: str | Path = "image") -> np.ndarray:
    """(H, W, 3) uint8 of an image in any form: `images.to_rgb` of a photo; `picture` of floats, of more than 4 bands,
    and where bands are chosen."""
    pixels = np.asarray(image) if isinstance(image, Image.Image) else to_numpy(image)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if show is None and pixels.dtype.kind != "f" and channels <= 4:
        return to_rgb(image, where)
    return picture(to_bands(image, channels, where), show)


def read_picture(path: Path, show: Sequence[int] | None = None) -> np.ndarray:
    """`to_picture` of an image file."""
    if path.suffix.lower() == ARRAY_SUFFIX:
        array = load_array(path)
        bands_first = array.ndim == 3 and array.shape[2] > MOST_BANDS >= array.shape[0]
        return to_picture(array.transpose(1, 2, 0) if bands_first else array, show, path)
    if is_tiff(path) and not is_for_pillow(path):
        return picture(read_raster(path), show)
    return read_image(path) if show is None else read_as(path, lambda image, where: to_picture(image, show, where))


def _stretched(band: np.ndarray) -> np.ndarray:
    dark, bright = np.percentile(band, PERCENTILES)
    levels = (band.astype(np.float32) - dark) / max(bright - dark, 1e-12)
    return np.rint(levels.clip(0, 1) * 255).astype(np.uint8)
