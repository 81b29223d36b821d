"""Images of bands, whose numbers stay as they are, for the image processor: any form → (h, w, c) array."""

import numpy as np
from PIL import Image, ImageOps
from transformers.utils import logging

LARGEST_EXACT = 2**24  # integers up to here are exact in float32
logger = logging.get_logger(__name__)


def bands_of(image, channels: int, name: str, layout: str | None) -> np.ndarray:
    """(h, w, channels) in uint8, uint16 or float32.

    Args:
        image: PIL, or array of 2 or 3 dimensions.
        layout: "channels_first" or "channels_last" of an array; None to see which side has so many channels, the
            first one in doubt, as transformers.

    Raises:
        ValueError: for another number of channels, numbers that are not finite, and numbers beyond float32.
    """
    if isinstance(image, Image.Image):
        image, layout = _of_picture(image, name), "channels_last"
    shape, array = image.shape, image[..., None] if image.ndim == 2 else image
    if array.ndim != 3 or 0 in shape:
        raise ValueError(f"{name} has shape {shape}; an image is (h, w), (h, w, c) or (c, h, w) and not empty.")
    if image.ndim == 3 and (layout == "channels_first" or (layout is None and shape[0] == channels)):
        array = array.transpose(1, 2, 0)
    if array.shape[2] != channels:
        raise ValueError(
            f"{name} of shape {shape} has {array.shape[2]} channels with input_data_format={layout!r}, and the "
            f"processor takes num_channels={channels}: give an image of {channels} bands, and the format as "
            '"channels_first" or "channels_last" if it cannot be seen.'
        )
    return plain_numbers(array, name)


def plain_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Any numbers in uint8, uint16 or float32, none of them changed; True is 255, as in a picture of one bit."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} is {array.dtype}; pixels are integers or floats.")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if wrong := int((~np.isfinite(array)).any(-1).sum()):
            raise ValueError(
                f"{name} has {wrong} pixels that are nan or infinite; replace them, for example by 0: "
                "numpy.nan_to_num(image, posinf=0, neginf=0)."
            )
        return array
    if array.min() < -LARGEST_EXACT or array.max() > LARGEST_EXACT:
        raise ValueError(
            f"{name} is {array.dtype} with values from {array.min()} to {array.max()}, beyond what float32 holds "
            f"exactly ({LARGEST_EXACT}); scale it first."
        )
    return array.astype(np.float32)


def _of_picture(image: Image.Image, name: str) -> np.ndarray:
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"{name} has {image.n_frames} pages; stack them: numpy.stack of its bands, channels last.")
    stored = getattr(image, "tag_v2", {}).get(277, len(image.getbands()))  # SamplesPerPixel of TIFF
    if stored > len(image.getbands()):
        raise ValueError(
            f"{name} has {stored} bands, of which Pillow shows {len(image.getbands())}; read it with rasterio or "
            "tifffile and give the array."
        )
    signed, image = image.format == "TIFF", ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB" if image.mode == "P" else "RGBA")  # positions in a palette are no brightness
    array = np.asarray(image)
    if image.mode == "I" and not signed and 0 <= array.min() and array.max() <= 65535:  # some 16-bit files are "I"
        array = array.astype(np.uint16)
    return array


def say_scale(images, factor: float):
    """Warn once of 16-bit numbers that are divided as if they had 8."""
    if abs(factor * 255 - 1) < 1e-3 and any(image.dtype == np.uint16 and image.max() > 255 for image in images):
        logger.warning_once(
            "images have 16 bits and rescale_factor=1/255 makes numbers up to 257 of them; pass "
            "rescale_factor=1/65535, or what your sensor's numbers mean"
        )
