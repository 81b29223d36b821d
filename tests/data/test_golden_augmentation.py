"""Recorded draws give the images and maps of the original's mappers."""

import json

import numpy as np
import pytest
from helpers import GOLDEN, SHARED, needs_golden
from PIL import Image

from mask2former_hf.data.augmentation import (
    BACKGROUND_ID,
    DropEmptySegments,
    replay,
)
from mask2former_hf.data.example import Example

SAMPLES = SHARED / "data" / "coco_panoptic_samples" / "panopticapi_sample_data"


def golden_records():
    """Recorded transforms of the original in our names; the mappers draw flip, resize, crop and pad."""
    for case in json.loads((GOLDEN / "dataset_mappers" / "info.json").read_text()):
        semantic = case["case"].startswith("sem")
        record = []
        for step in case["transforms"]:
            if step["type"] == "HFlipTransform":
                record.append(["HorizontalFlip", {"flip": True}])
            elif step["type"] == "ResizeTransform":
                size = {"height": step["new_h"], "width": step["new_w"]}
                record.append(["ResizeShortestEdge", {**size, "nearest": "corner" if semantic else "centre"}])
            elif step["type"] == "CropTransform":
                place = {"top": int(step["y0"]), "left": int(step["x0"]), "height": step["h"], "width": step["w"]}
                record.append(["RandomCrop", place])
        side = 192 if semantic else 256
        padding = {"height": side, "width": side, "padding_id": 0 if semantic else BACKGROUND_ID}
        yield case["case"], case["file"], [*record, ["PadTo", padding]]


@needs_golden
@pytest.mark.skipif(not SAMPLES.is_dir(), reason="images of the golden mappers (../shared/data) not found")
def test_recorded_draws_give_the_original_mappers_images_masks_and_classes():
    arrays = np.load(GOLDEN / "dataset_mappers" / "mappers.npz")
    annotations = json.loads((SAMPLES / "panoptic_examples.json").read_text())["annotations"]
    contiguous = {c["id"]: c["index"] for c in golden_classes()}
    cases = list(golden_records())
    assert len(cases) == 6
    for case, file, record in cases:
        image = np.asarray(Image.open(SAMPLES / "input_images" / f"{file}.jpg").convert("RGB"))
        if case.startswith("sem"):
            labels = np.asarray(Image.open(GOLDEN / "dataset_mappers" / "sem" / f"{file}.png")).astype(np.int32)
            ids = np.where(labels == 255, 0, labels + 1).astype(np.int32)
            segments = [{"id": i, "category_id": i - 1} for i in range(1, 256)]
        else:
            ids = np.asarray(Image.open(SAMPLES / "panoptic_examples" / f"{file}.png").convert("RGB"))
            ids = (ids.astype(np.int32) * [1, 256, 256**2]).sum(-1).astype(np.int32)
            segments = next(a for a in annotations if a["image_id"] == int(file))["segments_info"]
            segments = [{**s, "category_id": contiguous[s["category_id"]]} for s in segments if not s["iscrowd"]]
        result = replay(Example(image, ids, segments), record)
        assert np.array_equal(result.image, arrays[f"{case}.image"].transpose(1, 2, 0))
        if case.startswith("sem"):
            labels = np.where(result.segmentation == 0, 255, result.segmentation - 1)
            assert np.array_equal(labels, arrays[f"{case}.sem_seg"])
            result = DropEmptySegments.apply(result, {})
        else:
            masks = np.stack([result.segmentation == s["id"] for s in result.segments])
            assert np.array_equal(np.packbits(masks.reshape(len(masks), -1), axis=1), arrays[f"{case}.masks"])
        classes = [segment["category_id"] for segment in result.segments]
        assert classes == arrays[f"{case}.classes"].tolist()


def golden_classes():
    categories = json.loads((SAMPLES / "panoptic_examples.json").read_text())["categories"]
    things_first = sorted(categories, key=lambda category: (not category["isthing"], category["id"]))
    return [{**category, "index": index} for index, category in enumerate(things_first)]
