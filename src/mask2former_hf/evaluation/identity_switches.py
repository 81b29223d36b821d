"""How often an object's id changes in a video: CLEAR MOT's count (Bernardin and Stiefelhagen, 2008), by masks."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data.rle import coco_tools, to_rle


class IdentitySwitches:
    """Follows the true objects of videos and counts by which ids they were found.

    In every frame an object that is still found by the id of the frame before keeps it; the others are assigned so
    that overlaps sum up to the most. A switch is an object that is found by another id than the last time.

    Args:
        overlap: mask IoU from which on an object is found.
    """

    def __init__(self, overlap: float = 0.5):
        self.overlap = overlap
        self.switches = self.found = self.objects = 0  # objects and found: summed over frames

    def update(self, tracks: Sequence[Mapping], objects: Sequence[Mapping]):
        """One video; crowds are left out.

        Args:
            tracks: with `id` and `segmentations`, per frame an RLE or mask, or None.
            objects: with `segmentations` and maybe `iscrowd`.
        """
        objects = [thing["segmentations"] for thing in objects if not thing.get("iscrowd")]
        length = max((len(masks) for masks in [*objects, *(track["segmentations"] for track in tracks)]), default=0)
        last = {}
        for frame in range(length):
            truth = {n: to_rle(masks[frame]) for n, masks in enumerate(objects) if masks[frame] is not None}
            seen = [track for track in tracks if track["segmentations"][frame] is not None]
            self.objects += len(truth)
            if not truth or not seen:
                continue
            codes = [to_rle(track["segmentations"][frame]) for track in seen]
            numbers, ids = list(truth), [track["id"] for track in seen]
            overlaps = np.asarray(coco_tools().mask.iou(list(truth.values()), codes, [0] * len(codes)))
            overlaps = np.where(overlaps >= self.overlap, overlaps, 0)
            for n, number in enumerate(numbers):  # those that are still what they were
                if last.get(number) in ids and overlaps[n, ids.index(last[number])]:
                    overlaps[n, ids.index(last[number])] += len(numbers)
            for n, k in zip(*linear_sum_assignment(overlaps, maximize=True), strict=True):
                if overlaps[n, k]:
                    self.found += 1
                    self.switches += last.get(numbers[n], ids[k]) != ids[k]
                    last[numbers[n]] = ids[k]

    def merge(self, other: "IdentitySwitches"):
        """Add the videos of another metric, for example of another process."""
        if self.overlap != other.overlap:
            raise ValueError("other has another overlap: merge metrics that were made alike")
        for name in ("switches", "found", "objects"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> dict:
        """`switches`, a number, and `found`, the share of objects in frames that were found (nan without any)."""
        return {"switches": self.switches, "found": self.found / self.objects if self.objects else float("nan")}
