"""Colours of classes in pictures of labels: Pascal VOC's palette."""

import numpy as np

VOC_BORDER = (224, 224, 192)  # index 255: "void" around every object of VOC


def voc_palette(count: int) -> np.ndarray:
    """(count, 3) uint8: the first colours of VOC's palette, black first (the devkit's `VOClabelcolormap.m`).

    The bits of the index go to red, green, blue in turn, the lowest to the highest bits of the colours.
    """
    colours = np.zeros((count, 3), dtype=np.uint8)
    index = np.arange(count)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours
