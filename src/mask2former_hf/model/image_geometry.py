"""Sizes and resizing of images, in NumPy and Pillow alone: for the image processor and for runtimes without torch."""

import numpy as np
from PIL import Image


def output_size(height, width, size):
    """(rows, columns) that a size dict makes of (height, width), rounded as in detectron2's ResizeShortestEdge."""
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge:
        short, long = size.shortest_edge, size.shortest_edge / min(height, width) * max(height, width)
        if size.longest_edge and long > size.longest_edge:
            short, long = short * (size.longest_edge / long), size.longest_edge
        sides = (short, long) if height <= width else (long, short)
    elif size.longest_edge or (size.max_height and size.max_width):
        box = (size.longest_edge or size.max_height, size.longest_edge or size.max_width)
        factor = min(box[0] / height, box[1] / width)
        sides = (height * factor, width * factor)
    else:
        raise ValueError(
            f"size={dict(size)} must have shortest_edge (and longest_edge), height and width, or max_height and "
            "max_width."
        )
    return tuple(max(1, int(side + 0.5)) for side in sides)


def resize(image, size, resample):
    """(h, w, c) of 8 bits, 16 bits or float32 to (rows, columns); 8 bits stay, the others become float32."""
    if image.shape[:2] == size:
        return image
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(size[::-1], resample))
    bands = np.moveaxis(image.astype(np.float32) if image.dtype == np.uint16 else image, -1, 0)
    resized = [Image.fromarray(np.ascontiguousarray(band)).resize(size[::-1], resample) for band in bands]
    return np.stack([np.asarray(band) for band in resized], axis=-1)


def canvas_size(sizes, size_divisor, pad_size):
    divisor = 1 if size_divisor in (None, 0) else size_divisor
    largest = tuple(max(side) for side in zip(*sizes, strict=True))
    fitting = tuple(-(-side // divisor) * divisor for side in largest)
    if pad_size is None:
        return fitting
    canvas = (pad_size.height, pad_size.width)
    if None in canvas or any(c < n or c % divisor for c, n in zip(canvas, largest, strict=True)):
        raise ValueError(
            f"pad_size={dict(pad_size)} must give height and width, hold the largest image {largest} and be a "
            f"multiple of size_divisor={divisor}; the smallest such size is {fitting}."
        )
    return canvas
