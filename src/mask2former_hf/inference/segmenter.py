"""The one way to segment: a checkpoint and images in, `Segmentation`s out. torch is imported for checkpoints alone."""

import os
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..data.bands import read_pixels, to_pixels
from ..data.images import load
from ..data.windows import ImageWindows, open_raster
from ..model.channels import check_same_channels, image_channels
from ..model.number_checks import check_count
from .batches import batch_schema, one_thread_of_torch_if_forked, rows_of_batch
from .exported import ExportedModel, is_exported
from .known_labels import window_of
from .photos import Photo, Resizing
from .precision import dtype_field
from .rules import Rules, rules_of
from .segmentation import Segmentation
from .tiles import OVERLAP, check_tiling, plan_tiles

if TYPE_CHECKING:
    import torch

    from .tile_merging import TileResult

DOWNLOAD_TIMEOUT = 60  # seconds


class Segmenter:
    """Segments images with a checkpoint, ours or transformers'.

    ```python
    result = Segmenter("facebook/mask2former-swin-tiny-coco-panoptic")("photo.jpg")
    result.plot("photo.jpg").show()
    ```

    Args:
        checkpoint: folder or Hub id; or the folder of an export, which runs without torch.
        task: "panoptic", "instance" or "semantic"; None for what the checkpoint is for.
        device: None for a GPU if there is one, else the CPU; for exports None is the CPU.
        dtype: of the weights, such as torch.bfloat16; None as they are in the file; "auto" for bfloat16 on devices
            that multiply it natively, else float32. Results differ a little from those of float32 (docs/speed.md).
        refine: "otsu", a threshold for every mask; "crf", a dense CRF over the image; or None.
        tta: average over six sizes and their mirror images; over five for a checkpoint with a sliding window
            (`sliding_window.sliding_scores`), whose semantic results always take one.
        tile: side in pixels of the overlapping tiles in which larger images are segmented; "auto" for tiles of the
            size that the model was made for, of images that it would shrink; None to take every image whole.
        overlap: share of a tile's side that its neighbour sees too, at least. Objects up to that size are seen whole.
        level: with tile, of the pyramid of TIFFs: 0 is the full image, 1 the first overview. A result has its size.
        effort: share of the decoder's layers that run, rounded up, and of the encoder's where the checkpoint was
            trained for it, below 1 also without queries that are probably nothing (`effort.at_effort`); 1 for all.

    An export has dtype and layers in the graph, and neither refinement, averages nor tiles.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, and for options that do not fit it.
        ImportError: for a refinement whose package is missing.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        task: str | None = None,
        device: "str | torch.device | None" = None,
        dtype: "torch.dtype | str | None" = None,
        refine: str | None = None,
        tta: bool = False,
        tile: int | str | None = None,
        overlap: float = OVERLAP,
        level: int = 0,
        effort: float = 1,
    ):
        if is_exported(checkpoint):
            given = {"dtype": dtype, "refine": refine, "tta": tta or None, "tile": tile}
            given |= {"level": level or None, "effort": None if effort == 1 else effort}
            if unfit := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{unfit[0]}={given[unfit[0]]!r}: {checkpoint} is an export; use its checkpoint")
        self._origin = os.fspath(checkpoint), device, dtype
        model = _load(*self._origin)
        if isinstance(model, ExportedModel):
            self._set(model, model.processor, task or model.task, refine, tta, tile, overlap, level, effort)
            model.check(self.rules())
            return
        from .loading import load_processor

        self._set(model, load_processor(checkpoint), task, refine, tta, tile, overlap, level, effort)

    @classmethod
    def of(
        cls,
        model,
        processor,
        *,
        task: str | None = None,
        refine: str | None = None,
        tta: bool = False,
        tile: int | str | None = None,
        overlap: float = OVERLAP,
        level: int = 0,
        effort: float = 1,
        replay: bool = False,
    ):
        """A segmenter with a model that is there already; its device and dtype are the model's.

        Args:
            replay: on GPUs, replay what ran before (`inference.replay`); for a model whose parts nobody exchanges.
        """
        segmenter = cls.__new__(cls)
        segmenter._origin = None
        segmenter._set(model.eval(), processor, task, refine, tta, tile, overlap, level, effort)
        segmenter._replays = replay
        return segmenter

    def _set(self, model, processor, task, refine, tta, tile, overlap, level, effort):
        self.effort, self._model = effort, _at_effort(model, effort)
        self.processor, self.refine, self.tta = processor, refine, tta
        self._replays, self._replay = True, None
        self.channels = image_channels(processor)  # bands of its images; None for photos
        if not isinstance(model, ExportedModel):
            check_same_channels(model.config, processor)
        self.task = rules_of(model.config, task, processor=processor, refine=refine).task
        self.overlap = overlap
        # the side of tiles, and the longest side of an image that is taken whole
        self.tile, self._whole = trained_sides(processor.size) if tile == "auto" else (tile, tile)
        if tile is not None:
            check_tiling(self.tile, overlap, level)
        elif overlap != OVERLAP:
            raise ValueError(f"overlap={overlap!r}: only tiles overlap; give tile, or leave it out")
        elif level:
            raise ValueError(f"level={level!r}: only tiles are read from levels; give tile, or leave it out")
        self.opening = Opening(tile is not None, self.channels, level)

    @property
    def model(self):
        """The network; that of a segmenter from another process is loaded at its first use, once for all of them.

        On a GPU a checkpoint's network is replayed (`inference.replay`): give one whose parts you exchange to `of`.
        """
        if self._model is None:
            self._model = _at_effort(_load_once(*self._origin), self.effort)
        return self._model

    def __getstate__(self):
        """A segmenter of a checkpoint travels by the checkpoint's name, one of a model with the weights."""
        return {**self.__dict__, "_replay": None} | ({} if self._origin is None else {"_model": None})

    def rules(self, **numbers) -> Rules:
        """What results are made by; see `rules_of` for the numbers."""
        return rules_of(self.model.config, self.task, processor=self.processor, refine=self.refine, **numbers)

    def __call__(self, images, *, batch_size: int = 1, progress: bool = False, **numbers):
        """Segment an image, or many.

        Args:
            images: an image, which is a PIL image, a path, a URL, the bytes of an image file, an array of integers,
                (H, W) or (H, W, channels), a tensor of integers, (H, W) or (channels, H, W) with up to 4 channels, or
                `data.windows.ImageWindows`; or an iterable of images. Photos are turned upright by their EXIF tag.
                For a checkpoint of bands: a file (`data.bands.read_pixels`), or an array of integers or floats,
                (H, W, channels) or as a tensor (channels, H, W), with the checkpoint's number of bands.
            batch_size: images of an iterable, or tiles, that go through the network at a time.
            progress: show the tiles of an image, or the steps of a refinement.
            numbers: `threshold`, `mask_threshold`, `overlap_threshold`, `top_k`, `stuff_label_ids`; see `Rules`. One
                that the task's results are not made by is refused.

        Returns:
            a `Segmentation` for an image, an iterator of them for an iterable.
        """
        check_count(batch_size=batch_size)
        rules = self.rules(**numbers)
        if is_image(images):
            return self.segment_windows(self.open(images), rules, batch_size, progress)
        return self._many(iter(images), batch_size, rules, progress)

    def _many(self, images: Iterator, batch_size: int, rules: Rules, progress: bool) -> Iterator[Segmentation]:
        if self.tile is not None:
            for image in images:
                yield self.segment_windows(self.open(image), rules, batch_size, progress)
            return
        while batch := [self.read(image) for image in islice(images, batch_size)]:
            yield from self.segment(batch, rules, progress)

    def on_batch(
        self,
        batch: Mapping[str, Sequence],
        indices: Sequence[int] | None = None,
        *,
        image: str = "image",
        image_id: str | None = None,
        batch_size: int = 1,
        **numbers,
    ) -> dict[str, list]:
        """Segment a batch of columns, as engines for many machines hand it out: one row for each segment.

        It is a function for `datasets.Dataset.map(batched=True)`, for a class of Ray Data's `map_batches`, and for
        Spark's `mapInPandas`; docs/scale.md and `examples/` have all three.

        Args:
            batch: columns by name: lists, arrays, or a DataFrame of pandas.
            indices: numbers of the rows, which `Dataset.map(with_indices=True)` gives; they become the images' ids.
            image: column of the images: paths, bytes, arrays, PIL, or the dicts {"bytes", "path"} of `datasets`.
            image_id: column of the images' ids; without it, and without `indices`, the paths of the images are.
            batch_size: images, or tiles, that go through the network at a time.
            numbers: see `__call__`.

        Returns:
            The columns of `Segmentation.to_rows`, and `problem`: an image that cannot be read has one row, with its
            id and what is wrong with it. An image without a segment has none. Their types: `batch_schema`.

        Raises:
            ValueError: for columns that are not there, and images without an id.
        """
        check_count(batch_size=batch_size)
        with one_thread_of_torch_if_forked():
            return rows_of_batch(self, batch, indices, image, image_id, batch_size, self.rules(**numbers))

    @staticmethod
    def batch_schema():
        """`pyarrow.schema` of what `on_batch` returns, for engines that guess types from the first rows."""
        return batch_schema()

    def open(self, image) -> ImageWindows:
        """An image in any of its forms; of a large TIFF, if this segmenter makes tiles, nothing is read yet."""
        return self.opening(image)

    def read(self, image) -> np.ndarray:
        """The pixels of an image in any of its forms, (H, W, 3) uint8 RGB or the checkpoint's bands."""
        return read(image, channels=self.channels)

    @one_thread_of_torch_if_forked()
    def segment_windows(
        self, image: ImageWindows, rules: Rules, batch_size: int = 1, progress: bool = False
    ) -> Segmentation:
        """The result of one image by given rules, in tiles if it is large and this segmenter makes tiles."""
        if self.tile is not None and max(image.size) > self._whole:
            from .tile_merging import segment_tiles

            plan = plan_tiles(image.size, self.tile, self.overlap)
            return segment_tiles(
                image, plan, rules, lambda tiles: self._tile_results(tiles, rules), batch_size, progress
            )
        height, width = image.size
        result = self.segment([image.read((0, 0, width, height))], rules, progress)[0]
        return replace(result, georeference=image.georeference)

    def _tile_results(self, tiles: list[np.ndarray], rules: Rules) -> "Iterator[TileResult]":
        from .results import segment_tiles_alone

        return segment_tiles_alone(self.model, self.processor, tiles, rules, tta=self.tta, replay=self._replaying())

    @one_thread_of_torch_if_forked()
    def segment(self, images: list[np.ndarray], rules: Rules, progress: bool = False) -> list[Segmentation]:
        """The results of a batch of images by given rules, (H, W, 3) uint8 RGB or bands (`read`)."""
        if isinstance(self.model, ExportedModel):
            return self.model.segment(images, rules)
        from .results import segment_images

        options = {"tta": self.tta, "progress": progress, "replay": self._replaying()}
        return segment_images(self.model, self.processor, images, rules, **options)

    def _replaying(self):
        """What runs the network on a GPU; None for a model that somebody else may be training."""
        if self._replay is None and self._replays and self.model.device.type == "cuda":
            from .replay import Replay

            self._replay = Replay(self.model)
        return self._replay

    def resizing(self, rules: Rules) -> Resizing | None:
        """What other processes may do to images before `segment_photos`; None where results need whole images, and
        for bands."""
        window = window_of(self.model.config, rules.task)
        needs_whole = self.tta or window is not None or rules.refine == "crf" or self.channels is not None
        if needs_whole or isinstance(self.model, ExportedModel):
            return None
        return Resizing.of(self.processor)

    @one_thread_of_torch_if_forked()
    def segment_photos(self, photos: list[Photo], rules: Rules) -> list[Segmentation]:
        """The results of a batch, of which all photos are resized, or none."""
        if not photos[0].is_resized:
            return self.segment([photo.pixels for photo in photos], rules)
        from .results import segment_resized

        pixels, sizes = [photo.pixels for photo in photos], [photo.size for photo in photos]
        return segment_resized(self.model, self.processor, pixels, sizes, rules, self._replaying())


def _load(checkpoint: str, device, dtype):
    if is_exported(checkpoint):
        return ExportedModel(checkpoint, device)
    from .loading import load_model, to_device

    return to_device(load_model(checkpoint, **dtype_field(dtype, device)), device)


_load_once = cache(_load)


def _at_effort(model, effort: float):
    if effort == 1:  # as of exports, which do without torch
        return model
    from .effort import at_effort

    return at_effort(model, effort)


def trained_sides(size) -> tuple[int, int]:
    """Of a processor's `size`: the shorter side of what the network sees, and the longest side that is not shrunk."""
    lengths = [length for length in dict(size).values() if length]
    if not lengths:
        raise ValueError(f"size={dict(size)} of the processor names no side; give tile as a number of pixels")
    return min(lengths), max(lengths)


def is_image(value) -> bool:
    """Whether this is one image, and not many."""
    if isinstance(value, str | os.PathLike | bytes | Image.Image | ImageWindows):
        return True
    if isinstance(value, np.ndarray) or _is_tensor(value):
        return value.ndim in (2, 3)
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        if isinstance(value, Mapping):
            raise TypeError(f"images is a {type(value).__name__} of {', '.join(map(str, value))}: on_batch takes such")
        raise TypeError(
            f"images is a {type(value).__name__}: give a PIL image, a path, a URL, an array or tensor, or an iterable "
            "of these"
        )
    return False


@dataclass(frozen=True)
class Opening:
    """How an image in any of its forms becomes windows, in this process and in workers.

    Args:
        in_tiles: of a large TIFF nothing is read yet.
        channels: bands of the image; None for photos.
        level: of the pyramid of TIFFs.
    """

    in_tiles: bool
    channels: int | None = None
    level: int = 0

    def __call__(self, image) -> ImageWindows:
        if isinstance(image, ImageWindows):
            return image
        is_file = self.in_tiles and isinstance(image, str | os.PathLike)
        windows = open_raster(image, self.channels, self.level) if is_file else None
        return ImageWindows(read(image, channels=self.channels)) if windows is None else windows


def read(image, timeout: float = DOWNLOAD_TIMEOUT, channels: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image in any of its forms, upright; or its (H, W, channels) bands.

    Args:
        timeout: of a download, in seconds.
        channels: bands of the image, whose numbers stay as they are; None for RGB.

    Raises:
        OSError: for files that are missing or damaged.
        ValueError: for what is no image.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        with urllib.request.urlopen(image, timeout=timeout) as response:
            image = response.read()
    if isinstance(image, bytes):
        return read_pixels("the bytes of an image", channels, image)
    if isinstance(image, str | os.PathLike):
        return read_pixels(Path(image), channels)
    if isinstance(image, Image.Image):
        image = load(image, getattr(image, "filename", "") or "images")
    if _is_tensor(image) and image.ndim == 3 and image.shape[0] <= (channels or 4):
        image = image.permute(1, 2, 0)  # torch's channels come first, NumPy's last
    return to_pixels(image, getattr(image, "filename", "") or "images", channels)


def _is_tensor(value) -> bool:
    torch = sys.modules.get("torch")  # without it there is no tensor
    return torch is not None and isinstance(value, torch.Tensor)
