"""COCO's run lengths: of masks by faster-coco-eval or pycocotools, whichever is installed, and of runs by NumPy."""

import reprlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np

from .runs import Runs

MAX_AREA = 2**40  # pixels: more than any image; int64 holds the sum of two of them, and a shift never leaves it
MAX_GROUPS = 9  # of 5 bits in a number of compressed run lengths: 2**40 with its sign


def coco_tools() -> SimpleNamespace:
    """The installed package's `mask` module, and whether it makes outlines of masks (`rleToBoundary`).

    Both packages give identical figures.

    Raises:
        ImportError: if neither package is installed.
    """
    try:
        from faster_coco_eval import mask
    except ImportError:
        pass
    else:
        return SimpleNamespace(mask=mask, has_boundary=True)
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "average precision needs a COCO package: pip install faster-coco-eval (fast) or pip install pycocotools"
        ) from error
    return SimpleNamespace(mask=mask, has_boundary=False)


def encode_masks(masks: np.ndarray) -> list[dict]:
    """(N, H, W) bool masks (or integers, where all but 0 is inside) → N RLEs `{"size": [H, W], "counts": bytes}`."""
    if masks.ndim != 3 or masks.dtype.kind not in "biu":
        raise ValueError(
            f"masks is {masks.dtype} of shape {masks.shape}: it must be (N, H, W) of bool or integers; threshold "
            "probabilities first"
        )
    if len(masks) == 0:
        return []
    columns = np.asfortranarray((masks != 0).transpose(1, 2, 0), dtype=np.uint8)  # (H, W, N)
    return [_plain(rle) for rle in coco_tools().mask.encode(columns)]


def coco_code(runs: Runs, size: tuple[int, int]) -> dict:
    """COCO's compressed run lengths of a mask in an image of (height, width), with text: as they stand in json."""
    H, W = size
    return {"size": [H, W], "counts": _encode(runs.counts((0, 0, W, H))).decode("ascii")}


def to_rle(segmentation, size: tuple[int, int] | None = None) -> dict:
    """One object's mask in any form COCO knows → a compressed RLE `{"size": [H, W], "counts": bytes}`.

    Args:
        segmentation: an RLE with counts as bytes, text or a list of numbers; an (H, W) bool mask; or polygons, each
            x0, y0, x1, y1, ... in pixels.
        size: (H, W) of the image, needed for polygons only.

    Raises:
        ValueError: for anything else, run lengths that do not fill the mask, and coordinates far from the image.
    """
    if isinstance(segmentation, Mapping):
        read_counts(segmentation, "segmentation")
        if isinstance(segmentation["counts"], (bytes, str)):
            return _plain(segmentation)
        height, width = segmentation["size"]
        return _plain(coco_tools().mask.frPyObjects(dict(segmentation), height, width))
    if isinstance(segmentation, list) and size is not None:
        mask = coco_tools().mask
        return _plain(mask.merge(mask.frPyObjects(read_polygons(segmentation, size, "segmentation"), *size)))
    if not hasattr(segmentation, "ndim"):
        raise ValueError(
            f"segmentation is a {type(segmentation).__name__}: it must be an RLE or an (H, W) bool mask; polygons "
            "need the image's size, which only `from_coco` knows"
        )
    return encode_masks(to_numpy(segmentation)[None])[0]


def read_counts(rle: Mapping, where) -> np.ndarray:
    """Run lengths of an RLE, whose counts are bytes, text or numbers.

    Not by pycocotools: 2.0.11 decodes texts that are too short to whatever lies in memory.
    A number is written in groups of 5 bits, lowest first, as characters from "0" (48) on; bit 5 says that more follow,
    the highest bit of the last group is the sign. From the fourth on, numbers are differences to the last but one.

    Raises:
        ValueError: unless the runs fill the mask.
    """
    counts, size = rle.get("counts"), rle.get("size")
    sides = list(size) if isinstance(size, Sequence | np.ndarray) and len(size) == 2 else []
    whole = all(isinstance(side, int | np.integer) and not isinstance(side, bool) and side >= 0 for side in sides)
    if counts is None or not sides or not whole or isinstance(size, str):
        raise ValueError(
            f'{where}: an RLE of size {reprlib.repr(size)}; it must be {{"size": [height, width], "counts": ...}}'
        )
    area = int(sides[0]) * int(sides[1])
    if area > MAX_AREA:
        raise ValueError(f"{where}: an RLE of size {sides} has {area} pixels; images have at most {MAX_AREA}")
    if isinstance(counts, str | bytes):
        runs = _decode(counts.encode() if isinstance(counts, str) else counts, area, where)
    else:
        try:
            runs = np.asarray(counts)
        except ValueError:  # lists of different lengths
            runs = np.zeros((0, 0))
        if runs.ndim != 1 or (runs.size and runs.dtype.kind not in "iu"):
            raise ValueError(f"{where}: the counts of an RLE are {runs.dtype}; they must be a list of whole numbers")
        _check_bounds(runs, area, where)
        runs = runs.astype(np.int64)
    ends = np.cumsum(runs)  # of numbers up to `area` each: the first end above it is not yet beyond int64
    if (ends > area).any() or (ends[-1] if len(ends) else 0) != area:
        total = sum(runs.tolist())
        raise ValueError(f"{where}: the counts of an RLE sum to {total}, not to H * W = {area}; the mask is damaged")
    return runs


def _check_bounds(numbers: np.ndarray, area: int, where, least: int = 0):
    """Before anything is added: sums of numbers beyond the mask wrap around and may look right."""
    outside = (numbers < least) | (numbers > area)
    if outside.any():
        raise ValueError(
            f"{where}: the counts of an RLE lead by {numbers[outside][0]} out of the mask, not to H * W = {area}, its "
            "end; the mask is damaged"
        )


def _decode(text: bytes, area: int, where) -> np.ndarray:
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(codes & 32 == 0)
    if not len(codes):
        return np.zeros(0, dtype=np.int64)
    # The COCO packages raise only when they draw the mask.
    if not last.size or last[-1] + 1 < len(codes) or ((codes < 0) | (codes > 63)).any():
        raise ValueError(
            f"{where}: the text of an RLE, {text[-9:]!r} at its end, stops inside a number or has other characters; "
            "the mask is damaged"
        )
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > MAX_GROUPS:
        raise ValueError(
            f"{where}: the text of an RLE has a number of {5 * lengths.max()} bits; counts are 0 to H * W = {area}, "
            "the mask is damaged"
        )
    place = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    numbers = np.add.reduceat((codes & 31) << place, first)
    numbers -= np.where(codes[last] & 16, np.int64(1) << (place[last] + 5), 0)
    _check_bounds(numbers, area, where, least=-area)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    _check_bounds(numbers, area, where)
    return numbers


def _encode(counts: np.ndarray) -> bytes:
    """The inverse of `_decode`; a second one is `model/run_lengths.py`'s, which travels without this folder."""
    numbers = counts.astype(np.int64)
    numbers[3:] -= counts[1:-2]
    text, going = np.zeros((len(numbers), MAX_GROUPS), dtype=np.uint8), np.ones(len(numbers), dtype=bool)
    for group in range(MAX_GROUPS):
        bits, numbers = numbers & 31, numbers >> 5
        more = numbers != np.where(bits & 16, -1, 0)
        text[going, group] = (bits + 32 * more + 48)[going]
        going &= more
    return text[text > 0].tobytes()


def read_polygons(segmentation, size: tuple[int, int], where) -> list[list[float]]:
    """Polygons `[x, y, x, y, ...]` in pixels of an image of (H, W).

    Raises:
        ValueError: unless it is a list of lists of an even count of finite numbers near the image: the COCO packages
            crash or take all memory for others.
    """
    if not isinstance(segmentation, Sequence) or not all(isinstance(polygon, Sequence) for polygon in segmentation):
        raise ValueError(
            f"{where}: the segmentation is neither an RLE nor a list of polygons, each a list x, y, x, y, ...; also a "
            "single polygon stands in a list"
        )
    reach = 10 * max(size)  # some data sets cut no polygon at the image's border
    polygons = []
    for polygon in segmentation:
        if len(polygon) % 2:
            raise ValueError(f"{where}: a polygon of {len(polygon)} numbers; it must be x, y, x, y, ...")
        for value in polygon:
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not abs(value) <= reach:
                raise ValueError(
                    f"{where}: a polygon has the coordinate {reprlib.repr(value)}; it must be a number of pixels in "
                    f"an image of height and width {list(size)}"
                )
        polygons.append([float(value) for value in polygon])
    return polygons


def to_numpy(value) -> np.ndarray:
    """Arrays, lists and tensors of any device as a NumPy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _plain(rle: Mapping) -> dict:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.encode() if isinstance(counts, str) else counts,
    }
