"""Compressed COCO run lengths through whichever COCO package is installed: faster-coco-eval, else pycocotools."""

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np


def coco_tools() -> SimpleNamespace:
    """The installed package's `mask` module, `COCO` and `COCOeval`, and whether it compares boundaries.

    Both packages give identical figures.

    Raises:
        ImportError: if neither package is installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster, mask
    except ImportError:
        pass
    else:
        return SimpleNamespace(mask=mask, COCO=COCO, COCOeval=COCOeval_faster, has_boundary=True)
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(
            "average precision needs a COCO package: pip install faster-coco-eval (fast) or pip install pycocotools"
        ) from error
    return SimpleNamespace(mask=mask, COCO=COCO, COCOeval=COCOeval, has_boundary=False)


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


def to_rle(segmentation, size: tuple[int, int] | None = None) -> dict:
    """One object's mask in any form COCO knows → a compressed RLE `{"size": [H, W], "counts": bytes}`.

    Args:
        segmentation: an RLE with counts as bytes, text or a list of numbers; an (H, W) bool mask; or polygons, each
            x0, y0, x1, y1, ... in pixels.
        size: (H, W) of the image, needed for polygons only.
    """
    if isinstance(segmentation, Mapping):
        if isinstance(segmentation["counts"], (bytes, str)):
            return _plain(segmentation)
        height, width = segmentation["size"]
        return _plain(coco_tools().mask.frPyObjects(dict(segmentation), height, width))
    if isinstance(segmentation, list) and size is not None:
        mask = coco_tools().mask
        return _plain(mask.merge(mask.frPyObjects(segmentation, *size)))
    if not hasattr(segmentation, "ndim"):
        raise ValueError(
            f"segmentation is a {type(segmentation).__name__}: it must be an RLE or an (H, W) bool mask; polygons "
            "need the image's size, which only `from_coco` knows"
        )
    return encode_masks(to_numpy(segmentation)[None])[0]


def to_numpy(value) -> np.ndarray:
    """Arrays, lists and tensors of any device as a NumPy array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _plain(rle: Mapping) -> dict:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.encode() if isinstance(counts, str) else counts,
    }
