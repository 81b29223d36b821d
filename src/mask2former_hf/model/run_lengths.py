"""Masks → COCO run-length codes, in NumPy alone."""

import numpy as np


def mask_to_rle(mask) -> dict:
    """Uncompressed COCO run lengths of one (H, W) mask: runs of 0 and 1 in turn, down the columns, 0 first.

    Returns:
        {"size": [H, W], "counts": list of int}, JSON-ready, as COCO writes crowd annotations.
    """
    mask = _to_numpy(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {mask.shape}, but a run-length code is of one (H, W) mask.")
    flat = (mask != 0).ravel(order="F")
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [len(flat)]])
    if len(flat) and flat[0]:
        bounds = np.concatenate([[0], bounds])
    return {"size": list(mask.shape), "counts": np.diff(bounds).tolist()}


def masks_to_coco_rle(masks) -> list[dict]:
    """Compressed COCO run lengths of (N, H, W) masks, for pycocotools and JSON.

    Returns:
        N dicts {"size": [H, W], "counts": str}.
    """
    rles = [mask_to_rle(mask) for mask in masks]
    return [{"size": rle["size"], "counts": counts_to_text(rle["counts"])} for rle in rles]


def counts_to_text(counts) -> str:
    """Compressed form of uncompressed run lengths.

    The text is COCO's own (`maskApi.c`): each count minus the one two places before it, from the fourth on, in
    groups of five bits, lowest first; bit 32 says that another group follows, and 48 makes it printable.
    """
    value = np.array(counts, dtype=np.int64)
    value[3:] -= value[1:-2].copy()
    text = np.zeros((len(value), 9), dtype=np.uint8)  # 9 groups hold 45 bits, more than any image has pixels
    going = np.ones(len(value), dtype=bool)
    for group in range(text.shape[1]):
        bits, value = value & 31, value >> 5
        more = value != np.where(bits & 16, -1, 0)
        text[going, group] = (bits + 32 * more + 48)[going]
        going &= more
    return text[text > 0].tobytes().decode("ascii")


def _to_numpy(mask) -> np.ndarray:
    return np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
