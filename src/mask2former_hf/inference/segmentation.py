"""The result of segmenting an image: what every door of the package gives. NumPy and Pillow alone, no torch."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.formats import geojson, label_studio, labelme, libraries, parquet, yolo
from ..data.formats.labelled_mask import LabelledMask
from ..data.georeference import Georeference
from ..data.pictures import read_picture, to_picture
from ..data.rle import coco_code
from ..data.runs import NOTHING, Runs, paint, runs_of_map, visible
from ..data.windows import ImageWindows

LARGEST_PICTURE = 4096  # pixels of the longer side; drawing one takes 0.3 GB


@dataclass(frozen=True)
class Segment:
    """One object, or all pixels of a class of stuff.

    Args:
        id: its number in the map. In semantic results it is the label's number.
        label_id: number of its class.
        label: name of its class.
        score: in [0, 1]; None in semantic results, which have none.
        area: pixels that belong to it.
        box: (left, top, right, bottom) in pixels, the last two exclusive.
    """

    id: int
    label_id: int
    label: str
    score: float | None
    area: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Segments of one image, at the image's own size. It cannot be changed.

    Masks are held as runs of pixels: thousands of objects in an image of any size cost no more than their outlines.

    Args:
        task: "panoptic", "instance" or "semantic".
        size: (height, width) of the image in pixels.
        segments: instances best first, panoptic segments in the order of their ids, semantic ones by label.
        runs: the mask of each segment; those of instances may overlap.
        id2label: names of all classes of the checkpoint.
        stuff_label_ids: classes that are stuff.
        georeference: of an image that was read from a georeferenced file.
    """

    task: str
    size: tuple[int, int]
    segments: tuple[Segment, ...]
    runs: tuple[Runs, ...] = field(repr=False)
    id2label: Mapping[int, str] = field(repr=False)
    stuff_label_ids: tuple[int, ...] = field(default=(), repr=False)
    georeference: Georeference | None = field(default=None, repr=False)

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without the painted map

    def __repr__(self):
        found = ", ".join(f"{s.label}" if s.score is None else f"{s.label} {s.score:.2f}" for s in self.segments[:5])
        more = ", ..." if len(self.segments) > 5 else ""
        return (
            f"Segmentation({self.task}, {self.size[0]}x{self.size[1]}, {len(self.segments)} segments: {found}{more})"
        )

    @cached_property
    def map(self) -> np.ndarray:
        """(H, W) int32 ids of segments, painted at the first use.

        Panoptic: 0 is void. Instances: the best one at each pixel, 0 where there is none. Semantic: labels.
        """
        seen = visible(self.runs) if self.task == "instance" else self.runs
        ids = paint(self.size, seen, [segment.id for segment in self.segments])
        ids.flags.writeable = False
        return ids

    @property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool, in the order of `segments`; made anew at every use, see `runs` for large images."""
        masks = np.zeros((len(self.segments), *self.size), dtype=bool)
        for mask, segment, runs in zip(masks, self.segments, self.runs, strict=True):
            left, top, right, bottom = segment.box
            mask[top:bottom, left:right] = runs.crop(segment.box)
        return masks

    def reduced(self, step: int) -> "Segmentation":
        """Every step-th row and column of it; segments without a pixel there are left out."""
        if step < 1:
            raise ValueError(f"step={step!r}: must be at least 1")
        smaller = [(segment, runs.every(step)) for segment, runs in zip(self.segments, self.runs, strict=True)]
        smaller = [(replace(s, area=runs.area, box=runs.box), runs) for s, runs in smaller if len(runs.starts)]
        segments, runs = zip(*smaller, strict=True) if smaller else ((), ())
        size = tuple(-(-side // step) for side in self.size)
        return replace(self, size=size, segments=segments, runs=runs, georeference=None)

    def plot(self, image=None, show_bands: Sequence[int] | None = None) -> Image.Image:
        """A picture with coloured segments and their names; of every second, third ... pixel if the image is large.

        Args:
            image: what was segmented: PIL, a path, an array as `data.images.to_rgb` takes it or of bands, or
                `data.windows.ImageWindows`; a grey ground by default.
            show_bands: of an image of bands, three for red, green and blue, or one, counted from 1; by default the
                first three (`data.pictures.picture`).
        """
        from .drawing import draw_segmentation

        if isinstance(image, str | os.PathLike):
            image = read_picture(Path(image), show_bands)
            show_bands = None
        step, (H, W) = -(-max(self.size) // LARGEST_PICTURE), self.size
        if isinstance(image, ImageWindows):
            image = to_picture(image.read((0, 0, W, H), step), show_bands)
        elif image is not None:
            image = to_picture(image, show_bands)[::step, ::step]
        return draw_segmentation(self.reduced(step) if step > 1 else self, image)

    def to_coco(self, image_id: int | str | None = None) -> list[dict]:
        """COCO's result entries: `category_id`, `score`, `bbox` (left, top, width, height), `area`, `segmentation`.

        `segmentation` is a compressed run-length code with text, so that the list goes into json and pycocotools.

        Args:
            image_id: written into every entry if given.
        """
        first = {} if image_id is None else {"image_id": image_id}
        return [
            {**first, **self._entry(segment), "segmentation": code}
            for segment, code in zip(self.segments, (coco_code(runs, self.size) for runs in self.runs), strict=True)
        ]

    def to_coco_panoptic(self) -> tuple[Image.Image, list[dict]]:
        """COCO's panoptic form: the image whose colour is the segment's id, R + 256 G + 65536 B, and `segments_info`.

        Raises:
            ValueError: unless the result is panoptic.
        """
        if self.task != "panoptic":
            raise ValueError(f"task={self.task!r}: only panoptic results have COCO's panoptic form; use to_coco()")
        digits = self.map.astype("<i4", copy=False).view(np.uint8).reshape(*self.size, 4)  # base 256, lowest first
        picture = Image.fromarray(np.ascontiguousarray(digits[..., :3]))
        return picture, [{"id": segment.id, **self._entry(segment)} for segment in self.segments]

    def labelled_masks(self) -> Iterator[LabelledMask]:
        """What writers of other formats take: each segment with its name, cut out of the image."""
        for segment, runs in zip(self.segments, self.runs, strict=True):
            isthing = segment.label_id not in self.stuff_label_ids
            mask = runs.crop(segment.box)
            yield LabelledMask(segment.label_id, segment.label, mask, segment.box, segment.score, isthing)

    def to_geojson(self, tolerance: float = 0.0, georeference: Georeference | None = None) -> dict:
        """A FeatureCollection for QuPath, or with a georeference for GIS; see `data.formats.geojson`.

        Args:
            tolerance: 0 for outlines on the edges of pixels; above, they are simplified by less than so many pixels.
            georeference: `data.georeference.read_georeference` of the image's file; None for the result's own, and
                for pixels if it has none.
        """
        return geojson.feature_collection(self.labelled_masks(), tolerance, georeference or self.georeference)

    def to_yolo(self, tolerance: float = 0.0) -> str:
        """The lines of a label file of YOLO segmentation; `tolerance` as in `to_geojson`."""
        return yolo.label_lines(self.labelled_masks(), self.size, tolerance)

    def to_labelme(self, image_path: str, tolerance: float = 0.0) -> dict:
        """labelme's json; `image_path` leads from its folder to the image, `tolerance` as in `to_geojson`."""
        return labelme.labelme_json(self.labelled_masks(), self.size, image_path, tolerance)

    def to_label_studio(self, image: str, model_version: str = "mask2former") -> dict:
        """A task of Label Studio with predictions as brush labels; `image` is its address for the browser."""
        return label_studio.task(self.labelled_masks(), self.size, image, model_version)

    def to_rows(self, image_id: int | str, file_name: str) -> list[dict]:
        """A row per segment with COCO's run lengths, for tables such as Parquet; see `data.formats.parquet`."""
        found = zip(self.labelled_masks(), self.runs, strict=True)
        codes = ((mask, coco_code(runs, self.size)["counts"]) for mask, runs in found)
        return [parquet.row(mask, self.size, image_id, file_name, counts) for mask, counts in codes]

    def to_supervision(self):
        """`supervision.Detections`."""
        return libraries.supervision_detections(list(self.labelled_masks()), self.size)

    def to_fiftyone(self):
        """`fiftyone.Detections`."""
        return libraries.fiftyone_detections(list(self.labelled_masks()), self.size)

    def _entry(self, segment: Segment) -> dict:
        left, top, right, bottom = segment.box
        entry = {
            "category_id": segment.label_id,
            "area": segment.area,
            "bbox": [left, top, right - left, bottom - top],
        }
        return entry if segment.score is None else {**entry, "score": segment.score}


def panoptic_result(ids: np.ndarray, segments: Iterable[Mapping], id2label, stuff_label_ids=()) -> Segmentation:
    """From an (H, W) map with 0 for void, and the dicts of `postprocessing.panoptic_segmentation`."""
    runs = runs_of_map(ids)
    rows = [(s["id"], s["label_id"], s["score"], runs.get(s["id"], NOTHING)) for s in segments]
    return result_of_runs("panoptic", ids.shape, rows, id2label, stuff_label_ids)


def instance_result(masks: np.ndarray, scores, labels, id2label, stuff_label_ids=(), boxes=None) -> Segmentation:
    """From (N, H, W) bool masks, scores and labels, best first.

    Args:
        boxes: (left, top, right, bottom) of each mask, outside of which no pixel is looked at.
    """
    boxes = [(0, 0, *masks.shape[:0:-1])] * len(masks) if boxes is None else boxes
    rows = [
        (number, label, score, Runs.of_mask(mask[top:bottom, left:right]).moved(left, top))
        for number, (label, score, mask, (left, top, right, bottom)) in enumerate(
            zip(labels, scores, masks, boxes, strict=True), start=1
        )
    ]
    return result_of_runs("instance", masks.shape[1:], rows, id2label, stuff_label_ids)


def semantic_result(labels: np.ndarray, id2label, stuff_label_ids=()) -> Segmentation:
    """From an (H, W) map of labels."""
    rows = [(number - 1, number - 1, None, runs) for number, runs in runs_of_map(labels + 1).items()]  # 0 is a label
    return result_of_runs("semantic", labels.shape, rows, id2label, stuff_label_ids)


def result_of_runs(task: str, size, rows, id2label, stuff_label_ids=(), georeference=None) -> Segmentation:
    """From id, label, score and runs of every segment."""
    rows = list(rows)
    segments = tuple(
        Segment(number, label, id2label[label], score, runs.area, runs.box) for number, label, score, runs in rows
    )
    return Segmentation(
        task, tuple(size), segments, tuple(row[-1] for row in rows), id2label, tuple(stuff_label_ids), georeference
    )
