"""A frozen teacher's answers for distillation, and their cache on disk."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.example import Example
from ..model.canvas import crop_to_canvas
from .kept_tensors import keep, kept

THUMBNAIL = 8  # side of the picture of an image by which a cached answer recognises it
SAME_IMAGE = 0.05  # largest difference of two pixels of such pictures, in standard deviations of the normalisation


@dataclass
class Answer:
    """What the teacher says about an image. Letters: R its queries, the surest first, N the confident ones of them.

    Args:
        class_logits: (R, K + 1) float32.
        mask_logits: (N, h, w) float16, of the first N queries on the image's own canvas.
        extent: (2,) part of the canvas, (height, width) in [0, 1], that is image.
        features: (C, h, w) mask features, or None.
    """

    class_logits: Tensor
    mask_logits: Tensor
    extent: Tensor
    features: Tensor | None = None

    def surest(self, count: int) -> "Answer":
        """The same without all but the first `count` queries."""
        return replace(self, class_logits=self.class_logits[:count], mask_logits=self.mask_logits[:count])


class Teacher:
    """Answers of a model that is changed to half precision (on a GPU) and frozen, in place.

    An answer depends on the image alone: with `pixel_mask` every image is seen on its own canvas, whatever it is
    batched with. So it can be kept, for training without random augmentation: an image of the same id that looks
    otherwise is refused.

    Args:
        model: any Mask2FormerForUniversalSegmentation, whatever its backbone, size and number of queries.
        confidence: class probability, other than "no object", from which on a query is confident.
        cache: folder for the answers, one file per image id.
        dtype: of the weights; None for bfloat16 or float16 on a GPU and no change elsewhere.
        keep_features: answers have mask features, which are too large to be cached.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        confidence: float = 0.5,
        cache: str | Path | None = None,
        dtype: torch.dtype | None = None,
        keep_features: bool = False,
    ):
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence={confidence}: must be a probability, 0 or more and less than 1")
        if cache is not None and keep_features:
            raise ValueError("cache with feature_weight > 0: mask features are not cached; leave one of the two out")
        self.cache = None if cache is None else Path(cache)
        weight = model.class_predictor.weight.detach().float().cpu().contiguous()
        self.identity = f"{zlib.crc32(weight.numpy().tobytes()):08x} {confidence}"
        if dtype is None and model.device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        self.model = model.to(dtype=dtype or model.dtype).eval().requires_grad_(False)
        self.confidence, self.keep_features = confidence, keep_features

    def answers(self, pixel_values: Tensor, pixel_mask: Tensor | None, image_ids: Sequence | None) -> list[Answer]:
        """Answers for a batch, (B, 3, H, W) and (B, H, W), from the cache as far as it has them.

        Raises:
            ValueError: with a cache, if there are no ids, or a cached answer is about another image or by another
                teacher.
        """
        if self.cache is None:
            return self._ask(pixel_values, pixel_mask)
        if image_ids is None or len(image_ids) != len(pixel_values):
            raise ValueError(
                f"image_ids={image_ids} for {len(pixel_values)} images: with a cache the batch needs an id per image "
                "(`WithImageIds` around the collator adds them)"
            )
        pictures = _thumbnails(pixel_values, pixel_mask)
        paths = [self.cache / f"{quote(str(name), safe='')}.safetensors" for name in image_ids]
        answers = [
            self._load(path, picture, pixel_values.device) for path, picture in zip(paths, pictures, strict=True)
        ]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        if missing:
            masks = None if pixel_mask is None else pixel_mask[missing]
            for index, answer in zip(missing, self._ask(pixel_values[missing], masks), strict=True):
                self._save(paths[index], pictures[index], answer)
                answers[index] = answer
        return answers

    @torch.no_grad()
    def _ask(self, pixel_values, pixel_mask) -> list[Answer]:
        device = self.model.device
        with torch.autocast(device.type, enabled=False):
            masks = None if pixel_mask is None else pixel_mask.to(device)
            outputs = self.model(pixel_values.to(device), pixel_mask=masks)
        stride = self.model.config.common_stride
        canvases, sizes = outputs.canvas_sizes.tolist(), outputs.image_sizes
        class_logits = outputs.class_queries_logits.float()
        surest, order = class_logits.softmax(-1)[..., :-1].amax(-1).sort(descending=True)  # (B, R)
        counts = (surest > self.confidence).sum(1).tolist()
        answers = []
        for image, canvas in enumerate(canvases):
            mask_logits = outputs.masks_queries_logits[image, order[image, : counts[image]]]
            mask_logits = crop_to_canvas(mask_logits, canvas, stride).half()
            extent = sizes[image] / sizes.new_tensor(canvas)
            features = None
            if self.keep_features:
                features = crop_to_canvas(outputs.pixel_decoder_last_hidden_state[image], canvas, stride)
            answers.append(Answer(class_logits[image, order[image]], mask_logits, extent, features))
        return answers

    def _load(self, path: Path, picture: Tensor, device) -> Answer | None:
        found = kept(path)
        if found is None:
            return None
        tensors, facts = found
        if facts.get("teacher") != self.identity:
            raise ValueError(f"{path} is by another teacher or with another confidence: give another cache folder")
        seen = tensors.pop("thumbnail")
        if (seen - picture).abs().max() > SAME_IMAGE:
            raise ValueError(
                f"{path} is about an image that looks otherwise: cached answers fit training without random "
                "augmentation; leave out the augmentation or the cache, and give every image an id of its own"
            )
        return Answer(**{name: tensor.to(device) for name, tensor in tensors.items()})

    def _save(self, path: Path, picture: Tensor, answer: Answer):
        self.cache.mkdir(parents=True, exist_ok=True)
        tensors = {name: value for name, value in vars(answer).items() if value is not None}
        keep(path, tensors | {"thumbnail": picture}, teacher=self.identity)


class WithImageIds:
    """A collator whose batches also have `image_ids`, those of the examples, for a `Teacher`'s cache.

    The model does not take them: whoever calls it removes them from the batch first.
    """

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples: Sequence[Example | Mapping]) -> dict:
        examples = [Example.of(example) for example in examples]
        return {**self.collator(examples), "image_ids": [example.image_id for example in examples]}


def _thumbnails(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[Tensor]:
    """Per image (3, 8, 8) means of its pixels and the logarithm of its size, on the host, as (3, 8, 10)."""
    pictures = []
    for image, pixels in enumerate(pixel_values):
        if pixel_mask is not None:
            height, width = (int(pixel_mask[image].amax(axis).sum()) for axis in (1, 0))
            pixels = pixels[:, :height, :width]
        small = F.adaptive_avg_pool2d(pixels.detach().float(), THUMBNAIL)
        size = torch.tensor(pixels.shape[1:], dtype=torch.float32, device=small.device).log()
        pictures.append(torch.cat([small, size.expand(3, THUMBNAIL, 2)], -1).cpu())
    return pictures
