"""Data sets in the formats that this package reads besides those of tools: COCO's two, and maps."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ..json_files import write_json
from ..palette import voc_palette
from ..rle import coco_code
from .labelled_mask import LabelledMask, without_overlaps
from .writers import TOOL_WRITERS, FormatWriter, ImageFile

HIDDEN = "pixels of segments are hidden: the format has one segment at each pixel"


class CocoInstancesWriter(FormatWriter):
    """COCO's json of instances, with run lengths."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._images, self._annotations = [], []

    def add(self, image, masks):
        number = len(self._images) + 1
        self._images.append(_image_entry(number, image))
        for mask in masks:
            left, top, right, bottom = mask.box
            entry = {
                "id": len(self._annotations) + 1,
                "image_id": number,
                "category_id": mask.label_id,
                "iscrowd": int(mask.iscrowd),
                "area": mask.area,
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": coco_code(mask.runs, image.size),
            }
            self._annotations.append(entry)

    def close(self):
        content = {"images": self._images, "annotations": self._annotations, "categories": _categories(self)}
        write_json(self.root / "annotations" / f"instances_{self.split or 'train'}.json", content, indent=None)


class CocoPanopticWriter(FormatWriter):
    """COCO's panoptic json and PNGs."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._images, self._annotations = [], []

    def add(self, image, masks):
        ids, left = _on_one_map(self, masks, image)
        colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(self._file("panoptic", image, ".png"))
        number = len(self._images) + 1
        self._images.append(_image_entry(number, image))
        segments = [
            {"id": k, "category_id": mask.label_id, "iscrowd": int(mask.iscrowd), "area": mask.area}
            for k, mask in enumerate(left, start=1)
        ]
        name = f"{image.stem}.png"
        self._annotations.append({"image_id": number, "file_name": name, "segments_info": segments})

    def close(self):
        content = {"images": self._images, "annotations": self._annotations, "categories": _categories(self)}
        write_json(self.root / "annotations" / f"panoptic_{self.split or 'train'}.json", content, indent=None)


class LabelMapsWriter(FormatWriter):
    """A PNG of class numbers per image, and `classes.json`; what no segment has is void."""

    folder = "labels"

    @property
    def void(self) -> int:
        """The number of pixels without a class."""
        return 255 if len(self.id2label) <= 255 else 65535

    def add(self, image, masks):
        ids, left = _on_one_map(self, masks, image)
        numbers = np.array([self.void, *(mask.label_id for mask in left)])[ids]
        self._save(numbers, self._file(self.folder, image, ".png"))

    def _save(self, numbers: np.ndarray, path: Path):
        Image.fromarray(numbers.astype(np.uint8 if self.void == 255 else np.uint16)).save(path)

    def close(self):
        write_json(self.root / "classes.json", {"classes": self.names, "void_id": self.void})


class ColourMapsWriter(LabelMapsWriter):
    """An RGB PNG per image in VOC's palette, void black, and `classes.json` with the colours."""

    folder = "colour_labels"

    @property
    def void(self) -> int:
        return len(self.id2label)

    @property
    def _colours(self) -> np.ndarray:
        return np.roll(voc_palette(len(self.id2label) + 1), -1, axis=0)  # black, the first, to the end, for void

    def _save(self, numbers, path):
        Image.fromarray(self._colours[numbers]).save(path)

    def close(self):
        content = {"classes": self.names, "void_id": self.void, "colors": self._colours.tolist()}
        write_json(self.root / "classes.json", content)


class InstanceMapsWriter(FormatWriter):
    """A PNG of object numbers per image, of one class."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if len(self.id2label) != 1:
            raise ValueError(
                f"{len(self.id2label)} classes: a map of object numbers says no class; choose coco-instances, or keep "
                "one class"
            )

    def add(self, image, masks):
        ids, _ = _on_one_map(self, self.without_crowds(masks), image)
        Image.fromarray(ids.astype(np.uint16)).save(self._file("instance_labels", image, ".png"))


WRITERS = {
    "coco-panoptic": CocoPanopticWriter,
    "coco-instances": CocoInstancesWriter,
    "label-maps": LabelMapsWriter,
    "instance-maps": InstanceMapsWriter,
    "colour-maps": ColourMapsWriter,
    **TOOL_WRITERS,
}


def _on_one_map(writer: FormatWriter, masks: Iterable[LabelledMask], image: ImageFile):
    """`without_overlaps`, counting what is hidden."""
    masks = list(masks)
    ids, left = without_overlaps(masks, image.size)
    writer.lost[HIDDEN] += sum(mask.area for mask in masks) - int(np.count_nonzero(ids))
    return ids, left


def _image_entry(number: int, image: ImageFile) -> dict:
    height, width = image.size
    return {"id": number, "file_name": image.name, "height": height, "width": width}


def _categories(writer: FormatWriter) -> list[dict]:
    return [
        {"id": index, "name": name, "isthing": int(index not in writer.stuff_label_ids)}
        for index, name in sorted(writer.id2label.items())
    ]
