"""Pictures of results: colours that belong to classes, crisp outlines, labels that can be read.

All functions take an image as PIL or array in any form of `data.images.to_rgb`, and return a PIL image in RGB. Images
whose long side is below 384 pixels are enlarged first, so that outlines and labels have pixels to be drawn with.
"""

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..data.images import to_rgb

MIN_SIDE = 384
GROUND = (205, 205, 205)  # where there is no image
FILL = 0.55  # opacity of a segment's colour


def draw_segmentation(result, image=None) -> Image.Image:
    """Draw a `Segmentation`, on a grey ground if the image is not given."""
    if image is None:
        image = Image.new("RGB", result.size[::-1], GROUND)
    shapes = [
        _Shape(runs.crop(s.box), s.box[0], s.box[1], s.label_id, s.score)
        for s, runs in zip(result.segments, result.runs, strict=True)
    ]
    if result.task == "instance":
        shapes = shapes[::-1]  # the best on top
    return _draw(image, result.size, shapes, result.id2label, result.map == 0 if result.task == "panoptic" else None)


def draw_panoptic(
    image, segmentation, segments_info: Sequence[Mapping], id2label: Mapping[int, str], void: bool = True
) -> Image.Image:
    """Colour the segments of an (H, W) id map and name them.

    Args:
        segmentation: (H, W) integers; 0 is void.
        segments_info: `id`, `label_id` (or `category_id`) and optionally `score` per segment.
        id2label: class names.
        void: hatch pixels without a segment.
    """
    ids = _to_numpy(segmentation)
    shapes = [
        _shape(ids == segment["id"], segment.get("label_id", segment.get("category_id")), segment.get("score"))
        for segment in segments_info
    ]
    return _draw(image, ids.shape, shapes, id2label, ids == 0 if void else None)


def draw_instances(image, masks, labels, scores, id2label: Mapping[int, str]) -> Image.Image:
    """Draw (N, H, W) masks that may overlap, the best on top, with names and scores.

    Args:
        masks: (N, H, W) bool, best first.
        labels: N class ids.
        scores: N scores in [0, 1], or None.
        id2label: class names.
    """
    scores = [None] * len(labels) if scores is None else scores
    masks = _to_numpy(masks).astype(bool)
    shapes = [_shape(*row) for row in zip(masks, labels, scores, strict=True)]
    return _draw(image, masks.shape[1:], shapes[::-1], id2label, None)


def draw_tracks(image, segmentation) -> Image.Image:
    """Objects of one frame of a video: every id has a colour and a name, such as "person 3", in all frames."""
    names = {s.id: f"{s.label} {s.id}" for s in segmentation.segments}
    shapes = [
        _Shape(runs.crop(s.box), s.box[0], s.box[1], s.id, None)
        for s, runs in zip(segmentation.segments, segmentation.runs, strict=True)
    ]
    return _draw(image, segmentation.size, shapes[::-1], names, None)


def draw_semantic(image, label_map, id2label: Mapping[int, str], ignore_index: int = 255) -> Image.Image:
    """Colour every class of an (H, W) map of labels; pixels of `ignore_index` are hatched."""
    labels = _to_numpy(label_map)
    present = [label for label in np.unique(labels).tolist() if label != ignore_index or label in id2label]
    shapes = [_shape(labels == label, label, None) for label in present]
    void = labels == ignore_index if ignore_index not in present else None
    return _draw(image, labels.shape, shapes, id2label, void)


def side_by_side(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """One row of pictures of equal height, each below its title."""
    if len(images) != len(titles) or not images:
        raise ValueError(
            f"{len(images)} images and {len(titles)} titles: give at least one image and a title for each"
        )
    height = max(image.height for image in images)
    images = [image.resize((round(image.width * height / image.height), height)) for image in images]
    gap, font = max(4, height // 60), _font(max(14, height // 24))
    bar = round(font.size * 1.8)
    sheet = Image.new("RGB", (sum(image.width + gap for image in images) + gap, height + bar + gap), "white")
    pen, left = ImageDraw.Draw(sheet), gap
    for image, title in zip(images, titles, strict=True):
        pen.text((left + image.width / 2, bar / 2), title, font=font, fill="black", anchor="mm")
        sheet.paste(image, (left, bar))
        left += image.width + gap
    return sheet


@cache
def class_colour(label: int, variant: int = 0) -> tuple[int, int, int]:
    """A colour for a class, the same in every picture; variants differ a little, for instances of the class.

    Hues advance by the golden angle, so that neighbouring labels are far apart and none repeats.
    """
    hue = (0.02 + label * 0.61803398875) % 1
    lightness = (0.52, 0.42, 0.62, 0.47, 0.57)[(label // 7 + variant) % 5]
    hue = (hue + 0.018 * ((variant + 1) // 2) * (-1) ** variant) % 1
    return tuple(round(255 * value) for value in colorsys.hls_to_rgb(hue, lightness, 0.75))


def _to_numpy(value) -> np.ndarray:
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


class _Shape(NamedTuple):
    """A segment's mask in its box, and where the box lies."""

    mask: np.ndarray
    left: int
    top: int
    label: int
    score: float | None


def _shape(mask: np.ndarray, label, score) -> _Shape:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return _Shape(mask[:0, :0], 0, 0, label, score)
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _Shape(inside, int(columns[0]), int(rows[0]), label, score)


def _draw(image, size: tuple[int, int], shapes: list[_Shape], id2label, void) -> Image.Image:
    image = Image.fromarray(to_rgb(image, "image"))
    if shapes and tuple(size) != (image.height, image.width):
        raise ValueError(
            f"a mask is {size[0]}x{size[1]} but the image is {image.height}x{image.width}: pass "
            "target_sizes to post-processing"
        )
    scale = -(-MIN_SIDE // max(image.size))
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        void = None if void is None else void.repeat(scale, 0).repeat(scale, 1)
    canvas = np.asarray(image).astype(np.float32)
    width = max(1, round(max(image.size) / 640))  # of outlines, in pixels
    counts, plates = {}, []
    for inside, left, top, label, score in shapes:
        variant = counts[label] = counts.get(label, -1) + 1
        colour = np.array(class_colour(label, variant), dtype=np.float32)
        if not inside.size:
            continue
        if scale > 1:
            inside, left, top = inside.repeat(scale, 0).repeat(scale, 1), left * scale, top * scale
        window = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
        window[inside] = window[inside] * (1 - FILL) + colour * FILL
        window[inside & ~_erode(inside, width)] = colour * 0.35 + 160  # a light outline shows on every picture
        name = id2label.get(label, f"label {label}")
        text = name if score is None else f"{name} {score:.2f}"
        plates.append((int(inside.sum()), text, tuple(colour.astype(int).tolist()), inside, (left, top)))
    if void is not None and void.any():
        _hatch(canvas, void, width)
    drawn = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    _write_labels(drawn, plates)
    return drawn


def _erode(mask, width):
    """Pixels at least `width` away from the outside, where the border of the picture is no outside."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1, mode="edge")
        inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner


def _hatch(canvas, void, width):
    H, W = void.shape
    stripe = ((np.arange(H)[:, None] + np.arange(W)) // (4 * width)) % 4 == 0
    grey = canvas[void].mean(1, keepdims=True) * 0.5 + 60
    canvas[void] = np.where(stripe[void][:, None], 40, grey)


def _write_labels(image, plates):
    """Names on plates inside their segments, largest segments first; a plate that would cover another is left out."""
    size = max(12, round(max(image.size) / 55))
    pen, taken = ImageDraw.Draw(image), []
    for area, text, colour, mask, (left, top) in sorted(plates, key=lambda plate: -plate[0]):
        if area < 2 * size * size or not text:  # a class may be named "" for a picture without plates
            continue
        font = _font(size if area > 20 * size * size else max(10, round(size * 0.8)))
        x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
        pad = max(2, size // 5)
        w, h = x1 - x0 + 2 * pad, y1 - y0 + 2 * pad
        if w > image.width or h > image.height:
            continue
        for y, x in _deep_points(mask):
            px = min(max(left + x - w // 2, 0), image.width - w)
            py = min(max(top + y - h // 2, 0), image.height - h)
            if all(px + w <= a or px >= c or py + h <= b or py >= d for a, b, c, d in taken):
                taken.append((px, py, px + w, py + h))
                dark = tuple(round(value * 0.35) for value in colour)
                pen.rounded_rectangle((px, py, px + w, py + h), radius=pad, fill=dark)
                pen.text((px + pad - x0, py + pad - y0), text, font=font, fill="white")
                break


def _deep_points(mask, count=4):
    """A few points far inside a mask, the deepest first: centres of what survives halving and erosion."""
    factor = max(1, max(mask.shape) // 96)
    small = mask[::factor, ::factor]
    depth = np.zeros(small.shape, dtype=np.int32)
    inner = np.pad(small, 1)
    while inner.any():
        depth += inner[1:-1, 1:-1]
        core = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        inner = np.pad(core, 1)
    points = []
    for _ in range(count):
        deepest = int(depth.max())
        if deepest == 0:
            break
        rows, columns = np.nonzero(depth == deepest)
        middle = len(rows) // 2
        y, x = int(rows[middle]), int(columns[middle])
        points.append((y * factor, x * factor))
        depth[max(0, y - deepest - 3) : y + deepest + 4, max(0, x - deepest - 3) : x + deepest + 4] = 0
    return points
