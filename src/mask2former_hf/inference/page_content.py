"""What the page in the browser shows of a result, and the files that it offers. Neither Gradio nor torch.

What a segment is appears above the picture while the pointer is over it, by rules of CSS: browsers run no script that
is put into a page as HTML. Rules of a name for each segment, for CSS cannot say "the caption of this one".
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import read_image, read_size
from ..data.polygons import Polygon, polygons_of
from .drawing import class_colour
from .segmentation import Segment, Segmentation

MOST_PIXELS = 25_000_000  # of an upload; cameras of phones mostly give 12 to 24 million
SHOWN_SIDE = 1024  # pixels of the longer side of the overlay, which is what a browser's window has room for
OUTLINE_TOLERANCE = 0.5  # pixels of the overlay; a third of the points
IMAGE_FILE = "image.png"  # of the downloads, to which the others refer
COLUMNS = ("id", "label", "score", "area", "box")
TRACK_COLUMNS = ("id", "label", "score", "first frame", "last frame")
POINT = "Point at a segment, or tap it, to see what it is."
STYLE = """
.shown svg { width: 100%; max-height: 76vh; display: block; }
.shown path { fill-opacity: 0.5; stroke-width: 1.5; vector-effect: non-scaling-stroke; cursor: crosshair; }
.shown svg:has(path:is(:hover, :focus-visible)) path:not(:hover, :focus-visible) { fill-opacity: 0.2; }
.shown svg path:is(:hover, :focus-visible) { fill-opacity: 0.7; stroke: #ffffff; stroke-width: 4; outline: none; }
.shown .captions { height: 1.6em; margin-bottom: 0.4em; overflow: hidden; white-space: nowrap; }
.shown .captions span { display: none; }
.shown .captions b { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.5em; border-radius: 2px; }
.shown:has(path:is(:hover, :focus-visible)) .captions .point { display: none; }
"""


class UnusableImage(ValueError):
    """An upload that cannot be segmented; its text is for whoever uploaded it and names no file of the server."""


def read_upload(path: str | Path, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an uploaded file, upright.

    Raises:
        UnusableImage: for a file that is no image or damaged, and for one with more than `most_pixels` pixels, whose
            pixels are not decoded.
    """
    try:
        H, W = read_size(Path(path))
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise UnusableImage(_too_large(f"more than {2 * Image.MAX_IMAGE_PIXELS}", most_pixels)) from error
        raise UnusableImage(_unreadable(path)) from error
    if H * W > most_pixels:
        raise UnusableImage(_too_large(f"{W} x {H}", most_pixels))
    try:
        return read_image(Path(path))
    except (OSError, ValueError) as error:
        raise UnusableImage(_unreadable(path)) from error


def _too_large(pixels: str, most_pixels: int) -> str:
    return (
        f"This image has {pixels} pixels, and this page takes {most_pixels / 1e6:g} million at most: make it smaller, "
        "or segment it by mask2former-hf predict, which has no such limit."
    )


def _unreadable(path: str | Path) -> str:
    return f"{Path(path).name} cannot be read as an image: it is damaged, or no image. Give a whole JPEG or PNG."


def hover_overlay(result: Segmentation, image: np.ndarray) -> str:
    """HTML of the image with its segments; the pointer over one lights it up and shows its label, score and area.

    Args:
        result: of the image.
        image: (H, W, 3) uint8 RGB.

    Raises:
        ImportError: without shapely.
    """
    step = -(-max(result.size) // SHOWN_SIDE)
    shown = result.reduced(step)
    H, W = shown.size
    whole = {segment.id: segment for segment in result.segments}
    paths, captions, rules = [], [], []
    for number, (segment, found) in enumerate(zip(shown.segments, shown.labelled_masks(), strict=True)):
        colour, text = _colour(segment, number), escape(describe(whole[segment.id]))
        paths.append(_path(number, text, colour, polygons_of(found.mask, OUTLINE_TOLERANCE), segment.box))
        captions.append(f'<span class="s{number}"><b style="background: {colour}"></b>{text}</span>')
        rules.append(f".shown:has(path.s{number}:is(:hover, :focus-visible)) span.s{number} {{ display: inline; }}")
    if result.task == "instance":
        paths.reverse()  # what is drawn last lies on top: the best
    return (
        f'<style>{STYLE}{" ".join(rules)}</style><div class="shown">'
        f'<div class="captions"><i class="point">{POINT}</i>{"".join(captions)}</div>'
        f'<svg viewBox="0 0 {W} {H}" xmlns="http://www.w3.org/2000/svg">'
        f'<image width="{W}" height="{H}" preserveAspectRatio="none" href="{_data_url(image[::step, ::step])}"/>'
        f"{''.join(paths)}</svg></div>"
    )


def _colour(segment: Segment, number: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*class_colour(segment.label_id, number % 5))


def _path(number: int, text: str, colour: str, polygons: list[Polygon], box: tuple[int, int, int, int]) -> str:
    lines = "".join(
        "M" + " ".join(f"{x:g},{y:g}" for x, y in ring + box[:2]) + "Z" for polygon in polygons for ring in polygon
    )
    drawn = f'd="{lines}" fill="{colour}" stroke="{colour}" fill-rule="evenodd"'
    return f'<path class="s{number}" tabindex="0" role="img" aria-label="{text}" {drawn}/>'


def describe(segment: Segment) -> str:
    """Label, score where there is one, and area of a segment."""
    score = "" if segment.score is None else f", score {segment.score:.2f}"
    return f"{segment.label}{score}, {segment.area} pixels"


def _data_url(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def table_rows(result: Segmentation) -> list[list]:
    """A row of `COLUMNS` for each segment; the box is left, top, right, bottom."""
    return [
        [s.id, s.label, "" if s.score is None else round(s.score, 3), s.area, ", ".join(map(str, s.box))]
        for s in result.segments
    ]


def track_rows(tracks: Iterable[Mapping], id2label: Mapping[int, str]) -> list[list]:
    """A row of `TRACK_COLUMNS` for each object of a video that has a pixel; frames are counted from 0.

    Args:
        tracks: of `video_results.TrackCollector`.
        id2label: names of the classes.
    """
    rows = []
    for track in tracks:
        frames = [number for number, code in enumerate(track["segmentations"]) if code is not None]
        if frames:
            label, score = id2label[track["category_id"]], round(track["score"], 3)
            rows.append([track["id"], label, score, frames[0], frames[-1]])
    return rows


def write_downloads(folder: str | Path, result: Segmentation, image: np.ndarray) -> list[Path]:
    """Write the result as a picture, as COCO's json, GeoJSON and labelme's json, beside the image that they name.

    Args:
        folder: that exists.
        result: of the image.
        image: (H, W, 3) uint8 RGB.

    Raises:
        ImportError: without shapely.
    """
    folder = Path(folder)
    Image.fromarray(image).save(folder / IMAGE_FILE)
    result.plot(image).save(folder / "segments.png")
    files = {
        "coco.json": coco_file(result),
        "segments.geojson": result.to_geojson(),
        "labelme.json": result.to_labelme(IMAGE_FILE),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return [folder / name for name in ("segments.png", *files, IMAGE_FILE)]


def coco_file(result: Segmentation) -> dict:
    """A file of COCO's annotations with one image, as readers of data sets take it."""
    H, W = result.size
    annotations = [
        {"id": number, "iscrowd": 0, **entry} for number, entry in enumerate(result.to_coco(image_id=1), start=1)
    ]
    return {
        "images": [{"id": 1, "file_name": IMAGE_FILE, "height": H, "width": W}],
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in sorted(result.id2label.items())],
    }


def message(text: str) -> str:
    """HTML that stands in the overlay's place where there is no result."""
    return f'<p class="message" role="alert">{escape(text)}</p>'
