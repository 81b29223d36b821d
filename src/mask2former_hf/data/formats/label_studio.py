"""Label Studio's tasks with brush labels, which keep holes and parts: https://labelstud.io/guide/predictions."""

from collections.abc import Iterable, Iterator, Sequence
from xml.sax.saxutils import quoteattr

import numpy as np

from .labelled_mask import LabelledMask

FROM_NAME, TO_NAME = "label", "image"  # of the labelling interface in `label_config`
# Lengths of runs are written with one of four numbers of bits (@thi.ng/rle-pack, which Label Studio uses).
_LENGTH_BITS = (3, 4, 8, 16)
_WORD_BITS = 8


def task(masks: Iterable[LabelledMask], size: tuple[int, int], image: str, model_version: str | None = None) -> dict:
    """A task to import: with `predictions` that are corrected there.

    Args:
        size: (H, W) of the image.
        image: its address for the browser, such as "/data/local-files/?d=photos/a.jpg".
        model_version: what made the predictions; None for annotations that people made.
    """
    height, width = size
    results, scores = [], []
    for number, mask in enumerate(masks, start=1):
        result = {
            "id": f"segment{number}",
            "from_name": FROM_NAME,
            "to_name": TO_NAME,
            "type": "brushlabels",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": brush_code(mask.row_counts(size)), "brushlabels": [mask.label]},
        }
        if mask.score is not None:
            result["score"] = mask.score
            scores.append(mask.score)
        results.append(result)
    if model_version is None:
        return {"data": {TO_NAME: image}, "annotations": [{"result": results}]}
    prediction = {"model_version": model_version, "result": results}
    if scores:
        prediction["score"] = float(np.mean(scores))
    return {"data": {TO_NAME: image}, "predictions": [prediction]}


def label_config(names: Sequence[str]) -> str:
    """The labelling interface that tasks of these classes need, as XML."""
    labels = "\n".join(f"    <Label value={quoteattr(name)}/>" for name in names)
    return (
        f'<View>\n  <Image name="{TO_NAME}" value="${TO_NAME}" zoom="true"/>\n'
        f'  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">\n{labels}\n  </BrushLabels>\n</View>\n'
    )


def brush_code(counts: np.ndarray) -> list[int]:
    """The bytes of a brush's mask: run lengths of red, green, blue and alpha, all 255 inside and 0 outside.

    Args:
        counts: pixels outside and inside in turn, along the rows, as `LabelledMask.row_counts` gives them.
    """
    head = f"{4 * int(counts.sum()):032b}{_WORD_BITS - 1:05b}" + "".join(f"{bits - 1:04b}" for bits in _LENGTH_BITS)
    lengths = enumerate((4 * counts).tolist())
    bits = head + "".join(code for position, length in lengths for code in _run(length, position % 2 == 1))
    bits += "0" * (-len(bits) % 8)
    return np.packbits(np.frombuffer(bits.encode(), dtype=np.uint8) - ord("0")).tolist()


def _run(length: int, inside: bool) -> Iterator[str]:
    word = f"{255 * inside:0{_WORD_BITS}b}"
    longest = 2 ** _LENGTH_BITS[-1]
    while length:
        part = min(length, longest)
        size = next(k for k, bits in enumerate(_LENGTH_BITS) if part <= 2**bits)
        yield f"1{size:02b}{part - 1:0{_LENGTH_BITS[size]}b}{word}"
        length -= part
