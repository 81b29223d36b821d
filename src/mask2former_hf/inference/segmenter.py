"""The one way to segment: a checkpoint and images in, `Segmentation`s out. torch is imported for checkpoints alone."""

import io
import os
import sys
import urllib.request
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..data.images import read_image, to_rgb
from .exported import ExportedModel, is_exported
from .rules import Rules, rules_of
from .segmentation import Segmentation

if TYPE_CHECKING:
    import torch

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
        device: None for a GPU if there is one, else the CPU.
        dtype: of the weights, such as torch.bfloat16; None as they are in the file.
        refine: "otsu", a threshold for every mask; "crf", a dense CRF over the image; or None.
        tta: average over six sizes and their mirror images; over five for a checkpoint with a sliding window
            (`sliding_window.sliding_scores`), whose semantic results always take one.

    An export has its dtype in the graph, and neither refinement nor averages.

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
    ):
        if is_exported(checkpoint):
            given = {"dtype": dtype, "refine": refine, "tta": tta or None}
            if unfit := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{unfit[0]}={given[unfit[0]]!r}: {checkpoint} is an export; use its checkpoint")
            model = ExportedModel(checkpoint, device)
            self._set(model, model.processor, task or model.task, refine, tta)
            model.check(self.rules())
            return
        from .loading import load_model, load_processor, to_device

        fields = {} if dtype is None else {"dtype": dtype}
        model = to_device(load_model(checkpoint, **fields), device)
        self._set(model, load_processor(checkpoint), task, refine, tta)

    @classmethod
    def of(cls, model, processor, *, task: str | None = None, refine: str | None = None, tta: bool = False):
        """A segmenter with a model that is there already; its device and dtype are the model's."""
        segmenter = cls.__new__(cls)
        segmenter._set(model.eval(), processor, task, refine, tta)
        return segmenter

    def _set(self, model, processor, task, refine, tta):
        self.model, self.processor, self.refine, self.tta = model, processor, refine, tta
        self.task = rules_of(model.config, task, processor=processor, refine=refine).task

    def rules(self, **numbers) -> Rules:
        """What results are made by; see `rules_of` for the numbers."""
        return rules_of(self.model.config, self.task, processor=self.processor, refine=self.refine, **numbers)

    def __call__(self, images, *, batch_size: int = 1, progress: bool = False, **numbers):
        """Segment an image, or many.

        Args:
            images: an image, which is a PIL image, a path, a URL, the bytes of an image file, an array of integers,
                (H, W) or (H, W, channels), or a tensor of integers, (H, W) or (channels, H, W) with up to 4 channels;
                or an iterable of images. Photos are turned upright by their EXIF tag.
            batch_size: images that go through the network at a time, of an iterable.
            progress: show the steps of an image with a refinement.
            numbers: `threshold`, `mask_threshold`, `overlap_threshold`, `top_k`, `stuff_label_ids`; see `Rules`. One
                that the task's results are not made by is refused.

        Returns:
            a `Segmentation` for an image, an iterator of them for an iterable.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be at least 1")
        rules = self.rules(**numbers)
        if is_image(images):
            return self.segment([read(images)], rules, progress)[0]
        return self._many(iter(images), batch_size, rules, progress)

    def _many(self, images: Iterator, batch_size: int, rules: Rules, progress: bool) -> Iterator[Segmentation]:
        while batch := [read(image) for image in islice(images, batch_size)]:
            yield from self.segment(batch, rules, progress)

    def segment(self, images: list[np.ndarray], rules: Rules, progress: bool = False) -> list[Segmentation]:
        """The results of a batch of (H, W, 3) uint8 RGB images by given rules."""
        if isinstance(self.model, ExportedModel):
            return [self.model.segment(image, rules) for image in images]
        from .results import segment_images

        return segment_images(self.model, self.processor, images, rules, tta=self.tta, progress=progress)


def is_image(value) -> bool:
    """Whether this is one image, and not many."""
    if isinstance(value, str | os.PathLike | bytes | Image.Image):
        return True
    if isinstance(value, np.ndarray) or _is_tensor(value):
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
    if _is_tensor(image) and image.ndim == 3 and image.shape[0] <= 4:
        image = image.permute(1, 2, 0)  # torch's channels come first, NumPy's last
    return to_rgb(image, getattr(image, "filename", "") or "images")


def _is_tensor(value) -> bool:
    torch = sys.modules.get("torch")  # without it there is no tensor
    return torch is not None and isinstance(value, torch.Tensor)
