"""What an example of data is: an image, the map of its segments, and what each segment is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .bands import to_bands
from .images import MOST_BANDS, to_rgb
from .rle import to_numpy


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """An annotated image. Readers give it, transforms change it into another one, collation and metrics take it.

    Nothing is computed before it is asked for and nothing is kept, so that an example on its way from a worker process
    is its arrays and no more.

    Args:
        image: (H, W, 3) uint8 RGB, upright by its EXIF tag, or (H, W, C) bands, 1 to 16 of uint8, uint16 or float32;
            None where only the annotation was asked for.
        segmentation: (H, W) int32 segment ids; or (M, H, W) where segments overlap: every segment lies complete on one
            of the M layers. In panoptic and semantic data 0 is void, ignored in loss and metrics; in instance data
            pixels without an object are `BACKGROUND_ID`, a statement, and 0 does not occur.
        segments: a dict per segment, as in COCO's `segments_info`: `id` > 0, `category_id` (index of the class), and
            as far as known `isthing`, `iscrowd`, `area` in pixels, `bbox`, `annotation_id`. A segment may have no
            pixel. Crowds are segments with `iscrowd` 1.
        image_id: the original id, or the file's path without extension.
        file_name: relative to the images' folder.
        augmentation: `[name, parameters]` of each transform that was applied (`data.augmentation.replay`).

    Raises:
        ValueError: for arrays of another type, sizes that differ, segments without `id` or `category_id`, or an id
            that two segments have.
    """

    image: np.ndarray | None
    segmentation: np.ndarray
    segments: Sequence[Mapping]
    image_id: int | str | None = None
    file_name: str | None = None
    augmentation: Sequence = ()

    def __post_init__(self):
        image, ids = self.image, self.segmentation
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int32 or ids.ndim not in (2, 3):
            raise ValueError(
                f"segmentation of {self.name} is {_describe(ids)}: must be an (H, W) or (M, H, W) int32 array of "
                "segment ids"
            )
        if image is not None:
            if not _is_image(image):
                raise ValueError(
                    f"image of {self.name} is {_describe(image)}: must be an (H, W, 3) uint8 array, or one of 1 to "
                    f"{MOST_BANDS} bands in uint8, uint16 or float32"
                )
            check_size(image.shape[:2], ids.shape[-2:], self.name)
        if 0 in ids.shape[-2:]:
            raise ValueError(f"segmentation of {self.name} has the shape {ids.shape}: an image has pixels")
        _check_segments(self.segments, self.name)
        object.__setattr__(self, "segments", tuple(self.segments))

    @classmethod
    def of(cls, example: "Example | Mapping") -> "Example":
        """An example of a data set that is not of this package, from a mapping; an `Example` is returned as it is.

        Args:
            example: `image`, a PIL image or array in any form of `data.images.to_rgb`, or an array (H, W, C) of more
                than 4 bands, which stay as they are (for fewer bands make an `Example`); `segmentation`, (H, W) or
                (M, H, W) whole numbers; `segments_info`, a mapping per segment with `id` and `category_id`; and maybe
                `image_id` and `file_name`. Other keys are not kept.

        Raises:
            TypeError: for what is no mapping.
            ValueError: for keys that are missing, and for values that `Example` refuses.
        """
        if isinstance(example, cls):
            return example
        if not isinstance(example, Mapping):
            raise TypeError(
                f"an example is a {type(example).__name__}: it must be a data.example.Example, or a mapping with "
                "image, segmentation and segments_info"
            )
        missing = [key for key in ("segmentation", "segments_info") if key not in example]
        if missing:
            raise ValueError(f"an example has {', '.join(map(str, example))} but no {', '.join(missing)}; add it")
        name = example.get("file_name") or "an example"
        image, ids = example.get("image"), to_numpy(example["segmentation"])
        if ids.dtype.kind not in "iu" or (ids.size and not -(2**31) <= ids.min() <= ids.max() < 2**31):
            raise ValueError(f"segmentation of {name} is {_describe(ids)}: must be whole numbers that fit 32 bits")
        return cls(
            None if image is None else _to_image(image, f"image of {name}"),
            ids.astype(np.int32, copy=False),
            example["segments_info"],
            example.get("image_id"),
            example.get("file_name"),
        )

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.file_name or ("an example" if self.image_id is None else f"image {self.image_id}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.segmentation.shape[-2:]

    @property
    def layers(self) -> np.ndarray:
        """(M, H, W) int32: the maps of ids, one if no segments overlap."""
        return self.segmentation if self.segmentation.ndim == 3 else self.segmentation[None]

    @property
    def objects(self) -> tuple[Mapping, ...]:
        """The segments that are no crowds."""
        return tuple(segment for segment in self.segments if not segment.get("iscrowd"))

    @property
    def crowds(self) -> tuple[Mapping, ...]:
        """The segments that are crowds."""
        return tuple(segment for segment in self.segments if segment.get("iscrowd"))

    def masks(self, segments: Sequence[Mapping] | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """(N, H, W) bool in the order of `segments`, by default all; `out` is filled instead of a new array."""
        segments, layers = self.segments if segments is None else segments, self.layers
        if out is None:
            out = np.empty((len(segments), *self.size), dtype=bool)
        for mask, segment in zip(out, segments, strict=True):
            if len(layers) == 1:
                np.equal(layers[0], segment["id"], out=mask)
            else:
                np.any(layers == segment["id"], axis=0, out=mask)
        return out

    def void(self) -> np.ndarray:
        """(H, W) bool: the pixels of which no layer says anything."""
        return (self.layers == 0).all(0)

    def with_image(self, image: np.ndarray) -> "Example":
        """With another image of the same size, whose annotation stays as it is."""
        return replace(self, image=image)

    def moved(self, image: np.ndarray | None, segmentation: np.ndarray) -> "Example":
        """With a new geometry: `area` and `bbox` of the segments no longer hold and are removed."""
        segments = [
            {key: value for key, value in segment.items() if key not in ("area", "bbox")} for segment in self.segments
        ]
        return replace(self, image=image, segmentation=segmentation, segments=segments)


def check_size(image: tuple[int, int], annotation: tuple[int, int], where):
    """Raise ValueError unless image and annotation have the same (H, W)."""
    if tuple(image) != tuple(annotation):
        (H, W), (height, width) = image, annotation
        turned = " They agree if the EXIF rotation of the image is left out: save it upright, without the tag."
        raise ValueError(
            f"{where}: the image is {H} x {W} (height x width) and its annotation {height} x {width}; both must have "
            f"the same size.{turned if (H, W) == (width, height) else ''}"
        )


def _check_segments(segments, name: str):
    for segment in segments:
        for key in ("id", "category_id"):
            if key not in segment:
                raise ValueError(f"a segment of {name} has no {key}: {dict(segment)}; add it")
            number = segment[key]
            if isinstance(number, bool) or not isinstance(number, int | np.integer):
                raise ValueError(f"a segment of {name} has {key}={number!r}: it must be a whole number")
        if segment["category_id"] < 0:
            raise ValueError(
                f"a segment of {name} has category_id={segment['category_id']}: it is the index of a class, 0 or more"
            )
    listed = [segment["id"] for segment in segments]
    if len(set(listed)) < len(listed):
        double = sorted({number for number in listed if listed.count(number) > 1})
        raise ValueError(f"{name} has the segment ids {double} twice: give every segment its own id")
    if min(listed, default=1) < 1:
        raise ValueError(f"{name} has the segment id {min(listed)}: ids are 1 or more; 0 is void, -1 background")


def _is_image(value) -> bool:
    known = isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.uint16, np.float32)
    return known and value.ndim == 3 and 1 <= value.shape[2] <= MOST_BANDS


def _to_image(image, where: str) -> np.ndarray:
    channels = np.shape(image)[2] if np.ndim(image) == 3 and not isinstance(image, Image.Image) else 0
    return to_bands(image, channels, where) if 4 < channels <= MOST_BANDS else to_rgb(image, where)


def _describe(value) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
