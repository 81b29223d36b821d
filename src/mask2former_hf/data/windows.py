"""Windows of images that may be too large to be read as a whole.

A window is (left, top, right, bottom) in pixels, the last two exclusive.
"""

import importlib.util
import os
import warnings
from pathlib import Path

import numpy as np

from .bands import CHOOSE, to_pixels, without_nodata
from .errors import data_errors
from .georeference import Georeference
from .images import is_tiff, load_rasterio, say_once

Window = tuple[int, int, int, int]
CACHE = 256  # MB of decoded blocks, more than a row of tiles of 20,000 pixels; GDAL takes 5 % of the memory otherwise


class ImageWindows:
    """An image that is in memory."""

    georeference: Georeference | None = None

    def __init__(self, image: np.ndarray):
        self._image = image
        self.size = image.shape[:2]

    def read(self, window: Window, step: int = 1) -> np.ndarray:
        """(h, w, C) of a window, RGB of 8 bits or bands; of a step above 1 every step-th row and column."""
        left, top, right, bottom = window
        return self._image[top:bottom:step, left:right:step]


class RasterWindows(ImageWindows):
    """A TIFF, of which only windows are read: tiled, BigTIFF, cloud-optimised, with overviews, georeferenced.

    Args:
        level: of its pyramid; 0 is the full image, 1 the first overview.
        channels: None for RGB of 8 bits, of grey or RGB; a number for all bands as they are (`bands.to_bands`).

    Raises:
        ImportError: without rasterio.
        OSError: for a file that cannot be read.
        ValueError: for a level that the file does not have, for colours other than grey and RGB, and for another
            number of bands.
    """

    def __init__(self, path: str | os.PathLike, level: int = 0, channels: int | None = None):
        self._rasterio, self.path, self.channels = load_rasterio(path), Path(path), channels
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dataset has no geotransform")
            try:
                levels = len(self._rasterio.open(self.path).overviews(1))
                if not 0 <= level <= levels:
                    raise ValueError(f"{path}: level={level!r}: the file has the levels 0 to {levels}")
                self._file = self._rasterio.open(self.path, **({"overview_level": level - 1} if level else {}))
            except self._rasterio.errors.RasterioError as error:
                raise OSError(f"{path}: not a readable image ({error}); replace the file or leave it out") from error
        self.size = self._file.height, self._file.width
        self._bands = self._colours() if channels is None else self._all_bands()
        if pages := len(self._file.subdatasets):
            say_once("pages", f"{path} has {pages} pages, of which the first is used")
        if self._file.tags().get("TIFFTAG_ORIENTATION", "1") != "1":
            raise ValueError(f"{path}: is to be turned upright: windows must lie as they are stored")
        if not self._file.transform.is_identity:
            crs = self._file.crs
            self.georeference = Georeference(tuple(self._file.transform)[:6], crs.to_epsg() if crs else None)

    def _colours(self) -> list[int]:
        """The bands of a photo, which become RGB."""
        colours = tuple(colour.name for colour in self._file.colorinterp)
        inverted = self._file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        if inverted or colours[0] not in ("red", "gray", "undefined"):
            shown = f"{colours[0]}{', 0 is white' if inverted else ''}"
            raise ValueError(f"{self.path}: {shown}: windows must be grey or RGB")
        bands = [1, 2, 3] if colours[:3] == ("red", "green", "blue") else [1]
        more = len(colours) > len(bands) + ("alpha" in colours)
        if more and len(bands) == 1:
            raise ValueError(f"{self.path}: has {len(colours)} bands and no colours: a photo is grey or RGB")
        if more:
            say_once("bands", f"{self.path} has {len(colours)} bands, of which the first {len(bands)} are used")
        return bands

    def _all_bands(self) -> list[int]:
        if self._file.count != self.channels:
            raise ValueError(f"{self.path}: has {self._file.count} bands, but {CHOOSE.format(self.channels)}")
        return list(range(1, self.channels + 1))

    def read(self, window: Window, step: int = 1) -> np.ndarray:
        """As of an image in memory; a step above 1 takes the nearest pixels, from an overview if the file has one."""
        left, top, right, bottom = window
        shape = len(self._bands), -(-(bottom - top) // step), -(-(right - left) // step)
        with data_errors(str(self.path)):
            try:
                with self._rasterio.Env(GDAL_CACHEMAX=CACHE):
                    pixels = self._file.read(self._bands, window=((top, bottom), (left, right)), out_shape=shape)
            except self._rasterio.errors.RasterioError as error:
                raise OSError(f"cannot be read ({error}); replace the file or leave it out") from error
            pixels = pixels.transpose(1, 2, 0)
            if self.channels is not None:
                pixels = without_nodata(pixels, self._file.nodata, self.path)
            return to_pixels(pixels, self.path, self.channels)


def open_raster(path: str | os.PathLike, channels: int | None = None, level: int = 0) -> RasterWindows | None:
    """The windows of a TIFF in grey or RGB, or of its bands, if rasterio is there; None for what has to be read as a
    whole.

    Raises:
        ValueError: for a level above 0 of what has to be read as a whole, and one that the file does not have.
    """
    windows = _raster(path, channels, level)
    if level and windows is None:
        raise ValueError(f"{path}: level={level!r}: levels are those of TIFFs that rasterio reads; leave level out")
    return windows


def last_level(path: str | os.PathLike) -> int:
    """Of a TIFF's pyramid, by its header; 0 for what has none, or cannot be read."""
    if not (_is_for_rasterio(path) and os.path.exists(path)):  # GDAL would open /vsicurl/ and s3:// as well
        return 0
    rasterio = load_rasterio(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dataset has no geotransform")
        try:
            with rasterio.open(path) as file:
                return len(file.overviews(1))
        except rasterio.errors.RasterioError:
            return 0


def _is_for_rasterio(path: str | os.PathLike) -> bool:
    """Whether this is a TIFF by its name, no URL, and rasterio is there."""
    is_url = str(path).lower().startswith(("http://", "https://"))
    return not is_url and is_tiff(path) and importlib.util.find_spec("rasterio") is not None


def _raster(path: str | os.PathLike, channels: int | None, level: int) -> RasterWindows | None:
    if not _is_for_rasterio(path):
        return None
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return RasterWindows(path, level, channels)
    except ValueError:  # colours that Pillow translates, and pages that are bands
        if level:
            raise
        return None
