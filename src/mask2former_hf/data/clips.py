"""Clips cut out of annotated videos for training: which frames, how they are changed, and what is to be learnt.

The rules are those of the original's mapper (`mask2former_video/data_video`): what is drawn is drawn once per clip.
Letters: `T` frames, `N` objects, (H, W) a frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .annotations import decode_mask
from .transforms import ResizeShortestEdge
from .videos import Video, VideoObject, VideoReader

NO_LABEL = -1  # of an object whose class is not told to the model; its masks are


@dataclass(frozen=True, eq=False, slots=True)
class Clip:
    """Frames of a video and the objects that are to be seen in them.

    Args:
        frames: (T, H, W, 3) uint8 RGB.
        masks: (N, T, H, W) bool; none is empty in all frames.
        labels: (N,) int64 classes, `NO_LABEL` for an object that is not annotated in the last frame.
        ids: of the objects.
        video_id: of the video.
        numbers: of the frames in the video.
        drawn: what was drawn for it, for `cut`.
    """

    frames: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    ids: tuple
    video_id: int | str
    numbers: tuple[int, ...]
    drawn: dict


@dataclass(frozen=True)
class ClipRecipe:
    """What is drawn for a clip.

    Args:
        frames: T; the first is any frame of the video, the others lie near it. Frames are sorted.
        frame_range: largest distance of the others from the first drawn; they may occur twice, the first does not.
        short_sides, max_size: of the resized frames, as in `ResizeShortestEdge`.
        flip: probability of the mirror image.
        label_of: "last", the original's rule: an object that is not annotated in the last frame has no label, and the
            model is told "no object" for the query that has its masks; "any" for its class in every case.
    """

    frames: int = 2
    frame_range: int = 20
    short_sides: Sequence[int] = (360, 480)
    max_size: int = 1333
    flip: float = 0.5
    label_of: str = "last"

    def __post_init__(self):
        if self.frames < 1 or self.frame_range < 1:
            raise ValueError(f"frames={self.frames}, frame_range={self.frame_range}: must be 1 or more")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip}: must be a probability, 0 to 1")
        if self.label_of not in ("last", "any"):
            raise ValueError(f"label_of={self.label_of!r}: must be 'last' or 'any'")

    def draw(self, video: Video, rng: np.random.Generator) -> dict:
        """All that is random of a clip, as plain values."""
        reference = int(rng.integers(video.length))
        first, last = max(0, reference - self.frame_range), min(video.length, reference + self.frame_range + 1)
        near = [number for number in range(first, last) if number != reference] or [reference]  # of a single frame
        others = rng.choice(near, self.frames - 1).tolist()
        resize = ResizeShortestEdge(self.short_sides, self.max_size).draw(video, rng)
        return {
            "numbers": sorted([reference, *others]),
            "height": resize["height"],
            "width": resize["width"],
            "flip": bool(rng.random() < self.flip),
        }

    def __call__(self, video: Video, rng: np.random.Generator) -> Clip:
        return cut(video, self.draw(video, rng), self.label_of)


def cut(video: Video, drawn: dict, label_of: str = "last") -> Clip:
    """The clip that `ClipRecipe.draw` describes.

    Objects are those annotated in a sampled frame, crowds left out, in their order in the video. Masks given as
    polygons are drawn at the new size, others are resized by nearest neighbour. An object that no pixel is left of in
    any frame is dropped; one without a pixel in the last frame, but annotated there, keeps its label.
    """
    numbers, size, flip = drawn["numbers"], (drawn["height"], drawn["width"]), drawn["flip"]
    frames = np.stack([_flipped(_resized_image(video.frame(number), size), flip, 1) for number in numbers])
    masks, labels, ids = [], [], []
    for thing in video.objects:
        if thing.iscrowd or all(thing.segmentations[number] is None for number in numbers):
            continue
        own = np.stack([_resized_mask(thing, number, video.size, size) for number in numbers])
        if not own.any():
            continue
        masks.append(_flipped(own, flip, 2))
        known = label_of == "any" or thing.segmentations[numbers[-1]] is not None
        labels.append(thing.label if known else NO_LABEL)
        ids.append(thing.id)
    masks = np.stack(masks) if masks else np.zeros((0, len(numbers), *size), dtype=bool)
    return Clip(frames, masks, np.array(labels, dtype=np.int64), tuple(ids), video.id, tuple(numbers), drawn)


class ClipDataset(Dataset):
    """A clip of every video, drawn anew in every epoch: a function of (seed, epoch, index).

    Args:
        videos: to cut from.
        recipe: what is drawn.
        seed: 0 or more, below 2**32.
    """

    def __init__(self, videos: VideoReader, recipe: ClipRecipe, seed: int = 0):
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: must be at least 0 and below 2**32")
        self.videos, self.recipe, self.seed = videos, recipe, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see changes

    def set_epoch(self, epoch: int) -> None:
        """Change what is drawn, in this process and in the workers of its data loaders; call it between epochs."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: must be 0 or more")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> Clip:
        index = range(len(self))[index]
        numbers = [self.seed, int(self._epoch), index]
        return self.recipe(self.videos[index], np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers))))


def _resized_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def _resized_mask(thing: VideoObject, frame: int, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    segmentation = thing.segmentations[frame]
    is_polygons = isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation)
    if is_polygons:
        scale = np.array([new[1] / old[1], new[0] / old[0]])
        scaled = [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in segmentation]
        return decode_mask(scaled, new, f"object {thing.id}, frame {frame}")
    mask = thing.mask(frame, tuple(old))
    if mask.shape == new:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(new[::-1], Image.Resampling.NEAREST)) > 0


def _flipped(array: np.ndarray, flip: bool, axis: int) -> np.ndarray:
    return np.flip(array, axis) if flip else array
