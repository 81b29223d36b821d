"""The result of segmenting an image: what every door of the package gives. NumPy and Pillow alone, no torch."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.formats import geojson, label_studio, labelme, libraries, parquet, yolo
from ..data.formats.labelled_mask import LabelledMask
from ..data.georeference import Georeference
from ..data.images import read_image
from ..model.run_lengths import masks_to_coco_rle


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

    Args:
        task: "panoptic", "instance" or "semantic".
        map: (H, W) int32 ids of segments. Panoptic: 0 is void. Instances: the best one at each pixel, 0 where there is
            none. Semantic: labels.
        segments: instances best first, panoptic segments in the order of their ids, semantic ones by label.
        id2label: names of all classes of the checkpoint.
        stuff_label_ids: classes that are stuff.
        overlapping: (N, H, W) bool masks of instances, which may overlap; None where the map says everything.
    """

    task: str
    map: np.ndarray
    segments: tuple[Segment, ...]
    id2label: Mapping[int, str] = field(repr=False)
    stuff_label_ids: tuple[int, ...] = field(default=(), repr=False)
    overlapping: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self):
        for array in (self.map, self.overlapping):
            if array is not None:
                array.flags.writeable = False

    def __repr__(self):
        found = ", ".join(f"{s.label}" if s.score is None else f"{s.label} {s.score:.2f}" for s in self.segments[:5])
        more = ", ..." if len(self.segments) > 5 else ""
        return (
            f"Segmentation({self.task}, {self.size[0]}x{self.size[1]}, {len(self.segments)} segments: {found}{more})"
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in pixels."""
        return self.map.shape

    @property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool, in the order of `segments`; made anew at every use, except those of instances."""
        if self.overlapping is not None:
            return self.overlapping
        ids = np.array([segment.id for segment in self.segments], dtype=self.map.dtype)
        return self.map == ids[:, None, None]

    def plot(self, image=None) -> Image.Image:
        """A picture with coloured segments and their names.

        Args:
            image: what was segmented: PIL, a path, or an array as `data.images.to_rgb` takes it; a grey ground by
                default.
        """
        from .drawing import draw_segmentation

        if isinstance(image, str | os.PathLike):
            image = read_image(Path(image))
        return draw_segmentation(self, image)

    def to_coco(self, image_id: int | str | None = None) -> list[dict]:
        """COCO's result entries: `category_id`, `score`, `bbox` (left, top, width, height), `area`, `segmentation`.

        `segmentation` is a compressed run-length code with text, so that the list goes into json and pycocotools.

        Args:
            image_id: written into every entry if given.
        """
        first = {} if image_id is None else {"image_id": image_id}
        return [
            {**first, **self._entry(segment), "segmentation": code}
            for segment, code in zip(self.segments, masks_to_coco_rle(self.masks), strict=True)
        ]

    def to_coco_panoptic(self) -> tuple[Image.Image, list[dict]]:
        """COCO's panoptic form: the image whose colour is the segment's id, R + 256 G + 65536 B, and `segments_info`.

        Raises:
            ValueError: unless the result is panoptic.
        """
        if self.task != "panoptic":
            raise ValueError(f"task={self.task!r}: only panoptic results have COCO's panoptic form; use to_coco()")
        colours = np.stack([self.map & 255, self.map >> 8 & 255, self.map >> 16 & 255], axis=-1).astype(np.uint8)
        return Image.fromarray(colours), [{"id": segment.id, **self._entry(segment)} for segment in self.segments]

    def labelled_masks(self) -> Iterator[LabelledMask]:
        """What writers of other formats take: each segment with its name, cut out of the image."""
        for number, segment in enumerate(self.segments):
            left, top, right, bottom = segment.box
            window = np.s_[top:bottom, left:right]
            mask = self.map[window] == segment.id if self.overlapping is None else self.overlapping[number][window]
            isthing = segment.label_id not in self.stuff_label_ids
            yield LabelledMask(segment.label_id, segment.label, mask, segment.box, segment.score, isthing)

    def to_geojson(self, tolerance: float = 0.0, georeference: Georeference | None = None) -> dict:
        """A FeatureCollection for QuPath, or with a georeference for GIS; see `data.formats.geojson`.

        Args:
            tolerance: 0 for outlines on the edges of pixels; above, they are simplified by less than so many pixels.
            georeference: `data.georeference.read_georeference` of the image's file; None for pixels.
        """
        return geojson.feature_collection(self.labelled_masks(), tolerance, georeference)

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
        return parquet.rows(self.labelled_masks(), self.size, image_id, file_name)

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
    segments = list(segments)
    boxes = boxes_of_map(ids, [segment["id"] for segment in segments])
    found = tuple(
        Segment(s["id"], s["label_id"], id2label[s["label_id"]], s["score"], s["area"], box)
        for s, box in zip(segments, boxes, strict=True)
    )
    return Segmentation("panoptic", ids, found, id2label, tuple(stuff_label_ids))


def instance_result(ids, masks, scores, labels, boxes, id2label, stuff_label_ids=()) -> Segmentation:
    """From an (H, W) map of positions + 1, and N masks, scores, labels and (x0, y0, x1, y1) boxes."""
    areas = masks.sum((1, 2)).tolist()
    rows = zip(labels, scores, areas, boxes, strict=True)
    found = tuple(
        Segment(n, label, id2label[label], score, area, tuple(int(side) for side in box))
        for n, (label, score, area, box) in enumerate(rows, start=1)
    )
    return Segmentation("instance", ids, found, id2label, tuple(stuff_label_ids), masks)


def semantic_result(labels: np.ndarray, id2label, stuff_label_ids=()) -> Segmentation:
    """From an (H, W) map of labels."""
    areas = np.bincount(labels.ravel())
    present = np.flatnonzero(areas).tolist()
    found = tuple(
        Segment(label, label, id2label[label], None, int(areas[label]), box)
        for label, box in zip(present, boxes_of_map(labels, present), strict=True)
    )
    return Segmentation("semantic", labels, found, id2label, tuple(stuff_label_ids))


def boxes_of_map(ids: np.ndarray, wanted: list[int]) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom), exclusive right and bottom, of wanted ids of an (H, W) map; zeros if absent."""
    if not wanted:
        return []
    H, W = ids.shape
    columns, rows = np.zeros((max(wanted) + 1, W), bool), np.zeros((max(wanted) + 1, H), bool)
    known = np.where((ids >= 0) & (ids <= max(wanted)), ids, 0)  # what is not wanted may fall into row 0 ...
    columns[known, np.arange(W)] = True
    rows[known, np.arange(H)[:, None]] = True
    if 0 in wanted:  # ... unless it is
        columns[0], rows[0] = (ids == 0).any(0), (ids == 0).any(1)
    boxes = []
    for number in wanted:
        sides = [np.flatnonzero(used[number]) for used in (columns, rows)]
        if not sides[0].size:
            boxes.append((0, 0, 0, 0))
            continue
        (left, right), (top, bottom) = ((int(side[0]), int(side[-1]) + 1) for side in sides)
        boxes.append((left, top, right, bottom))
    return boxes
