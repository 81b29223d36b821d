"""Model outputs → `Segmentation`s or results of tiles, by given rules; what every door calls in the end."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ..model.channels import image_channels
from ..model.postprocessing import (
    instance_segmentation,
    logits_per_image,
    panoptic_claims,
    panoptic_segmentation,
    semantic_map,
    semantic_scores,
    stack_instances,
)
from .crf import crf_instance_decision, crf_panoptic_segmentation, crf_semantic_map, dense_crf, map_of_winners
from .known_labels import window_of
from .otsu import otsu_decision
from .replay import Replay
from .rules import Rules
from .segmentation import Segmentation, instance_result, panoptic_result, semantic_result
from .sliding_window import sliding_scores
from .tile_merging import VOID, Thing, TileResult
from .tta import augmented_outputs, augmented_semantic_scores


@torch.inference_mode()
def segment_images(
    model,
    processor,
    images: Sequence[np.ndarray],
    rules: Rules,
    *,
    tta: bool = False,
    progress: bool = False,
    replay: Replay | None = None,
) -> list[Segmentation]:
    """The results of a batch of images, (H, W, 3) uint8 RGB or bands as the processor takes them.

    Args:
        tta: average over several sizes and their mirror images (`inference.tta`); a checkpoint with a sliding window
            always takes that for semantic results.
        progress: show the steps of an image with a refinement.
        replay: runs the model; None for its forward.
    """
    results = []
    for logits, image in zip(_logits(model, processor, images, rules, tta, replay), images, strict=True):
        decide = from_scores if isinstance(logits, torch.Tensor) else segment_logits
        results.append(decide(logits, rules, image, progress))
    return results


@torch.inference_mode()
def segment_tiles_alone(
    model,
    processor,
    tiles: Sequence[np.ndarray],
    rules: Rules,
    *,
    tta: bool = False,
    replay: Replay | None = None,
) -> Iterator[TileResult]:
    """What each of a batch of tiles shows; see `segment_images`."""
    for logits, tile in zip(_logits(model, processor, tiles, rules, tta, replay), tiles, strict=True):
        decide = tile_of_scores if isinstance(logits, torch.Tensor) else tile_result
        yield decide(logits, rules, tile)


def _logits(
    model, processor, images: Sequence[np.ndarray], rules: Rules, tta: bool, replay: Replay | None
) -> Iterator[tuple | torch.Tensor]:
    """Per image its logits and sizes; or, of semantic results that are averages, (K, H, W) scores."""
    pictures = [as_processed(image, image_channels(processor)) for image in images]
    sizes = [image.shape[:2] for image in images]
    window = window_of(model.config, rules.task)
    if window is None and not tta:
        yield from _plain_logits(model, processor, pictures, sizes, replay)
        return
    for picture, size in zip(pictures, sizes, strict=True):
        if window is not None:
            yield sliding_scores(model, processor, picture, size, window, tta)
        elif rules.task == "semantic":
            first = not rules.semantic_only
            yield augmented_semantic_scores(model, processor, picture, size, resize_masks_first=first)
        else:
            yield from logits_per_image(augmented_outputs(model, processor, picture), [size])


def as_processed(image: np.ndarray, channels: int | None):
    """An image so that a processor need not guess which side of it is channels: an array of 3 rows may be a photo.

    A photo is a picture of Pillow's; bands come first, which processors take for channels in doubt.
    """
    return Image.fromarray(image) if channels is None else image.transpose(2, 0, 1)


def _plain_logits(model, processor, pictures: list, sizes, replay: Replay | None, **options) -> Iterator[tuple]:
    inputs = processor(pictures, return_tensors="pt", **options)  # its pixel_mask is read on the host
    inputs["pixel_values"] = inputs["pixel_values"].to(model.device)
    yield from logits_per_image((replay or model)(**inputs), sizes)


@torch.inference_mode()
def segment_resized(
    model, processor, resized: Sequence[np.ndarray], sizes, rules: Rules, replay: Replay | None = None
) -> list[Segmentation]:
    """The results of photos that are resized as by the processor; `sizes` are those before, and of the results."""
    pictures = [Image.fromarray(image) for image in resized]
    found = _plain_logits(model, processor, pictures, sizes, replay, do_resize=False)
    return [segment_logits(logits, rules) for logits in found]


def segment_outputs(
    outputs,
    rules: Rules,
    sizes: Sequence[tuple[int, int]],
    images: Sequence[np.ndarray] | None = None,
    progress: bool = False,
) -> list[Segmentation]:
    """The results of a batch.

    Args:
        outputs: the model's.
        sizes: (height, width) of each image before the processor, which is that of its result.
        images: (H, W, 3) uint8 RGB each; `refine="crf"` needs them.
        progress: show the steps of an image with a refinement.
    """
    images = [None] * len(sizes) if images is None else images
    return [
        segment_logits(logits, rules, image, progress)
        for image, logits in zip(images, logits_per_image(outputs, sizes), strict=True)
    ]


def segment_logits(logits: tuple, rules: Rules, image: np.ndarray | None = None, progress: bool = False):
    """The result of one image, whose logits and sizes are what `postprocessing.logits_per_image` yields."""
    if rules.refine == "crf" and image is None:
        raise ValueError("refine='crf' needs the image: give images")
    return {"panoptic": _panoptic, "instance": _instances, "semantic": _semantic}[rules.task](
        logits, rules, image, progress
    )


def tile_result(logits: tuple, rules: Rules, image: np.ndarray) -> TileResult:
    """What a tile of an image shows, of logits and sizes as `segment_logits` takes them."""
    if rules.task == "panoptic":
        return _panoptic_tile(logits, rules, image)
    if rules.task == "instance":
        return TileResult(_things(_instances(logits, rules, image, False)))
    return tile_of_scores(semantic_scores(*logits, resize_masks_first=not rules.semantic_only), rules, image)


def tile_of_scores(scores: torch.Tensor, rules: Rules, image: np.ndarray) -> TileResult:
    """What (K, H, W) semantic scores of a tile show."""
    scores = scores if rules.refine is None else dense_crf(image, scores)
    return TileResult(labels=range(len(scores)), scores=scores.cpu().numpy())


def _panoptic_tile(logits, rules: Rules, image: np.ndarray) -> TileResult:
    decide = otsu_decision() if rules.refine == "otsu" else None
    claims, segments = panoptic_claims(*logits, **_panoptic_options(rules), decide=decide)
    if rules.refine == "crf" and segments:
        claims = dense_crf(image, claims)
    ids, kept = map_of_winners(claims.argmax(0), segments)
    result = panoptic_result(ids.cpu().numpy(), kept, rules.id2label, rules.stuff_label_ids)
    stuff = [place for place, segment in enumerate(segments, start=1) if segment["was_fused"]]
    labels = [segments[place - 1]["label_id"] for place in stuff]
    scores = {segments[place - 1]["label_id"]: segments[place - 1]["score"] for place in stuff}
    return TileResult(_things(result), [VOID, *labels], claims[[0, *stuff]].cpu().numpy(), scores)


def _things(result: Segmentation) -> list[Thing]:
    found = zip(result.segments, result.runs, strict=True)
    return [Thing(s.label_id, s.score, runs) for s, runs in found if s.label_id not in result.stuff_label_ids]


def _panoptic_options(rules: Rules) -> dict:
    return {
        "object_mask_threshold": rules.threshold,
        "overlap_threshold": rules.overlap_threshold,
        "mask_threshold": rules.mask_threshold,
        "stuff_label_ids": set(rules.stuff_label_ids),
    }


def _panoptic(logits, rules: Rules, image, progress) -> Segmentation:
    return panoptic_and_queries(logits, rules, image, progress)[0]


def panoptic_and_queries(logits, rules: Rules, image=None, progress=False) -> tuple[Segmentation, list[int]]:
    """The result, and the query of each segment; of stuff that was merged the best one."""
    options = _panoptic_options(rules)
    if rules.refine == "crf":
        ids, segments = crf_panoptic_segmentation(image, *logits, progress=progress, **options)
    else:
        decide = otsu_decision(progress) if rules.refine == "otsu" else None
        ids, segments = panoptic_segmentation(*logits, decide=decide, **options)
    result = panoptic_result(ids.cpu().numpy(), segments, rules.id2label, rules.stuff_label_ids)
    return result, [segment["query"] for segment in segments]


def _instances(logits, rules: Rules, image, progress) -> Segmentation:
    return instances_and_queries(logits, rules, image, progress)[0]


def instances_and_queries(logits, rules: Rules, image=None, progress=False) -> tuple[Segmentation, list[int]]:
    """The result, and the query of each instance."""
    decide = {
        "otsu": lambda: otsu_decision(progress),
        "crf": lambda: crf_instance_decision(image, mask_threshold=rules.mask_threshold, progress=progress),
    }
    stuff = set(rules.stuff_label_ids)
    found = instance_segmentation(
        *logits,
        top_k=rules.top_k,
        thing_label_ids=set(rules.id2label) - stuff if stuff else None,
        score_threshold=rules.threshold,
        mask_threshold=rules.mask_threshold,
        decide=decide[rules.refine]() if rules.refine else None,
    )
    _, kept = stack_instances(found["masks"], rules.overlap_threshold, found["boxes"])
    scores, labels = (found[name][kept].tolist() for name in ("scores", "labels"))
    masks, boxes = (found[name] if len(kept) == len(found[name]) else found[name][kept] for name in ("masks", "boxes"))
    named, boxes = (rules.id2label, rules.stuff_label_ids), boxes.int().tolist()
    result = instance_result(masks.cpu().numpy(), scores, labels, *named, boxes=boxes)
    return result, found["queries"][kept].tolist()


def _semantic(logits, rules: Rules, image, progress) -> Segmentation:
    first = not rules.semantic_only
    if rules.refine == "crf":
        return from_scores(semantic_scores(*logits, resize_masks_first=first), rules, image, progress)
    return _from_labels(semantic_map(*logits, resize_masks_first=first), rules)


def from_scores(scores: torch.Tensor, rules: Rules, image: np.ndarray | None = None, progress: bool = False):
    """The semantic result of (K, H, W) scores."""
    # The same labels as argmax's, which on CPUs takes twice as long over the first axis.
    labels = scores.max(0).indices if rules.refine is None else crf_semantic_map(image, scores, progress=progress)
    return _from_labels(labels, rules)


def _from_labels(labels: torch.Tensor, rules: Rules) -> Segmentation:
    return semantic_result(labels.int().cpu().numpy(), rules.id2label, rules.stuff_label_ids)
