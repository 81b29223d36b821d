"""Image files: which there are, and how they become RGB, maps of ids, or panoptic ids. The only place that does it."""

import contextlib
import importlib.util
import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .rle import to_numpy

TIFF_SUFFIXES, ARRAY_SUFFIX = (".tif", ".tiff"), ".npy"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", *TIFF_SUFFIXES, ".gif", ".ppm", ".pgm")
IMAGE_SUFFIXES = (*PICTURE_SUFFIXES, ARRAY_SUFFIX)
MAP_SUFFIXES = (".png", *TIFF_SUFFIXES, ".bmp", ".gif")  # lossless
MOST_BANDS = 16
_TURNED = (5, 6, 7, 8)  # values of the EXIF orientation that swap height and width
_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SAMPLES_PER_PIXEL = 277  # TIFF
_SAID: set[str] = set()  # kinds of warnings that this process gave
logger = logging.getLogger(__name__)


def to_rgb(image, where: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 of a PIL image in any mode, upright by its EXIF tag, or of an array.

    16 bits are divided by 257 and rounded, so that white stays white; grey is repeated, alpha left out. The rules are
    those of `Mask2FormerImageProcessor`, which keeps fractions besides.

    Args:
        image: PIL; or an array, list or tensor (H, W) or (H, W, C) with 1 to 4 channels, of bool, uint16, or whole
            numbers up to 255.
        where: file or row, for errors.

    Raises:
        ValueError: for fractions and other numbers, whose scale only their owner knows.
    """
    if isinstance(image, Image.Image):
        _say_what_is_left_out(image, where)
        image = ImageOps.exif_transpose(image)
        deep = image.mode[0] in "IF"  # more than 8 bits
        array = np.asarray(image if deep else image.convert("RGB"))
        if image.mode == "I" and 0 <= array.min() and array.max() <= 65535:  # some 16-bit files are "I"
            array = array.astype(np.uint16)
    else:
        array = to_numpy(image)
    if array.ndim not in (2, 3) or 0 in array.shape or array.shape[2:] not in ((), (1,), (2,), (3,), (4,)):
        raise ValueError(
            f"{where}: {array.dtype} of shape {array.shape} is no image, which is (H, W) or (H, W, C) with 1 to 4 "
            "channels and has pixels"
        )
    array = _eight_bits(array, where)
    if array.ndim == 2 or array.shape[2] < 3:
        array = (array if array.ndim == 2 else array[..., 0])[..., None].repeat(3, 2)
    array = np.ascontiguousarray(array[..., :3])
    return array if array.flags.writeable else array.copy()  # a view of PIL's memory is read-only


def _eight_bits(array: np.ndarray, where) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        bounds = f" from {array.min()} to {array.max()}" if array.dtype.kind in "iuf" else ""
        raise ValueError(
            f"{where}: image is {array.dtype}{bounds}; it must be uint8, uint16, bool or whole numbers up to 255: "
            "which number becomes white only its owner knows, scale it first"
        )
    return array.astype(np.uint8)


def to_map(image: Image.Image, where: str | Path) -> np.ndarray:
    """(H, W) integers of an image with one channel: 8 or 16 bits, or a palette, whose positions are the ids.

    Also of RGB if red, green and blue are equal everywhere, which drawing programs make of grey.

    Raises:
        ValueError: for colours, fractions, or several pages, of which only the first would be seen.
    """
    _refuse_pages(image, where)
    ids = np.asarray(image)
    if image.mode in ("RGB", "RGBA") and (ids[..., :1] == ids[..., 1:3]).all() and (ids[..., 3:] == 255).all():
        ids = ids[..., 0]
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise ValueError(
            f"{where}: mode {image.mode} is not a map of ids, which has one integer channel; convert colours to ids "
            "and save them as a PNG of mode L or I;16"
        )
    return ids.astype(np.uint8) if ids.dtype.kind == "b" else ids


def to_panoptic_ids(image: Image.Image, where: str | Path) -> np.ndarray:
    """(H, W) int32 ids of COCO's panoptic PNG: red + 256 green + 65536 blue, of a palette those of its colours."""
    _refuse_pages(image, where)
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(
            f"{where}: mode {image.mode} is not a panoptic map, which stores ids as red + 256 green + 65536 blue"
        )
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    return rgb[..., 0] + (rgb[..., 1] << 8) + (rgb[..., 2] << 16)


def _refuse_pages(image: Image.Image, where):
    if getattr(image, "is_animated", False):
        raise ValueError(f"{where}: has {image.n_frames} pages; a map of ids has one, save each as a file of its own")


def read_image(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file, upright, or of an array of NumPy (.npy), (H, W) or (H, W, C).

    Args:
        content: of the file, if it was read already; `path` is for errors then.
    """
    if content is None and Path(path).suffix.lower() == ARRAY_SUFFIX:
        return to_rgb(load_array(path), path)
    return read_as(path, to_rgb, content=content)


def read_map(path: Path) -> np.ndarray:
    """(H, W) integers of an image file with one channel."""
    return read_as(path, to_map)


def read_panoptic_ids(path: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG."""
    return read_as(path, to_panoptic_ids)


def read_size(path: Path, upright: bool = True) -> tuple[int, int]:
    """(H, W) of an image file, of which only the header is read; as it is seen, or `upright=False` as it is stored.

    Also of an array (.npy), whose bands lie last, or first if only that can be meant; and of a TIFF that only rasterio
    reads, if it is there.
    """
    path = Path(path)
    if path.suffix.lower() == ARRAY_SUFFIX:
        shape = load_array(path, header=True).shape
        bands_first = len(shape) == 3 and shape[2] > MOST_BANDS >= shape[0]
        return shape[1:] if bands_first else shape[:2]
    try:
        return read_as(path, _upright_size if upright else lambda image, where: image.size[::-1], whole=False)
    except FileNotFoundError:
        raise
    except OSError:
        if not is_tiff(path) or importlib.util.find_spec("rasterio") is None:
            raise
    rasterio = load_rasterio(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Dataset has no geotransform")
            with rasterio.open(path) as file:
                return file.height, file.width
    except rasterio.errors.RasterioError as error:
        raise OSError(f"{path}: not a readable image ({error}); replace the file or leave it out") from error


def is_tiff(path: str | Path) -> bool:
    return Path(path).suffix.lower() in TIFF_SUFFIXES


def load_array(path: str | Path, header: bool = False) -> np.ndarray:
    """An array of NumPy's format, which may hold no Python objects; or only its header, without reading the numbers.

    Raises:
        OSError: for files that are missing or damaged, and for one without pixels.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{path}: neither a file nor a link to one")
    try:
        array = np.load(path, mmap_mode="r" if header else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise OSError(f"{path}: not a readable array ({error}); replace the file or leave it out") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or 0 in array.shape:
        found = f"shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise OSError(f"{path}: has {found}: an image is (H, W), (H, W, bands) or (bands, H, W)")
    return array


def load_rasterio(path: str | Path):
    """The module `rasterio`; an ImportError with the command that installs it."""
    try:
        import rasterio
    except ImportError as error:
        raise ImportError(f"{path}: is read by rasterio: pip install rasterio; or save its bands as .npy") from error
    return rasterio


def _upright_size(image: Image.Image, where) -> tuple[int, int]:
    whole = image.format != "PNG" or _has_late_texts(where)
    exif = image.getexif() if whole else Image.Image.getexif(image)
    return image.size if exif.get(_ORIENTATION) in _TURNED else image.size[::-1]


def _has_late_texts(path: str | Path) -> bool:
    """Whether a PNG has chunks after its pixels that could turn it; because of them Pillow's `getexif` decodes all."""
    pixels = False
    with open(path, "rb") as file:
        file.seek(len(_PNG_SIGNATURE))
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if pixels and name in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels |= name == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)  # a checksum follows
    return False


def open_image(path: str | Path) -> Image.Image:
    """`PIL.Image.open` of a file; of nothing else, because a pipe without a writer is waited for without end."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(
            f"{path}: a folder, where an image is wanted; give its files, sorted(folder.iterdir())"
        )
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: neither a file nor a link to one")
    return Image.open(path)


def load(image: Image.Image, where: str | Path) -> Image.Image:
    """An image whose pixels are decoded, which PIL leaves for later.

    Raises:
        OSError: for whatever damaged files raise.
    """
    with _decoding(where):
        image.load()
    return image


@contextlib.contextmanager
def _decoding(where: str | Path):
    """Pillow has no common class for what damaged files raise: SyntaxError, ..."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Image.DecompressionBombError as error:
        raise OSError(
            f"{where}: has more than {2 * Image.MAX_IMAGE_PIXELS} pixels, which Pillow refuses; make a TIFF of it "
            "(gdal_translate -of COG), whose windows rasterio reads when it is segmented in tiles"
        ) from error
    except Exception as error:
        repair = "replace the file or leave it out"
        if is_tiff(where):
            repair += "; if it has more bands or bits than a photo, train a model of bands on such (--channels)"
        raise OSError(f"{where}: not a readable image ({error}); {repair}") from error


def read_as(path: str | Path, convert: Callable, whole: bool = True, content: bytes | None = None):
    """What `convert(image, path)` makes of the picture in a file; of its header alone if not `whole`.

    Args:
        content: of the file, if it was read already; `path` is for errors then.

    Raises:
        OSError: for files that are missing or damaged.
    """
    with contextlib.ExitStack() as stack:
        with _decoding(path):
            opened = open_image(path) if content is None else Image.open(io.BytesIO(content))
            image = stack.enter_context(opened)
            if whole:
                image.load()
        return convert(image, path)


def _say_what_is_left_out(image: Image.Image, where):
    bands = getattr(image, "tag_v2", {}).get(_SAMPLES_PER_PIXEL, 0)
    if bands > len(image.getbands()):
        say_once("bands", f"{where} has {bands} bands, of which the first {len(image.getbands())} are used")
    if getattr(image, "is_animated", False):
        say_once("pages", f"{where} has {image.n_frames} pages, of which the first is used")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[-1][0] < 255:
        say_once("alpha", f"{where} has transparent pixels; their colours are used as if they were opaque")


def say_once(kind: str, message: str):
    """Warn of the first of its kind in this process: a folder of such files is one finding."""
    if kind not in _SAID:
        _SAID.add(kind)
        logger.warning("%s (said once for all images like this)", message)
