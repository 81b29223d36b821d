"""YOLO segmentation as Ultralytics reads it: a line "class x y x y ..." per object, in parts of width and height.

https://docs.ultralytics.com/datasets/segment/
"""

from collections.abc import Iterable, Sequence

from ..polygons import INSET, one_ring
from .labelled_mask import LabelledMask


def label_lines(masks: Iterable[LabelledMask], size: tuple[int, int], tolerance: float = 0.0) -> str:
    """The text of a label file.

    The format has one ring per object: parts and holes are joined to it by cuts (`data.polygons.one_ring`).

    Args:
        size: (H, W) of the image.
        tolerance: as in `data.polygons.polygons_of`.
    """
    lines = []
    for mask in masks:
        polygons = mask.polygons(tolerance, INSET)
        if polygons:
            ring = (one_ring(polygons) / size[::-1]).clip(0, 1)
            numbers = " ".join(_short(value) for value in ring.ravel())
            lines.append(f"{mask.label_id} {numbers}\n")
    return "".join(lines)


def data_yaml(names: Sequence[str], splits: dict[str, str]) -> str:
    """The text of data.yaml: `splits` name their folders of images, relative to the file."""
    import yaml

    return yaml.safe_dump({**splits, "names": dict(enumerate(names))}, sort_keys=False, allow_unicode=True)


def _short(value: float) -> str:
    """Seven decimals: a hundredth of a pixel in an image of 100,000."""
    return f"{value:.7f}".rstrip("0").rstrip(".")
