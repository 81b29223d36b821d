"""Images of any number of bands, from files and arrays, their numbers as they are.

Bands are counted from 1, as GDAL, rasterio and QGIS do, in the order of the file. A file is a TIFF whose samples are
the bands, or whose pages are; an array of NumPy (`.npy`); or any picture that Pillow opens with so many bands.
"""

import contextlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from .images import ARRAY_SUFFIX, MOST_BANDS, is_tiff, load_array, load_rasterio, read_as, read_image, say_once, to_rgb
from .rle import to_numpy

LARGEST_EXACT = 2**24  # integers up to here are exact in float32
_SAMPLES_PER_PIXEL, _PLANAR, _GDAL_NODATA = 277, 284, 42113  # TIFF tags
CHOOSE = "{} are wanted, the model's or those of channels=: choose bands with gdal_translate -b 1 -b 2 ..., or NumPy"


def read_pixels(path: str | Path, channels: int | None = None, content: bytes | None = None) -> np.ndarray:
    """An image file: (H, W, 3) uint8 RGB, or (H, W, channels) of `to_bands`.

    Pixels of the value that the file declares to be "no data" (GDAL's tag) become 0, which is said once.

    Args:
        content: of the file, if it was read already; `path` is for errors then.

    Raises:
        OSError: for files that are missing or damaged, and for a TIFF that Pillow cannot read if rasterio is missing.
        ValueError: for another number of bands or pages.
    """
    if content is not None:
        return read_as(path, lambda image, where: to_pixels(image, where, channels), content=content)
    path = Path(path)
    if channels is None:
        return read_image(path)
    if path.suffix.lower() == ARRAY_SUFFIX:
        return to_bands(load_array(path), channels, path)
    if is_tiff(path) and not is_for_pillow(path):
        return read_raster(path, channels)
    return read_as(path, lambda image, where: to_bands(image, channels, where))


def check_bands(path: str | Path, channels: int | None):
    """Whether an image file can be opened as `read_pixels` would; of a raster or an array no pixel is read.

    Raises:
        OSError, ValueError: as `read_pixels`.
    """
    path = Path(path)
    if channels is None and path.suffix.lower() != ARRAY_SUFFIX:
        read_as(path, lambda image, where: None, whole=False)
    elif channels is not None and path.suffix.lower() == ARRAY_SUFFIX:
        shape = load_array(path, header=True).shape
        if (shape[2] if len(shape) == 3 else 1) != channels and (len(shape) == 2 or shape[0] != channels):
            raise ValueError(f"{path}: has shape {shape}, but {CHOOSE.format(channels)}")
    elif channels is not None and is_tiff(path) and not is_for_pillow(path):
        with _opened_raster(path, channels):
            pass


def to_pixels(image, where: str | Path, channels: int | None = None) -> np.ndarray:
    """`images.to_rgb` of a photo, or `to_bands`."""
    return to_rgb(image, where) if channels is None else to_bands(image, channels, where)


def to_bands(image, channels: int, where: str | Path) -> np.ndarray:
    """(H, W, channels) uint8, uint16 or float32 of a PIL image or an array, none of its numbers changed.

    Args:
        image: PIL, upright by its EXIF tag, whose bands or pages are so many; or an array, list or tensor (H, W) of
            one band, (H, W, channels), or (channels, H, W) where that cannot be meant. bool is 0 and 255, other
            integers and floats become float32.
        where: file or row, for errors.

    Raises:
        ValueError: for another number of bands; for nan, infinite numbers, and integers that float32 does not hold.
    """
    if isinstance(image, Image.Image):
        array = without_nodata(_of_picture(image, where), _declared_nodata(image), where)
    else:
        array = to_numpy(image)
    if array.ndim == 3 and array.shape[2] != channels and array.shape[0] == channels:
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape or array.shape[2] != channels:
        sides = [side for side in array.shape[::-2] if side <= MOST_BANDS]  # the last one, or the first
        found = f"{sides[0]} bands" if array.ndim == 3 and sides else "other sides"
        raise ValueError(f"{where}: has {found} ({array.dtype} of shape {array.shape}), but {CHOOSE.format(channels)}")
    array = np.ascontiguousarray(_plain_numbers(array, where))
    return array if array.flags.writeable else array.copy()


def _plain_numbers(array: np.ndarray, where) -> np.ndarray:
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{where}: is {array.dtype}: pixels are integers or floats")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if wrong := int((~np.isfinite(array)).any(-1).sum()):
            raise ValueError(
                f"{where}: {wrong} of {array.shape[0] * array.shape[1]} pixels are nan or infinite: replace them, for "
                "example by 0 (numpy.nan_to_num), or let the file declare it (gdal_translate -a_nodata nan), which "
                "makes 0 of them"
            )
        return array
    if array.min() < -LARGEST_EXACT or array.max() > LARGEST_EXACT:
        raise ValueError(
            f"{where}: is {array.dtype} from {array.min()} to {array.max()}: float32 holds integers up to "
            f"{LARGEST_EXACT} exactly; scale it first"
        )
    return array.astype(np.float32)


def _of_picture(image: Image.Image, where) -> np.ndarray:
    """The numbers of a picture's bands; of several pages, each of one band, those of the pages."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        bands = [np.asarray(page) for page in ImageSequence.Iterator(image)]
        if any(band.ndim != 2 or band.shape != bands[0].shape for band in bands) or image.mode == "P":
            raise ValueError(
                f"{where}: has {pages} pages that are no bands, which have one size and one value a pixel: save the "
                "page that is meant as a file of its own"
            )
        return np.stack(bands, axis=-1)
    signed, image = image.format == "TIFF", ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):  # positions in a palette are no brightness
        image = image.convert("RGB" if image.mode == "P" else "RGBA")
    array = np.asarray(image)
    if image.mode == "I" and not signed and 0 <= array.min() and array.max() <= 65535:  # some 16-bit files are "I"
        array = array.astype(np.uint16)
    return array


def is_for_pillow(path: Path) -> bool:
    """Whether Pillow sees all of a TIFF's bands."""
    try:
        with Image.open(path) as image:
            samples, planar = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1), image.tag_v2.get(_PLANAR, 1)
            # Pillow 13 reads planes of more than 8 bits as one, or not at all
            return samples == len(image.getbands()) and (planar == 1 or image.mode[0] not in "IF")
    except (OSError, ValueError, Image.DecompressionBombError):  # what Pillow raises for modes that it does not know
        return False


@contextlib.contextmanager
def _opened_raster(path: Path, channels: int | None):
    try:
        rasterio = load_rasterio(path)
    except ImportError as error:  # one more thing that a file needs, said with the others
        raise OSError(str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dataset has no geotransform")
            file = rasterio.open(path)
        with file:
            if file.subdatasets:
                raise ValueError(
                    f"{path}: has {len(file.subdatasets)} pages of {file.count} bands, of which a model would see the "
                    "first; save the page that is meant as a file of its own"
                )
            if channels is not None and file.count != channels:
                raise ValueError(f"{path}: has {file.count} bands, but {CHOOSE.format(channels)}")
            yield file
    except rasterio.errors.RasterioError as error:
        raise OSError(f"{path}: not a readable image ({error}); replace the file or leave it out") from error


def read_raster(path: Path, channels: int | None = None) -> np.ndarray:
    """`read_pixels` by rasterio; None for all bands, however many."""
    with _opened_raster(path, channels) as file:
        pixels, nodata = file.read(), file.nodata
    return to_bands(without_nodata(pixels.transpose(1, 2, 0), nodata, path), len(pixels), path)


def without_nodata(array: np.ndarray, nodata: float | None, where) -> np.ndarray:
    """0 where an array has the value that its file declares to be none."""
    if nodata is None:
        return array
    missing = np.isnan(array) if np.isnan(nodata) else array == nodata
    if nodata == 0 or not missing.any():
        return array
    say_once("nodata", f"{where} declares {nodata:g} to be no data; such pixels are 0 for the model")
    return np.where(missing, array.dtype.type(0), array)


def _declared_nodata(image: Image.Image) -> float | None:
    text = getattr(image, "tag_v2", {}).get(_GDAL_NODATA)
    try:
        return None if text is None else float(str(text).strip("\0 "))
    except ValueError:
        return None


def resize_bands(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, as Pillow does, band by band where it has no mode for all; the dtype stays."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    whole = image.dtype == np.uint16
    bands = np.moveaxis(image.astype(np.float32) if whole else image, -1, 0)
    resized = [
        np.asarray(Image.fromarray(np.ascontiguousarray(b)).resize(size[::-1], Image.Resampling.BILINEAR))
        for b in bands
    ]
    result = np.stack(resized, axis=-1)
    return np.rint(result).astype(np.uint16) if whole else result
