"""Masks with holes and parts, and how other tools draw polygons, for the tests of formats."""

import numpy as np
from PIL import Image, ImageDraw


def iou(one, other):
    return (one & other).sum() / (one | other).sum()


def ring_and_island():
    """(60, 80): a ring with a hole, and a part of its own in the hole."""
    mask = np.zeros((60, 80), bool)
    mask[5:50, 10:60] = True
    mask[12:40, 20:50] = False
    mask[20:30, 30:41] = True
    return mask


def truncated_and_filled_with_its_outline(points, size):
    """The rule of labelme's `shape_to_mask`; OpenCV's fillPoly, which Ultralytics uses, gives the same."""
    mask = Image.new("1", size[::-1])
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points], outline=1, fill=1)
    return np.array(mask)
