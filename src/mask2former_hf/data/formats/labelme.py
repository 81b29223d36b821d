"""labelme's json: https://github.com/wkentaro/labelme. One file per image, a shape per part of an object."""

from collections.abc import Iterable

from ..polygons import INSET, one_ring
from .labelled_mask import LabelledMask

VERSION = "5.4.1"  # of labelme, whose fields these are


def labelme_json(
    masks: Iterable[LabelledMask], size: tuple[int, int], image_path: str, tolerance: float = 0.0
) -> dict:
    """What labelme saves for an image.

    Shapes are polygons, to be corrected point by point. Those of one object share a `group_id`, holes are joined to
    the outline by cuts (`data.polygons.one_ring`), crowds carry the flag "crowd", and the score stands in
    `description`.

    Args:
        size: (H, W) of the image.
        image_path: from the json's folder to the image, with forward slashes.
        tolerance: as in `data.polygons.polygons_of`.
    """
    shapes = []
    for number, mask in enumerate(masks, start=1):
        polygons = mask.polygons(tolerance, INSET)
        for polygon in polygons:
            shapes.append(
                {
                    "label": mask.label,
                    "points": one_ring([polygon]).tolist(),
                    "group_id": number if len(polygons) > 1 else None,
                    "description": "" if mask.score is None else f"score {mask.score:.3f}",
                    "shape_type": "polygon",
                    "flags": {"crowd": True} if mask.iscrowd else {},
                    "mask": None,
                }
            )
    height, width = size
    return {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }
