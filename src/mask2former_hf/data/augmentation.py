"""Training augmentation: the original's five recipes, and a data set that applies one reproducibly.

Every step is a transform of transforms.py or colour.py. What a recipe drew is in `example.augmentation`, and
`replay(example, recorded)` does it again, on another machine or years later.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .classes import BACKGROUND_ID
from .colour import SSDColour
from .example import Example
from .transforms import (
    DropEmptySegments,
    FixedSizeCrop,
    HorizontalFlip,
    LargeScaleJitter,
    PadTo,
    RandomCrop,
    ResizeShortestEdge,
    Transform,
    as_pair,
)

__all__ = [
    "BACKGROUND_ID",
    "AugmentedDataset",
    "DropEmptySegments",
    "FixedSizeCrop",
    "HorizontalFlip",
    "LargeScaleJitter",
    "PadTo",
    "Pipeline",
    "RandomCrop",
    "ResizeShortestEdge",
    "SSDColour",
    "augmentation_for",
    "by_name",
    "instance_lsj",
    "panoptic_lsj",
    "replay",
    "resize_crop",
]


@dataclass(frozen=True)
class Pipeline:
    """Transforms in a row: `pipeline(example, rng)` returns the augmented example with its record."""

    steps: tuple[Transform, ...]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        for step in self.steps:
            example = step(example, rng)
        return example

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of all results, if they are padded to one."""
        sizes = [as_pair(step.size) for step in self.steps if isinstance(step, PadTo)]
        return sizes[-1] if sizes else None

    def without_colour(self) -> "Pipeline":
        """The same for images of bands, whose colours nobody can jitter."""
        return Pipeline(tuple(step for step in self.steps if not isinstance(step, SSDColour)))


def replay(example: Example, recorded: Iterable) -> Example:
    """Apply recorded transforms, `[name, parameters]` each, to an example as it was before them."""
    recorded = [[name, parameters] for name, parameters in recorded]
    for name, parameters in recorded:
        if name not in _TRANSFORMS:
            raise ValueError(f"recorded names the transform {name!r}: must be one of {', '.join(_TRANSFORMS)}")
        example = _TRANSFORMS[name].apply(example, parameters)
    return dataclasses.replace(example, augmentation=recorded)


def panoptic_lsj(
    size: int | tuple[int, int] = 1024,
    min_scale: float = 0.1,
    max_scale: float = 2.0,
    padding_id: int = BACKGROUND_ID,
    keep_empty: bool = True,
) -> Pipeline:
    """Flip, large-scale jitter, crop or pad to `size` (`coco_panoptic_lsj`).

    Args:
        size: of the result in pixels, one number or (height, width).
        min_scale, max_scale: bounds of the jitter's factor; 1 fits the image into `size`.
        padding_id: segment id of the padding.
        keep_empty: keep segments of which no pixel is left, as targets with an empty mask.
    """
    steps = [HorizontalFlip(), LargeScaleJitter(size, min_scale, max_scale), FixedSizeCrop(size, padding_id)]
    return _pipeline(steps, keep_empty)


def instance_lsj(
    size: int | tuple[int, int] = 1024,
    min_scale: float = 0.1,
    max_scale: float = 2.0,
    padding_id: int = BACKGROUND_ID,
    keep_empty: bool = False,
) -> Pipeline:
    """As `panoptic_lsj`, without the segments of which no pixel is left (`coco_instance_lsj`).

    The original moves the corners of polygons and draws them after that; here the drawn maps are resized, so masks
    differ along their borders.
    """
    return panoptic_lsj(size, min_scale, max_scale, padding_id, keep_empty)


def resize_crop(
    short_sides: Sequence[int],
    max_size: int,
    crop: int | tuple[int, int],
    pad: int | tuple[int, int] | None,
    colour: bool = True,
    *,
    padding_id: int,
    keep_empty: bool,
    single_category_max_area: float = 1.0,
    nearest: str = "centre",
) -> Pipeline:
    """Short side to one of `short_sides`, crop, colour jitter, flip, pad (the three `mask_former_*` mappers).

    Args:
        short_sides: lengths in pixels, equally likely.
        max_size: bound on the long side in pixels.
        crop: window in pixels, one number or (height, width); smaller images stay whole.
        pad: size of the result in pixels; None leaves every image its size.
        colour: jitter the colours.
        padding_id: segment id of the padding: 0 to ignore it, `BACKGROUND_ID` to learn that nothing is there.
        keep_empty: keep segments of which no pixel is left, as targets with an empty mask.
        single_category_max_area: below 1, prefer windows where no category covers this share (`RandomCrop`).
        nearest: how maps are sampled (`ResizeShortestEdge`).
    """
    steps = [
        ResizeShortestEdge(tuple(short_sides), max_size, nearest),
        RandomCrop(crop, single_category_max_area),
        *([SSDColour()] if colour else []),
        HorizontalFlip(),
    ]
    if pad is not None:
        cut, canvas = as_pair(crop), as_pair(pad)
        if cut[0] > canvas[0] or cut[1] > canvas[1]:
            raise ValueError(f"crop={crop}, pad={pad}: the window must fit into the padded size")
        steps.append(PadTo(pad, padding_id))
    return _pipeline(steps, keep_empty)


def by_name(mapper: str, parameters: Mapping) -> Pipeline:
    """The augmentation of a recipe of the original, by the name of its dataset mapper.

    Args:
        mapper: `coco_panoptic_lsj`, `coco_instance_lsj`, `mask_former_semantic`, `mask_former_instance` or
            `mask_former_panoptic`.
        parameters: arguments of `panoptic_lsj` or `resize_crop`; they replace what the mapper implies.
    """
    if mapper not in _MAPPERS:
        raise ValueError(f"mapper={mapper!r}: must be one of {', '.join(_MAPPERS)}")
    build, implied = _MAPPERS[mapper]
    return build(**{**implied, **parameters})


def augmentation_for(task: str, crop: int, kind: str | None = None, short_sides: Sequence[int] = ()) -> Pipeline:
    """The original's augmentation of a kind at another size.

    Args:
        crop: side of the square result in pixels.
        kind: "lsj", large-scale jitter as in its COCO recipes, by default for panoptic and instance data; or
            "resize-crop", short side, random window, colour and mirror image as in its ADE20K recipes, by default for
            semantic data. The jitter shrinks images down to a tenth: resize-crop is better if objects are small.
        short_sides: of "resize-crop" in pixels, equally likely; by default 16 of 0.5 to 2 crops.
    """
    kind = kind or ("resize-crop" if task == "semantic" else "lsj")
    if kind == "lsj":
        return instance_lsj(crop) if task == "instance" else panoptic_lsj(crop)
    sides = list(short_sides) or [round(crop * tenths / 10) for tenths in range(5, 21)]
    parameters = {"short_sides": sides, "max_size": 4 * max(sides), "crop": crop, "pad": crop}
    return by_name(f"mask_former_{task}", parameters)


_TRANSFORMS = {
    transform.__name__: transform
    for transform in (
        HorizontalFlip,
        LargeScaleJitter,
        ResizeShortestEdge,
        RandomCrop,
        PadTo,
        FixedSizeCrop,
        SSDColour,
        DropEmptySegments,
    )
}
_MAPPERS = {
    "coco_panoptic_lsj": (panoptic_lsj, {}),
    "coco_instance_lsj": (instance_lsj, {}),
    "mask_former_semantic": (resize_crop, {"padding_id": 0, "keep_empty": False, "nearest": "corner"}),
    "mask_former_instance": (resize_crop, {"padding_id": BACKGROUND_ID, "keep_empty": True}),
    "mask_former_panoptic": (resize_crop, {"padding_id": BACKGROUND_ID, "keep_empty": True}),
}


def _pipeline(steps, keep_empty) -> Pipeline:
    return Pipeline((*steps, *([] if keep_empty else [DropEmptySegments()])))


class AugmentedDataset(Dataset):
    """A data set whose examples pass through an augmentation, drawn anew in every epoch.

    What example `index` gets is a function of (seed, epoch, index): worker processes, the number of training
    processes, the order and a resumed run do not change it. An iterable data set gives no indices; its examples are
    numbered by (rank, worker, position in that worker's stream), and the result is an `IterableDataset`.

    Args:
        dataset: of `Example`s or mappings (`Example.of`); map-style or iterable.
        pipeline: called as `pipeline(example, rng)`.
        seed: of the augmentation; 0 or more, below 2**32.
        rank: number of this process, for iterable data; None reads the variable RANK (torchrun, accelerate), else 0.
    """

    def __new__(cls, dataset=None, *args, **kwargs):
        # DataLoader asks isinstance(dataset, IterableDataset); unpickling passes no dataset
        iterable = isinstance(dataset, IterableDataset) or (
            dataset is not None and not hasattr(dataset, "__getitem__")
        )
        return super().__new__(_AugmentedIterable if iterable else cls)

    def __init__(
        self,
        dataset,
        pipeline: Callable[[Example, np.random.Generator], Example],
        seed: int = 0,
        rank: int | None = None,
    ):
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: must be at least 0 and below 2**32")
        if rank < 0:
            raise ValueError(f"rank={rank}: must be 0 or more")
        self.dataset, self.pipeline, self.seed, self.rank = dataset, pipeline, seed, rank
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see changes

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Change what is drawn, in this process and in the workers of its data loaders; call it between epochs."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: must be 0 or more")
        self._epoch.fill_(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        return self.pipeline(Example.of(self.dataset[index]), self._generator(index))

    def _generator(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, self.epoch, *numbers])))


class _AugmentedIterable(AugmentedDataset, IterableDataset):
    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        worker = 0 if worker is None else worker.id
        for position, example in enumerate(self.dataset):
            yield self.pipeline(Example.of(example), self._generator(self.rank, worker, position))
