"""What the page in the browser shows of a result, and the files that it offers. Neither Gradio nor torch."""

import base64
import io
import json
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
STYLE = """
.segments { width: 100%; max-height: 80vh; display: block; }
.segments path { fill-opacity: 0.5; stroke-width: 1.5; vector-effect: non-scaling-stroke; cursor: help; }
.segments path:hover { fill-opacity: 0.85; stroke: #ffffff; }
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
    """HTML of the image with its segments; the pointer over one shows its label, score and area.

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
    paths = [
        _path(whole[segment.id], number, polygons_of(found.mask, OUTLINE_TOLERANCE), segment.box)
        for number, (segment, found) in enumerate(zip(shown.segments, shown.labelled_masks(), strict=True))
    ]
    if result.task == "instance":
        paths.reverse()  # what is drawn last lies on top: the best
    return (
        f'<style>{STYLE}</style><svg class="segments" viewBox="0 0 {W} {H}" xmlns="http://www.w3.org/2000/svg">'
        f'<image width="{W}" height="{H}" preserveAspectRatio="none" href="{_data_url(image[::step, ::step])}"/>'
        f"{''.join(paths)}</svg>"
    )


def _path(segment: Segment, number: int, polygons: list[Polygon], box: tuple[int, int, int, int]) -> str:
    colour = "#{:02x}{:02x}{:02x}".format(*class_colour(segment.label_id, number % 5))
    lines = "".join(
        "M" + " ".join(f"{x:g},{y:g}" for x, y in ring + box[:2]) + "Z" for polygon in polygons for ring in polygon
    )
    title = f"<title>{escape(describe(segment))}</title>"
    return f'<path d="{lines}" fill="{colour}" stroke="{colour}" fill-rule="evenodd">{title}</path>'


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
