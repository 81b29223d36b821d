"""Average precision of masks or boxes by COCO's rules; of an image only the matches are kept."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.rle import coco_tools, encode_masks, to_numpy, to_rle
from ..data.text_files import read_json
from .coco_matching import Matches, best_of_class, checked_limits, curves_of, match, summary

IOU_TYPES = ("segm", "bbox", "boundary")


class AveragePrecision:
    """Matches the detections of an image with its true objects, and keeps which of them hit; masks are not kept.

    The truth comes with every image, or from one COCO json (`from_coco`), which is kept. Pickle the object to send it
    to another process; the result does not depend on the order of updates and merges. Alone among the metrics its
    state grows with the images, by 22 bytes a detection: 3 kB for an image of 100.

    Args:
        categories: class id -> `{"name", ...}`.
        iou_type: "segm" compares masks, "bbox" boxes, "boundary" takes the smaller one of the masks' IoU and their
            boundaries' (Cheng et al., CVPR 2021), which needs faster-coco-eval.
        max_detections: rising numbers n; only the n best detections of a class count in an image, the largest n for
            AP, each n for its AR.

    Raises:
        ValueError: for an unknown `iou_type` and for `max_detections` that do not rise.
        ImportError: without a COCO package, and for "boundary" without faster-coco-eval.
    """

    def __init__(
        self,
        categories: Mapping[int, Mapping],
        iou_type: str = "segm",
        max_detections: Sequence[int] = (1, 10, 100),
    ):
        has_boundary = coco_tools().has_boundary  # now, and not after the first images
        if iou_type not in IOU_TYPES:
            raise ValueError(f"iou_type={iou_type!r}: must be one of {IOU_TYPES}")
        if iou_type == "boundary" and not has_boundary:
            raise ImportError("iou_type='boundary' is not in pycocotools: pip install faster-coco-eval")
        self.max_detections = checked_limits(max_detections)
        self.categories = dict(categories)
        self.iou_type = iou_type
        self.matches: dict[Hashable, Matches] = {}
        self.truth: dict[Hashable, list[dict]] = {}  # of a COCO json
        self.sizes: dict[Hashable, list[int]] = {}
        self._row = {category: row for row, category in enumerate(self.categories)}
        self._truth_is_given = False

    @classmethod
    def from_coco(
        cls,
        annotations: Mapping | str | Path,
        iou_type: str = "segm",
        max_detections: Sequence[int] = (1, 10, 100),
    ) -> "AveragePrecision":
        """A metric whose truth is a COCO instances json: `update` then takes no segments.

        As in the official evaluation all images of the json count, those that are never updated as images without
        predictions.

        Args:
            annotations: the json's content or its path.
        """
        if not isinstance(annotations, Mapping):
            annotations = read_json(Path(annotations))
        metric = cls({c["id"]: c for c in annotations["categories"]}, iou_type, max_detections)
        metric._truth_is_given = True
        for image in annotations["images"]:
            metric.truth[image["id"]] = []
            metric.sizes[image["id"]] = [image["height"], image["width"]]
        for annotation in annotations["annotations"]:
            image_id = annotation["image_id"]
            if image_id not in metric.truth:
                raise ValueError(f"annotation {annotation.get('id')} is of image {image_id!r}, which images lacks")
            metric.truth[image_id].append(metric._true_record(annotation, image_id))
        return metric

    def update(
        self,
        masks,
        scores,
        labels,
        segments: Iterable[Mapping] | None = None,
        *,
        image_id: Hashable,
        areas: Sequence[float] | None = None,
    ):
        """Count one image; images without predictions and without truth count as well.

        Args:
            masks: (N, H, W) bool or N RLEs; for boxes alternatively (N, 4) as COCO's (x, y, width, height) in pixels.
            scores: (N,) confidences.
            labels: (N,) class ids as in `categories`.
            segments: the truth, a mapping per object with `category_id`, `segmentation` (RLE or (H, W) bool mask; for
                boxes also or instead `bbox`), and optionally `iscrowd` and `area`. COCO's `area` is the polygon's and
                decides whether an object is small, medium or large; without it the mask's pixels are counted.
            image_id: any hashable that means the same in all processes.
            areas: (N,) pixels that decide whether a false positive is small, medium or large, by default the mask's or
                the box's. (A COCO package that loads a result file takes the box's for masks too if the file has one.)

        Raises:
            ValueError: for an image that was counted before, classes that are not in `categories`, masks of different
                size, unequal numbers of masks, scores and labels, and truth that is missing or given twice.
        """
        image_id = image_id.item() if hasattr(image_id, "item") else image_id
        if image_id in self.matches:
            raise ValueError(f"image_id={image_id!r} was counted before: update once per image")
        if self._truth_is_given and segments is not None:
            raise ValueError("segments: this metric has its truth from a COCO json; pass segments=None")
        if self._truth_is_given and image_id not in self.truth:
            raise ValueError(f"image_id={image_id!r} is not in the COCO json's images: pass the id that it has there")
        if not self._truth_is_given and segments is None:
            raise ValueError("segments=None: pass the image's true objects, or make the metric with `from_coco`")
        try:
            if self._truth_is_given:
                truth = self.truth[image_id]
            else:
                truth = [self._true_record(segment, image_id) for segment in segments]
            records = self._predicted_records(masks, to_numpy(scores), to_numpy(labels), areas, image_id)
        finally:
            if not self._truth_is_given:
                self.sizes.pop(image_id, None)
        self.matches[image_id] = self._match(records, truth)

    def merge(self, other: "AveragePrecision"):
        """Add the images of another metric, for example of another process."""
        for name in ("categories", "iou_type", "max_detections", "_truth_is_given"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other has another {name.strip('_')}: merge metrics that were made alike")
        twice = sorted(map(repr, self.matches.keys() & other.matches.keys()))
        if twice:
            raise ValueError(
                f"{len(twice)} images were counted in both metrics, for example {', '.join(twice[:3])}: give each "
                "image to one process (samplers that pad the last batch repeat images)"
            )
        if self._truth_is_given and self.truth.keys() != other.truth.keys():
            raise ValueError("other was made from a COCO json with other images: merge metrics of the same json")
        self.matches.update(other.matches)

    def compute(self) -> dict:
        """COCO's figures in [0, 1], nan where there is no such object in the truth (the COCO packages print -1).

        Returns:
            `{"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl", "per_class": {id:
            {"name", "AP", "AP50", "APs", "APm", "APl"}}}`, where AR's numbers are `max_detections`.
        """
        return summary(self._all_matches(), self.categories, self.max_detections)

    def precision_at_recalls(self) -> np.ndarray:
        """(T, R, K, A) precision at `coco_matching.THRESHOLDS` and `RECALLS`, by class and area, of which AP is the
        mean; nan where no object counts."""
        return curves_of(self._all_matches(), len(self.categories), self.max_detections)[0]

    def _all_matches(self) -> dict[Hashable, Matches]:
        return {image_id: self._match([], truth) for image_id, truth in self.truth.items()} | self.matches

    def _match(self, detections: list[dict], truth: list[dict]) -> Matches:
        return match(
            *(np.array([d[name] for d in detections]) for name in ("category_id", "score", "area")),
            *(np.array([g[name] for g in truth]) for name in ("category_id", "area")),
            np.array([g["iscrowd"] for g in truth], dtype=bool),
            self._ious(detections, truth),
        )

    def _ious(self, detections: list[dict], truth: list[dict]) -> np.ndarray:
        """(D, G) by the COCO package, 0 where the classes differ; with a crowd, the part of the detection inside."""
        mask, ious = coco_tools().mask, np.zeros((len(detections), len(truth)))
        labels, true_labels = (np.array([r["category_id"] for r in records]) for records in (detections, truth))
        crowds = np.array([g["iscrowd"] for g in truth])
        for label in np.intersect1d(labels, true_labels):
            rows, columns = np.flatnonzero(labels == label), np.flatnonzero(true_labels == label)
            regions = [[detections[d]["region"] for d in rows], [truth[g]["region"] for g in columns]]
            own = np.asarray(mask.iou(*regions, crowds[columns].tolist()))
            if self.iou_type == "boundary":
                outlines = [[mask.rleToBoundary(rle) for rle in side] for side in regions]
                near = np.asarray(mask.iou(*outlines, crowds[columns].tolist()))
                own = np.where(crowds[columns], own, np.minimum(own, near))
            ious[np.ix_(rows, columns)] = own
        return ious

    def _true_record(self, segment: Mapping, image_id: Hashable) -> dict:
        category = segment["category_id"]
        if category not in self._row:
            raise ValueError(
                f"segments has category_id {category} in image {image_id!r}: known are {sorted(self._row)}"
            )
        rle = None
        if "segmentation" in segment and (self.iou_type != "bbox" or "bbox" not in segment or "area" not in segment):
            rle = self._check_size(to_rle(segment["segmentation"], self.sizes.get(image_id)), image_id)
        record = self._record(rle, segment.get("bbox"))
        if segment.get("area") is not None:
            record["area"] = float(segment["area"])
        elif rle is not None:
            record["area"] = float(coco_tools().mask.area([rle])[0])
        return {**record, "category_id": self._row[category], "iscrowd": int(segment.get("iscrowd", 0))}

    def _predicted_records(self, masks, scores, labels, areas, image_id: Hashable) -> list[dict]:
        if not len(masks) == len(scores) == len(labels) or scores.ndim != 1 or labels.ndim != 1:
            raise ValueError(
                f"image {image_id!r} has {len(masks)} masks, scores of shape {scores.shape} and labels of shape "
                f"{labels.shape}: each mask needs one score and one label"
            )
        if not np.isfinite(scores.astype(np.float64)).all():
            raise ValueError(f"scores of image {image_id!r} has nan or infinite values: a confidence must be finite")
        unknown = sorted(set(labels.tolist()) - set(self._row))
        if unknown:
            raise ValueError(f"labels has the classes {unknown} in image {image_id!r}: known are {sorted(self._row)}")
        if areas is not None and len(areas) != len(masks):
            raise ValueError(
                f"areas has {len(areas)} values for {len(masks)} masks in image {image_id!r}: one is needed each"
            )
        kept = best_of_class(scores, labels.tolist(), self.max_detections[-1])
        records = self._regions(masks, kept, image_id) if kept else []
        for record, index in zip(records, kept, strict=True):
            record |= {"category_id": self._row[labels[index].item()], "score": float(scores[index])}
            if areas is not None:
                record["area"] = float(areas[index])
        return records

    def _regions(self, masks, kept: list[int], image_id: Hashable) -> list[dict]:
        if isinstance(masks, Sequence) and (isinstance(masks[0], Mapping) or np.ndim(masks[0]) == 2):
            rles = [to_rle(masks[index]) for index in kept]
        elif self.iou_type == "bbox" and np.ndim(masks) == 2:
            return [self._record(None, box) for box in to_numpy(masks)[kept]]
        else:
            rles = encode_masks(to_numpy(masks[kept] if hasattr(masks, "shape") else np.asarray(masks)[kept]))
        return [self._record(self._check_size(rle, image_id)) for rle in rles]

    def _record(self, rle: dict | None, box=None) -> dict:
        """What the COCO packages compare, with the area of it in pixels."""
        if self.iou_type != "bbox":
            if rle is None:
                raise ValueError("segments has no segmentation: an RLE or an (H, W) bool mask per object is needed")
            return {"region": rle, "area": float(coco_tools().mask.area([rle])[0])}
        if box is None and rle is None:
            raise ValueError("segments has neither bbox nor segmentation: one of them per object is needed")
        x, y, width, height = map(float, coco_tools().mask.toBbox([rle])[0] if box is None else box)
        return {"region": [x, y, width, height], "area": width * height}

    def _check_size(self, rle: dict, image_id: Hashable) -> dict:
        size = self.sizes.setdefault(image_id, rle["size"])
        if rle["size"] != size:
            raise ValueError(
                f"image {image_id!r} has masks of {rle['size']} and of {size} (height, width): resize the predictions "
                "to the size of the truth"
            )
        return rle
