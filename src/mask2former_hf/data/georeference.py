"""Where on the map an image lies: the tags of GeoTIFF (OGC 19-008r4), read through Pillow, or a world file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .images import open_image
from .text_files import read_text

_PIXEL_SCALE, _TIE_POINT, _TRANSFORMATION, _GEO_KEYS = 33550, 33922, 34264, 34735  # TIFF tags
_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1025, 2048, 3072  # GeoKeys
_USER_DEFINED = 32767


@dataclass(frozen=True)
class Georeference:
    """The affine map from the pixel grid to the map's coordinates.

    Args:
        transform: (a, b, c, d, e, f): x = a column + b row + c, y = d column + e row + f; (0, 0) is the outer corner
            of the first pixel, as in rasterio's `transform`.
        epsg: code of the coordinate system, if the file names one.
    """

    transform: tuple[float, float, float, float, float, float]
    epsg: int | None = None

    def to_map(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) column and row → (N, 2) x and y."""
        a, b, c, d, e, f = self.transform
        return points @ np.array([[a, d], [b, e]]) + np.array([c, f])

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) x and y → (N, 2) column and row."""
        a, b, c, d, e, f = self.transform
        return (points - np.array([c, f])) @ np.linalg.inv([[a, d], [b, e]])


def read_georeference(path: str | Path) -> Georeference | None:
    """Of an image file, from its tags or from the world file beside it; None for a file that has neither."""
    try:
        with open_image(path) as image:
            tags = dict(getattr(image, "tag_v2", {}))
    except Image.DecompressionBombError as error:
        raise OSError(f"{path}: too large for Pillow, which reads its tags; segment it in tiles ({error})") from error
    try:
        keys = tags.get(_GEO_KEYS, ())
        keys = {keys[k]: keys[k + 3] for k in range(4, len(keys) - 3, 4) if keys[k + 1] == 0}
        code = keys.get(_PROJECTED, keys.get(_GEOGRAPHIC))
        epsg = None if code in (None, 0, _USER_DEFINED) else int(code)
        transform = _of_tags(tags)
        transform = None if transform is None else tuple(map(float, transform))
    except (ValueError, TypeError, LookupError) as error:  # fewer numbers than the tags have, or other things
        raise ValueError(f"{path}: its GeoTIFF tags are damaged ({error}); correct them, or save it without") from None
    if transform is None:
        transform = _of_world_file(Path(path))
    elif keys.get(_RASTER_TYPE) == 2:  # "PixelIsPoint": the tags say where centres are
        transform = _moved(transform, -0.5)
    if transform is None:
        return None
    a, b, _, d, e, _ = transform
    if not np.isfinite(transform).all() or a * e == b * d:
        raise ValueError(f"{path}: the transform {transform} places all pixels on a line or nowhere; correct it")
    return Georeference(transform, epsg)


def _of_tags(tags: dict) -> tuple | None:
    if _TRANSFORMATION in tags:
        m = tags[_TRANSFORMATION]
        return m[0], m[1], m[3], m[4], m[5], m[7]
    if _PIXEL_SCALE in tags and _TIE_POINT in tags:
        (width, height, *_), (column, row, _, x, y, *_) = tags[_PIXEL_SCALE], tags[_TIE_POINT]
        return width, 0.0, x - column * width, 0.0, -height, y + row * height
    return None


def _of_world_file(path: Path) -> tuple | None:
    """photo.jgw or photo.jpgw beside photo.jpg: six lines a, d, b, e, and x, y of the first pixel's centre."""
    ending = path.suffix
    for name in (ending[:2] + ending[-1] + "w", ending + "w", ".wld"):
        file = path.with_suffix(name)
        if len(ending) > 2 and file.is_file():
            try:
                a, d, b, e, c, f = (float(line.replace(",", ".")) for line in read_text(file).split())
            except ValueError:
                raise ValueError(f"{file}: not a world file, which has six numbers; correct or remove it") from None
            return _moved((a, b, c, d, e, f), -0.5)
    return None


def _moved(transform: tuple, pixels: float) -> tuple:
    a, b, c, d, e, f = transform
    return a, b, c + pixels * (a + b), d, e, f + pixels * (d + e)
