"""What the image processor is made of: images and id maps in any form → arrays, sizes, canvases and targets.

Pure functions. Letters: `N` targets of an image; (H, W) the padded canvas, (h, w) an image on it.
"""

import os
import reprlib
from collections.abc import Callable, Mapping
from numbers import Integral, Real

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import load_image
from transformers.utils import logging

from .channels import MOST_CHANNELS, check_channels
from .image_bands import bands_of

MAX_ID = 2**53  # what every format of a map, floats included, holds exactly
LARGEST_SIDE = 2**16  # pixels: more is a mistake that fills the memory
SIDES = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")
logger = logging.get_logger(__name__)


def _is_whole(value, least: int, most: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value <= most


def _is_size(value) -> bool:
    """A side, a pair of them, or a dict of sides by name."""
    if isinstance(value, list | tuple):
        return 1 <= len(value) <= 2 and all(_is_whole(side, 1, LARGEST_SIDE) for side in value)
    try:
        sides = {name: side for name, side in dict(value).items() if side is not None}  # a dict or a SizeDict
    except (TypeError, ValueError):
        return _is_whole(value, 1, LARGEST_SIDE)
    return bool(sides) and all(name in SIDES and _is_whole(side, 1, LARGEST_SIDE) for name, side in sides.items())


def _is_finite(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= 1e9


def _is_statistic(value, zero: bool) -> bool:
    numbers = value if isinstance(value, list | tuple) else [value]
    if not 1 <= len(numbers) <= MOST_CHANNELS:
        return False
    return all(_is_finite(number) and (zero or number != 0) for number in numbers)


_SIZE = (
    _is_size,
    f"at least 1 pixel and at most {LARGEST_SIDE}: one or two sides, or a dict of some of {', '.join(SIDES)}",
)
_SWITCH = (lambda value: isinstance(value, bool), "True or False")
_SHARE = (lambda value: _is_finite(value) and 0 <= value <= 1, "between 0 and 1")
_RULES: dict[str, tuple[Callable, str]] = {  # what a setting of the processor must be, unless it is None
    "do_resize": _SWITCH,
    "size": _SIZE,
    "size_divisor": (lambda value: _is_whole(value, 0, LARGEST_SIDE), "a whole number of pixels; 0 for none"),
    "resample": (lambda value: _is_whole(value, 0, 5), "one of PIL's filters, 0 to 5; 2 is bilinear"),
    "do_rescale": _SWITCH,
    "rescale_factor": (lambda value: _is_statistic(value, False) and _is_finite(value), "finite and not 0"),
    "do_normalize": _SWITCH,
    "num_channels": (
        lambda value: _is_whole(value, 1, MOST_CHANNELS),
        f"a whole number from 1 to {MOST_CHANNELS}, or None for photos",
    ),
    "image_mean": (lambda value: _is_statistic(value, True), "finite, one number or one per channel"),
    "image_std": (lambda value: _is_statistic(value, False), "finite and not 0, one number or one per channel"),
    "pad_size": _SIZE,
    "ignore_index": (lambda value: _is_whole(value, -(2**31), 2**31 - 1), "a whole number, usually 255"),
    "do_reduce_labels": _SWITCH,
    "num_labels": (lambda value: _is_whole(value, 1, 2**16), "a whole number from 1 to 65536"),
    "label_ids_to_fuse": (
        lambda value: (
            isinstance(value, list | tuple | set | frozenset) and all(_is_whole(label, 0, 2**16) for label in value)
        ),
        "a list of labels, whole numbers from 0",
    ),
    "object_mask_threshold": _SHARE,
    "overlap_threshold": _SHARE,
}


def check_settings(settings: Mapping):
    """Refuse settings of the image processor that make no sense, each for itself.

    Raises:
        ValueError: naming the setting, its value and the rule.
    """
    for name, value in settings.items():
        if value is not None and name in _RULES and not _RULES[name][0](value):
            shown = reprlib.repr(value if not hasattr(value, "keys") else dict(value))
            raise ValueError(f"{name}={shown} must be {_RULES[name][1]}.")
    check_channels(*map(settings.get, ("num_channels", "image_mean", "image_std")))


def to_list(values, ndim, name):
    if isinstance(values, list | tuple):
        values = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
    elif isinstance(values, np.ndarray | torch.Tensor) and values.ndim == ndim + 1:
        values = list(values)
    else:
        values = [values]
    if len(values) == 0:
        raise ValueError(f"{name} is empty; pass at least one.")
    return values


def _load(value, name):
    """Anything that holds pixels → PIL image, as it is stored, or array."""
    if isinstance(value, str | os.PathLike):
        try:
            value = Image.open(value) if os.path.isfile(value) else load_image(str(value))
        except ValueError as error:
            shown = reprlib.repr(str(value))
            raise ValueError(
                f"{name}={shown} is no file that is there, no URL and no base64 text; give one."
            ) from error
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a PIL image, an array, a tensor, a path or a URL.")
    return value


def to_pixels(image, name, input_data_format, channels=None):
    """Any image → (h, w, c): `to_rgb` of a photo, or its `channels` bands as they are."""
    image, layout = _load(image, name), getattr(input_data_format, "value", input_data_format)
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f'input_data_format={layout!r} must be "channels_first", "channels_last", or None to guess.')
    return to_rgb(image, name, layout) if channels is None else bands_of(image, channels, name, layout)


def to_rgb(image, name, layout):
    """PIL image or array → (h, w, 3), uint8 where the source has integers, float32 where it has floats."""
    if isinstance(image, Image.Image):
        _say_what_is_left_out(image)
        image = ImageOps.exif_transpose(image)
        deep = image.mode[0] in "IF"  # more than 8 bits; every other mode is one that PIL converts without loss
        array = np.asarray(image if deep else image.convert("RGB"))
        if image.mode == "I" and 0 <= array.min() and array.max() <= 65535:  # some 16-bit files are "I"
            array = array.astype(np.uint16)
        layout = "channels_last"
    else:
        array = image
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; an image is (h, w), (h, w, c) or (c, h, w) and not empty.")
    if array.ndim == 2:
        array = array[..., None]
    else:
        first = array.shape[0] in (1, 3, 4) or (
            array.shape[0] == 2 and array.shape[2] > 4
        )  # in doubt, as transformers
        if layout == "channels_first" or (layout is None and first):
            array = array.transpose(1, 2, 0)
    if array.shape[2] > 4:
        raise ValueError(
            f"{name} of shape {np.shape(image)} has {array.shape[2]} channels with input_data_format={layout!r}; a "
            'photo has 1 to 4, and the format is "channels_first", "channels_last" or None to guess. For bands give '
            "the processor num_channels."
        )
    if array.shape[2] in (2, 4):
        _say_channels(array.shape[2])
    array = array[..., :3] if array.shape[2] > 2 else array[..., :1].repeat(3, 2)  # (h, w, 3)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite; replace them, for example by 0.")
        return array
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise ValueError(
            f"{name} is {array.dtype} with values from {array.min()} to {array.max()}; integers are 0 to 255, or "
            "uint16 for 0 to 65535."
        )
    return array.astype(np.uint8)


def _say_what_is_left_out(image: Image.Image):
    """Once for all images, as data/images.py does for files."""
    bands = getattr(image, "tag_v2", {}).get(277, 0)  # SamplesPerPixel of TIFF
    if bands > len(image.getbands()):
        logger.warning_once(f"images have {bands} bands, of which the first {len(image.getbands())} are used")
    if getattr(image, "n_frames", 1) > 1:
        logger.warning_once(f"images have {image.n_frames} pages, of which the first is used")
    if image.has_transparency_data and image.convert("RGBA").getextrema()[-1][0] < 255:
        logger.warning_once("images have transparent pixels; their colours are used as if they were opaque")


def _say_channels(channels: int):
    used = {2: "the first is used as grey", 4: "the first three are used as red, green, blue"}[channels]
    logger.warning_once(f"images are arrays of {channels} channels, of which {used}; the last is taken for alpha")


def to_ids(id_map, name, image_size):
    """Any map of ids → (h, w) int64 of its image's size."""
    id_map = _load(id_map, name)
    array = np.asarray(ImageOps.exif_transpose(id_map) if isinstance(id_map, Image.Image) else id_map)
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.shape != image_size:
        raise ValueError(f"{name} has shape {array.shape}, but its image is {image_size}; pass one id per pixel.")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is an array of {array.dtype}; ids are integers.")
    if array.dtype.kind == "f" and (array != np.rint(array)).any():  # also where it is nan
        raise ValueError(f"{name} holds fractions ({array.dtype}); ids are integers.")
    if array.size and not -(2**31) <= array.min() <= array.max() <= MAX_ID:
        raise ValueError(
            f"{name} has ids from {array.min()} to {array.max()}; they must not exceed {MAX_ID}: number the segments "
            "of an image anew."
        )
    return array.astype(np.int64)


def id_map_to_targets(id_map, canvas_size, instance_id_to_semantic_id=None, ignore_index=None, do_reduce_labels=False):
    """Split a map of ids into one binary mask per id, in order of id.

    Args:
        id_map: (h, w) integer array.
        canvas_size: (H, W) that masks are zero-padded to, right and below.
        instance_id_to_semantic_id, ignore_index, do_reduce_labels: as in `Mask2FormerImageProcessor`.

    Returns:
        masks (N, H, W) uint8, labels (N,) int64, and (H, W) bool, True where the map says ignore_index, or 0 with
        do_reduce_labels. With both, ignore_index is an id like others if instance_id_to_semantic_id names it.
    """
    if do_reduce_labels and ignore_index is None:
        raise ValueError("do_reduce_labels=True turns id 0 into ignore_index, which is None; set it, usually 255.")
    if instance_id_to_semantic_id is not None:
        _check_classes(instance_id_to_semantic_id)
    ids = np.asarray(id_map).astype(np.int64)
    height, width = ids.shape
    # What counts is what the map says: once every id is one less, another one would equal ignore_index.
    reserved = {ignore_index} - {None}
    if do_reduce_labels:
        reserved = {0} | (reserved - set(instance_id_to_semantic_id or ()))
    keys = np.setdiff1d(np.unique(ids), list(reserved))
    if (keys < 0).any():
        raise ValueError(
            f"the segmentation map has the ids {reprlib.repr(keys[keys < 0].tolist())} below 0; ids are 0 or more, "
            f"apart from ignore_index (now {ignore_index})."
        )
    ignored = torch.zeros(*canvas_size, dtype=torch.bool)
    ignored[:height, :width] = torch.from_numpy(np.isin(ids, list(reserved)))
    masks = torch.zeros(len(keys), *canvas_size, dtype=torch.uint8)
    torch.eq(torch.from_numpy(ids), torch.from_numpy(keys)[:, None, None], out=masks[:, :height, :width])
    shift = int(bool(do_reduce_labels))
    labels = keys - shift
    if instance_id_to_semantic_id is not None:
        keys = keys.tolist()
        missing = [key for key in keys if key not in instance_id_to_semantic_id]
        if missing:
            raise ValueError(
                f"instance_id_to_semantic_id has no class for the ids {missing} of the segmentation map; add them, or "
                f"give their pixels the ignore_index (now {ignore_index})."
            )
        labels = np.array([instance_id_to_semantic_id[key] - shift for key in keys], dtype=np.int64)
        if shift and (labels < 0).any():
            bad = [key for key, label in zip(keys, labels, strict=True) if label < 0]
            raise ValueError(
                f"instance_id_to_semantic_id gives the ids {bad} a class below 1, which do_reduce_labels=True leaves "
                "without a number; number the classes from 1."
            )
    return masks, torch.from_numpy(labels), ignored


def _check_classes(classes: Mapping):
    if not isinstance(classes, Mapping):
        raise TypeError(
            f"instance_id_to_semantic_id has {reprlib.repr(classes)}; it must be a dict from ids in the map to "
            "classes, or a list of such dicts, one per image."
        )
    wrong = {key: label for key, label in classes.items() if not _is_whole(label, 0, 2**31)}
    if wrong:
        raise ValueError(
            f"instance_id_to_semantic_id gives the classes {reprlib.repr(wrong)}; they must be whole numbers, 0 or "
            "more; give pixels without a class the ignore_index."
        )


def resize_nearest(id_map, size):
    """PIL's nearest neighbour, for ids that PIL has no mode for."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(size, id_map.shape, strict=True))
    return id_map[rows.astype(np.int64)[:, None], columns.astype(np.int64)]


def on_canvas(images, canvas, factor, mean, std):
    """(h, w, c) images to (B, c, H, W) float32 pixels, (x * factor - mean) / std, and their (B, H, W) int64 mask."""
    c = images[0].shape[2]
    scale = torch.tensor(np.broadcast_to(factor / np.asarray(std), c).reshape(c, 1, 1), dtype=torch.float32)
    shift = torch.tensor(np.broadcast_to(-np.divide(mean, std), c).reshape(c, 1, 1), dtype=torch.float32)
    pixel_values = torch.empty(len(images), c, *canvas)  # zeros would be a third of the time where nothing is padded
    pixel_mask = torch.empty(len(images), *canvas, dtype=torch.int64)
    for b, image in enumerate(images):
        height, width = image.shape[:2]
        own = pixel_values[b, :, :height, :width]
        # One pass that converts and puts channels first, one in place: 5 times as fast as the arithmetic on (h, w, c).
        own.copy_(torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1))
        torch.addcmul(shift, own, scale, out=own)
        pixel_mask[b, :height, :width] = 1
        for padded in (pixel_values[b], pixel_mask[b]):
            padded[..., height:, :] = 0
            padded[..., :height, width:] = 0
    return pixel_values, pixel_mask


def to_id_maps(segmentation_maps, instance_id_to_semantic_id, sizes, resized):
    """Yield per image its map of ids, brought from its size to the one it was resized to, and {id: class} or None."""
    maps, classes = to_list(segmentation_maps, 2, "segmentation_maps"), instance_id_to_semantic_id
    classes = classes if isinstance(classes, list | tuple) else [classes] * len(sizes)
    for name, values in (("segmentation_maps", maps), ("instance_id_to_semantic_id", classes)):
        if len(values) != len(sizes):
            raise ValueError(f"{name} has {len(values)} entries for {len(sizes)} images; pass one per image.")
    for b, id_map in enumerate(maps):
        yield resize_nearest(to_ids(id_map, f"segmentation_maps[{b}]", sizes[b]), resized[b]), classes[b]
