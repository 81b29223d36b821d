"""The one way to segment: a checkpoint and images in, `Segmentation`s out."""

import io
import os
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.images import read_image, to_rgb
from ..data.windows import ImageWindows, open_raster
from ..model.postprocessing import logits_per_image
from .loading import load_model, load_processor, to_device
from .results import from_scores, segment_logits, tile_of_scores, tile_result
from .rules import Rules, rules_of
from .segmentation import Segmentation
from .tile_merging import TileResult, segment_tiles
from .tiles import OVERLAP, check_tiling, plan_tiles
from .tta import augmented_outputs, augmented_semantic_scores

DOWNLOAD_TIMEOUT = 60  # seconds


class Segmenter:
    """Segments images with a checkpoint, ours or transformers'.

    ```python
    result = Segmenter("facebook/mask2former-swin-tiny-coco-panoptic")("photo.jpg")
    result.plot("photo.jpg").show()
    ```

    Args:
        checkpoint: folder or Hub id.
        task: "panoptic", "instance" or "semantic"; None for what the checkpoint is for.
        device: None for a GPU if there is one, else the CPU.
        dtype: of the weights, such as torch.bfloat16; None as they are in the file.
        refine: "otsu", a threshold for every mask; "crf", a dense CRF over the image; or None.
        tta: average over six sizes and their mirror images.
        tile: side in pixels of the overlapping tiles in which larger images are segmented; "auto" for tiles of the
            size that the model was made for, of images that it would shrink; None to take every image whole.
        overlap: share of a tile's side that its neighbour sees too, at least. Objects up to that size are seen whole.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, and for options that do not fit it.
        ImportError: for a refinement whose package is missing.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        task: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        refine: str | None = None,
        tta: bool = False,
        tile: int | str | None = None,
        overlap: float = OVERLAP,
    ):
        self._origin = os.fspath(checkpoint), device, dtype
        self._set(_load(*self._origin), load_processor(checkpoint), task, refine, tta, tile, overlap)

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
    ):
        """A segmenter with a model that is there already; its device and dtype are the model's."""
        segmenter = cls.__new__(cls)
        segmenter._origin = None
        segmenter._set(model.eval(), processor, task, refine, tta, tile, overlap)
        return segmenter

    def _set(self, model, processor, task, refine, tta, tile, overlap):
        self._model, self.processor, self.refine, self.tta = model, processor, refine, tta
        self.task = rules_of(model.config, task, processor=processor, refine=refine).task
        self.overlap = overlap
        # the side of tiles, and the longest side of an image that is taken whole
        self.tile, self._whole = trained_sides(processor.size) if tile == "auto" else (tile, tile)
        if tile is not None:
            check_tiling(self.tile, overlap)

    @property
    def model(self):
        """The network; that of a segmenter from another process is loaded at its first use, once for all of them."""
        if self._model is None:
            self._model = _load_once(*self._origin)
        return self._model

    def __getstate__(self):
        """A segmenter of a checkpoint travels by the checkpoint's name, one of a model with the weights."""
        return self.__dict__ if self._origin is None else {**self.__dict__, "_model": None}

    def rules(self, **numbers) -> Rules:
        """What results are made by; see `rules_of` for the numbers."""
        return rules_of(self.model.config, self.task, processor=self.processor, refine=self.refine, **numbers)

    def __call__(self, images, *, batch_size: int = 1, progress: bool = False, **numbers):
        """Segment an image, or many.

        Args:
            images: an image, which is a PIL image, a path, a URL, an (H, W) or (H, W, channels) array or tensor of
                integers, or `data.windows.ImageWindows`; or an iterable of images. Photos are turned upright by their
                EXIF tag.
            batch_size: images of an iterable, or tiles, that go through the network at a time.
            progress: show the tiles of an image, or the steps of a refinement.
            numbers: `threshold`, `mask_threshold`, `overlap_threshold`, `top_k`, `stuff_label_ids`; see `Rules`.

        Returns:
            a `Segmentation` for an image, an iterator of them for an iterable.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be at least 1")
        rules = self.rules(**numbers)
        if is_image(images):
            return self.segment_windows(self.open(images), rules, batch_size, progress)
        return self._many(iter(images), batch_size, rules, progress)

    def _many(self, images: Iterator, batch_size: int, rules: Rules, progress: bool) -> Iterator[Segmentation]:
        if self.tile is not None:
            for image in images:
                yield self.segment_windows(self.open(image), rules, batch_size, progress)
            return
        while batch := [read(image) for image in islice(images, batch_size)]:
            yield from self.segment(batch, rules, progress)

    def open(self, image) -> ImageWindows:
        """An image in any of its forms; of a large TIFF, if this segmenter makes tiles, nothing is read yet."""
        if isinstance(image, ImageWindows):
            return image
        if self.tile is not None and isinstance(image, str | os.PathLike):
            windows = open_raster(image)
            if windows is not None:
                return windows
        return ImageWindows(read(image))

    def segment_windows(
        self, image: ImageWindows, rules: Rules, batch_size: int = 1, progress: bool = False
    ) -> Segmentation:
        """The result of one image by given rules, in tiles if it is large and this segmenter makes tiles."""
        if self.tile is not None and max(image.size) > self._whole:
            plan = plan_tiles(image.size, self.tile, self.overlap)
            return segment_tiles(
                image, plan, rules, lambda tiles: self._tile_results(tiles, rules), batch_size, progress
            )
        height, width = image.size
        result = self.segment([image.read((0, 0, width, height))], rules, progress)[0]
        return replace(result, georeference=image.georeference)

    @torch.inference_mode()
    def _tile_results(self, tiles: list[np.ndarray], rules: Rules) -> Iterator[TileResult]:
        for logits, tile in zip(self._logits(tiles, rules), tiles, strict=True):
            if isinstance(logits, torch.Tensor):
                yield tile_of_scores(logits, rules, tile)
            else:
                yield tile_result(logits, rules, tile)

    @torch.inference_mode()
    def segment(self, images: list[np.ndarray], rules: Rules, progress: bool = False) -> list[Segmentation]:
        """The results of a batch of (H, W, 3) uint8 RGB images by given rules."""
        results = []
        for logits, image in zip(self._logits(images, rules), images, strict=True):
            decide = from_scores if isinstance(logits, torch.Tensor) else segment_logits
            results.append(decide(logits, rules, image, progress))
        return results

    def _logits(self, images: list[np.ndarray], rules: Rules) -> Iterator[tuple | torch.Tensor]:
        """Per image its logits and sizes; or, of augmented semantic results, (K, H, W) scores."""
        # As pictures: of an array of 1, 3 or 4 rows the processor would guess that they are channels.
        pictures = [Image.fromarray(image) for image in images]
        sizes = [image.shape[:2] for image in images]
        if not self.tta:
            inputs = self.processor(pictures, return_tensors="pt").to(self.model.device)
            yield from logits_per_image(self.model(**inputs), sizes)
            return
        for picture, size in zip(pictures, sizes, strict=True):
            if rules.task == "semantic":
                first = not rules.semantic_only
                yield augmented_semantic_scores(self.model, self.processor, picture, size, resize_masks_first=first)
            else:
                yield from logits_per_image(augmented_outputs(self.model, self.processor, picture), [size])


def _load(checkpoint: str, device, dtype):
    fields = {} if dtype is None else {"dtype": dtype}
    return to_device(load_model(checkpoint, **fields), device)


_load_once = cache(_load)


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
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim in (2, 3)
    if not isinstance(value, Iterable):
        raise TypeError(
            f"images is a {type(value).__name__}: give a PIL image, a path, a URL, an array or tensor, or an iterable "
            "of these"
        )
    return False


def read(image, timeout: float = DOWNLOAD_TIMEOUT) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image in any of its forms, upright.

    Args:
        timeout: of a download, in seconds.

    Raises:
        OSError: for files that are missing or damaged.
        ValueError: for what is no image.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        with urllib.request.urlopen(image, timeout=timeout) as response:
            image = response.read()
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    elif isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, torch.Tensor) and image.ndim == 3 and image.shape[0] <= 4:
        image = image.permute(1, 2, 0)  # torch's channels come first, NumPy's last
    return to_rgb(image, getattr(image, "filename", "") or "images")
