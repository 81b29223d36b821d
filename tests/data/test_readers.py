"""Readers on real data (../shared/data), against pycocotools, the annotations' own areas and numpy on the PNGs."""

import json

import numpy as np
import pytest
from helpers import SHARED
from PIL import Image

from mask2former_hf.data.classes import BACKGROUND_ID, ClassTable
from mask2former_hf.data.coco import CocoInstances, CocoPanoptic
from mask2former_hf.data.folders import InstanceMaps, LabelMaps
from mask2former_hf.data.statistics import look_through

DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="real data (../shared/data) not found")


def mask_of(example, number):
    """(H, W) bool of a segment; it must lie on one layer."""
    maps = np.atleast_3d(example.segmentation.T).T
    layers = [layer == number for layer in maps if (layer == number).any()]
    assert len(layers) <= 1
    return layers[0] if layers else np.zeros(maps.shape[-2:], dtype=bool)


def test_coco_panoptic_areas_are_those_of_the_json_and_five_segments_are_crowds():
    folder, crowds, segments = DATA / "coco_panoptic", 0, 0
    for split in ("train", "val"):
        source = folder / "annotations" / f"panoptic_{split}.json"
        dataset, truth = (
            CocoPanoptic(folder / split, source, folder / f"panoptic_{split}"),
            json.loads(source.read_text()),
        )
        names = {row["id"]: (row["name"], bool(row["isthing"])) for row in truth["categories"]}
        assert dataset.classes == ClassTable.load("coco-panoptic")
        assert len(dataset) == len(truth["annotations"])
        for index, entry in enumerate(truth["annotations"]):
            example = dataset.annotation(index)
            assert example.image_id == entry["image_id"]
            assert example.segmentation.dtype == np.int32
            expected = {s["id"]: (s["area"], s["iscrowd"], *names[s["category_id"]]) for s in entry["segments_info"]}
            found = {
                s["id"]: (s["area"], s["iscrowd"], dataset.classes.id2label[s["category_id"]], bool(s["isthing"]))
                for s in example.segments
            }
            assert found == expected
            crowds += sum(s["iscrowd"] for s in example.segments)
            segments += len(found)
            red, green, blue = np.moveaxis(
                np.asarray(Image.open(folder / f"panoptic_{split}" / entry["file_name"])).astype(int), -1, 0
            )
            assert (example.segmentation == red + 256 * green + 65536 * blue).all()
    assert (segments, crowds) == (1004, 5)


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ("coco_instances/train", "coco_instances/annotations/instances_train.json"),
        ("objects_cc0/train", "objects_cc0/annotations/instances_train.json"),
        ("objects_cc0/val", "objects_cc0/annotations/instances_val.json"),
        ("coco_panoptic/val", "coco_panoptic/annotations/instances_val.json"),
    ],
)
def test_instance_masks_equal_pycocotools(images, annotations, capsys):
    coco = pytest.importorskip("pycocotools.coco").COCO(DATA / annotations)
    dataset = CocoInstances(DATA / images, DATA / annotations)
    seen = []
    for index in range(len(dataset)):
        example = dataset.annotation(index)
        assert len(example.segments) == len(coco.getAnnIds(example.image_id))
        assert (example.segmentation != 0).all()
        for segment in example.segments:
            truth = coco.anns[segment["annotation_id"]]
            assert truth["image_id"] == example.image_id
            assert (mask_of(example, segment["id"]) == coco.annToMask(truth)).all()
            assert dataset.classes.rows[segment["category_id"]].id == truth["category_id"]
            assert (segment["iscrowd"], segment["area"]) == (truth["iscrowd"], truth["area"])
            seen.append(segment["annotation_id"])
    assert sorted(seen) == sorted(coco.anns)
    assert dataset[0].image.shape[:2] == dataset.annotation(0).segmentation.shape[-2:]


def test_nuclei_as_id_maps_equal_nuclei_as_json():
    folder = DATA / "nuclei_dsb2018"
    maps = {
        split: InstanceMaps(folder / "images" / split, folder / "instance_labels" / split, "nucleus")
        for split in ("train", "val")
    }
    source = folder / "annotations" / "instances_val.json"
    rle = CocoInstances(folder / "images" / "val", source)
    value = {entry["id"]: entry["label_value"] for entry in json.loads(source.read_text())["annotations"]}
    by_name = {example.file_name: example for example in map(rle.annotation, range(len(rle)))}
    for one in map(maps["val"].annotation, range(len(rle))):
        other = by_name[one.file_name]
        table = np.zeros(len(other.segments) + 1, dtype=int)
        for segment in other.segments:
            table[segment["id"]] = value[segment["annotation_id"]]
        translated = np.where(other.segmentation > 0, table[other.segmentation], BACKGROUND_ID)
        assert (one.segmentation == translated).all()
        assert sorted(s["area"] for s in one.segments) == sorted(s["area"] for s in other.segments)
    counts = {
        split: sum(len(dataset.annotation(index).segments) for index in range(len(dataset)))
        for split, dataset in maps.items()
    }
    assert counts == {"train": 3744, "val": 1131}
    assert maps["val"][0].image.shape == (*maps["val"][0].segmentation.shape, 3)


def test_camvid_counts_equal_numpy_on_the_pngs_and_sum_to_all_that_is_not_void():
    folder, expected = DATA / "camvid", np.zeros(256, dtype=int)
    dataset = LabelMaps(folder / "images" / "val", folder / "labels" / "val", folder / "classes.json")
    for path in (folder / "labels" / "val").glob("*.png"):
        expected += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=256)
    assert (len(dataset), dataset.classes.id2label[3]) == (101, "Road")
    assert look_through(dataset).pixels == tuple(expected[:11].tolist())
    assert len(LabelMaps(folder / "images" / "train", folder / "labels" / "train", folder / "classes.json")) == 367


def test_ade20k_classes_are_the_png_minus_one_and_other_is_void():
    folder = DATA / "ade20k_sample"
    dataset = LabelMaps(folder / "images", folder / "annotations", ClassTable.load("ade20k-semantic"))
    names = [line.split(",")[-1].split(";") for line in (folder / "objectInfo150.csv").read_text().splitlines()[1:]]
    for example in dataset:
        png = np.asarray(Image.open(folder / "annotations" / f"{example.image_id}.png"))
        assert (example.segmentation == png).all()  # id = index + 1
        assert {s["category_id"] + 1: s["area"] for s in example.segments} == {
            label: (png == label).sum() for label in np.unique(png[png > 0]).tolist()
        }
    for row in dataset.classes.rows:  # the csv has ; for every space and comma
        assert set(row.name.split(",")[0].split()) <= set(names[row.index]), row


def test_panopticapi_samples_agree_in_both_of_their_formats():
    folder = DATA / "coco_panoptic_samples" / "panopticapi_sample_data"
    panoptic = CocoPanoptic(folder / "input_images", folder / "panoptic_examples.json", folder / "panoptic_examples")
    detection = CocoInstances(
        folder / "input_images", folder / "panoptic_coco_detection_format.json", ClassTable.load("coco-panoptic")
    )
    for one, other in zip(panoptic, detection, strict=True):
        assert (one.image == other.image).all()
        assert one.segments
        for segment, same in zip(one.segments, other.segments, strict=True):
            assert (segment["category_id"], segment["isthing"]) == (same["category_id"], same["isthing"])
            assert (mask_of(one, segment["id"]) == mask_of(other, same["id"])).all()


def test_a_json_without_categories_is_read_with_a_class_table(tmp_path):
    folder = DATA / "coco_panoptic_samples" / "hf_fixture_39769"
    name = "000000039769.png"
    segments = json.loads((folder / "coco_panoptic_annotations.txt").read_text())
    data = {
        "images": [{"id": 39769, "file_name": name, "height": 480, "width": 640}],
        "annotations": [{"image_id": 39769, "file_name": name, "segments_info": segments}],
    }
    source = tmp_path / "panoptic.json"
    source.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no categories; add them to the json, or give classes="):
        CocoPanoptic(folder, source, folder / "coco_panoptic")
    dataset = CocoPanoptic(folder, source, folder / "coco_panoptic", ClassTable.load("coco-panoptic"))
    found = dataset[0].segments
    assert [s["area"] for s in found] == [s["area"] for s in segments]
    assert [dataset.classes.id2label[s["category_id"]] for s in found][:2] == ["cat", "cat"]
