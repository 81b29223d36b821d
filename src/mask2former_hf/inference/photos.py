"""Images on their way to the network: read and resized by any process, and put together in batches. No torch."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..model.image_geometry import canvas_size, output_size, resize
from .export_files import Sides

WAITING = 4  # batches of photos that wait for others of their canvas


class Photo(NamedTuple):
    """An image that was read.

    Args:
        pixels: (H, W, 3) uint8 RGB, or (H, W, C) bands.
        size: (height, width) of the image, which is that of its result.
        is_resized: whether `pixels` are what the processor's resizing makes of it.
        image: what to draw on, if it is at hand.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    is_resized: bool = False
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Resizing:
    """What a processor does to an image before it becomes numbers, without torch.

    Args:
        size: the processor's.
        resample: number of Pillow's filter.
    """

    size: Sides
    resample: int

    @classmethod
    def of(cls, processor) -> "Resizing | None":
        """Of a processor; None for one that does not resize."""
        if not processor.do_resize:
            return None
        return cls(Sides(dict(processor.size)), int(processor.resample))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """An (H, W, 3) uint8 image in the processor's size."""
        return resize(image, output_size(*image.shape[:2], self.size), self.resample)


def canvas_of(photo: Photo, size_divisor: int | None) -> Hashable:
    """What photos must share to go through the network together; None of photos that are not resized yet."""
    return canvas_size([photo.pixels.shape[:2]], size_divisor, None) if photo.is_resized else None


def in_batches(items: Iterable, batch_size: int, key: Callable[[object], Hashable]) -> Iterator[list]:
    """Lists of up to `batch_size` items of equal key; an item waits until few others have come after it."""
    groups, waiting = {}, 0
    for item in items:
        kind = key(item)
        group = groups.setdefault(kind, [])
        group.append(item)
        waiting += 1
        if len(group) < batch_size:
            if waiting < WAITING * batch_size:
                continue
            kind = next(iter(groups))  # that of the item which waits longest
        batch = groups.pop(kind)
        waiting -= len(batch)
        yield batch
    yield from groups.values()
