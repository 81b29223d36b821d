"""COCO json as people have it: every field with every wrong value, and the dialects of annotation tools."""

import copy
import json
import logging

import numpy as np
import pytest
from PIL import Image
from wrong_values import DEEP, VALUES, changed, places

from mask2former_hf.data.coco import CocoInstances, CocoPanoptic

pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
H, W = 6, 8
SQUARE = [[1, 1, 5, 1, 5, 5, 1, 5]]
RUNS = {"size": [H, W], "counts": [7, 4, 37]}
INSTANCES = {
    "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
    "annotations": [
        {
            "id": 5,
            "image_id": 1,
            "category_id": 7,
            "iscrowd": 0,
            "area": 16,
            "bbox": [1, 1, 4, 4],
            "segmentation": SQUARE,
        },
        {"id": 6, "image_id": 1, "category_id": 7, "segmentation": RUNS},
    ],
    "categories": [{"id": 7, "name": "dog", "isthing": 1, "supercategory": "animal"}],
}
PANOPTIC = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [
        {
            "image_id": 1,
            "file_name": "a_map.png",
            "segments_info": [{"id": 9, "category_id": 7, "iscrowd": 0, "area": 48}],
        }
    ],
    "categories": INSTANCES["categories"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    Image.fromarray(np.full((H, W, 3), 90, np.uint8)).save(folder / "a.png")
    Image.fromarray(np.full((H, W, 3), [9, 0, 0], np.uint8)).save(folder / "a_map.png")
    return folder


@pytest.fixture
def read(folder):
    """A function that writes a json and reads all examples of it, with their images."""

    def read(data, kind="instances", **options):
        path = folder / "coco.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        if kind == "panoptic":
            dataset = CocoPanoptic(folder, path, folder, **options)
        else:
            dataset = CocoInstances(folder, path, **options)
        return dataset, [dataset[index] for index in range(len(dataset))]

    return read


KINDS = {"instances": INSTANCES, "panoptic": PANOPTIC}
FIELDS = [(name, path) for name, data in KINDS.items() for path in places(data)]


@pytest.mark.parametrize("kind, path", FIELDS, ids=[f"{name}-{'.'.join(map(str, path))}" for name, path in FIELDS])
def test_every_field_with_every_wrong_value_is_read_or_refused_with_the_file(read, kind, path):
    for value in VALUES.values():
        try:
            dataset, examples = read(changed(KINDS[kind], path, value), kind)
        except ValueError as error:
            assert "coco.json" in str(error) or "a.png" in str(error) or "a_map.png" in str(error), (value, error)
            assert len(str(error)) < 700, (value, error)
            continue
        except FileNotFoundError as error:  # a name that could be one
            assert path[-1] == "file_name" and value == "x", (value, error)
            continue
        for example in examples:
            assert example.image.shape == (H, W, 3) and example.size == (H, W)
            assert all(0 <= segment["category_id"] < len(dataset.classes) for segment in example.segments)
            assert all(segment["iscrowd"] in (0, 1) for segment in example.segments)


@pytest.mark.parametrize(
    "path, value, rule",
    [
        (("images", 0, "id"), [], r"images\[0\] has id=\[\]; it must be a whole number or a text: correct it"),
        (("images", 0, "height"), 1.5, r"images\[0\] has height=1.5; it must be a whole number of pixels, 1 or more"),
        (("images", 0, "width"), True, "has width=True; it must be a whole number of pixels"),
        (("annotations", 0, "image_id"), float("nan"), r"annotations\[0\] has image_id=nan"),
        (("annotations", 0, "category_id"), 1.5, "has category_id=1.5"),
        (("annotations", 0, "iscrowd"), -1, "has iscrowd=-1; it must be 0 or 1"),
        (("annotations", 0, "area"), float("inf"), "has area=inf; it must be a number of pixels"),
        (("annotations", 0, "bbox"), [1, 2], r"has bbox=\[1, 2\]; it must be four numbers"),
        (("annotations", 0, "segmentation"), DEEP, r"has segmentation=\[.*it must be polygons"),
        (("categories", 0, "id"), None, r"categories\[0\] is .* it needs a whole number id"),
        (("categories",), 5, "has categories=5; it must be a list"),
    ],
)
def test_the_message_names_place_field_value_and_rule(read, path, value, rule):
    with pytest.raises(ValueError, match=rule):
        read(changed(INSTANCES, path, value))


@pytest.mark.parametrize(
    "text", ["", "[", "{}", "[]", "5", "null", "[" * 10**5 + "]" * 10**5, '{"images": [], "annotations": []}']
)
def test_what_is_no_coco_json_is_refused(read, text):
    with pytest.raises(ValueError, match="coco.json"):
        read(text)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("outside", ["../secret.png", "{}/secret.png", "a.png/../../secret.png"])
@pytest.mark.parametrize(
    "kind, path", [("instances", ("images", 0)), ("panoptic", ("images", 0)), ("panoptic", ("annotations", 0))]
)
def test_a_name_that_leaves_the_folder_is_never_opened(read, folder, kind, path, outside):
    Image.fromarray(np.full((H, W, 3), [9, 0, 0], np.uint8)).save(folder.parent / "secret.png")
    data = changed(KINDS[kind], (*path, "file_name"), outside.format(folder.parent))
    with pytest.raises(FileNotFoundError, match="it points out of the folder"):
        read(data, kind)


def test_the_group_category_of_roboflow_is_no_class(read, said):
    group = {"id": 0, "name": "animal", "supercategory": "none"}
    dataset, _ = read(INSTANCES | {"categories": [group, *INSTANCES["categories"]]})
    assert dataset.classes.id2label == {0: "dog"} and "animal only groups other categories" in said()
    used = changed(INSTANCES, ("annotations", 0, "category_id"), 0)
    dataset, _ = read(used | {"categories": [group, *INSTANCES["categories"]]})
    assert dataset.classes.id2label == {0: "animal", 1: "dog"}  # it has an annotation
    person = {"id": 3, "name": "person", "supercategory": "person"}
    dataset, _ = read(INSTANCES | {"categories": [person, *INSTANCES["categories"]]})
    assert len(dataset.classes) == 2  # COCO's own form


@pytest.mark.parametrize(
    "path, value",
    [
        (("images", 0, "id"), "1"),
        (("annotations", 0, "image_id"), "1"),
        (("annotations", 0, "category_id"), "7"),
        (("categories", 0, "id"), "7"),
    ],
)
def test_ids_as_text_in_one_place_and_numbers_in_another_are_one(read, said, path, value):
    _, expected = read(INSTANCES)
    assert said() == ""
    _, found = read(changed(INSTANCES, path, value))
    assert len(found[0].segments) == 2 and np.array_equal(found[0].segmentation, expected[0].segmentation)
    assert "text in one place and numbers in another" in said()


def test_text_ids_everywhere_stay_text_and_zeros_in_front_matter(read, said):
    data = changed(changed(INSTANCES, ("images", 0, "id"), "0001"), ("annotations", 0, "image_id"), "0001")
    data["annotations"].pop()
    assert read(data)[1][0].image_id == "0001" and said() == ""
    with pytest.raises(ValueError, match="image_id 1, which images does not list"):
        read(changed(data, ("annotations", 0, "image_id"), "1"))


def test_annotations_as_a_dict_and_masks_as_a_list_of_run_lengths(read):
    _, expected = read(INSTANCES)
    entries = dict(enumerate(INSTANCES["annotations"]))
    assert np.array_equal(read(INSTANCES | {"annotations": entries})[1][0].segmentation, expected[0].segmentation)
    listed = read(changed(INSTANCES, ("annotations", 1, "segmentation"), [RUNS]))
    assert np.array_equal(listed[1][0].segmentation, expected[0].segmentation)


@pytest.mark.parametrize("empty", [[], [[]], {}, None])
def test_objects_without_a_mask_beside_others_are_left_out_and_counted_or_refused(read, said, empty):
    data = changed(INSTANCES, ("annotations", 0, "segmentation"), empty)
    _, (example,) = read(data)
    assert [segment["annotation_id"] for segment in example.segments] == [6]
    assert "1 of 2 annotations have no segmentation, such as the ids [5]" in said()
    with pytest.raises(ValueError, match="1 annotations have no segmentation"):
        read(data, strict=True)


def test_fields_that_are_null_are_fields_that_are_not_there(read):
    data = copy.deepcopy(INSTANCES)
    data["annotations"][0] |= {"iscrowd": None, "area": None, "bbox": None, "id": None}
    data["categories"][0] |= {"supercategory": None, "isthing": None}
    segment = read(data)[1][0].segments[0]
    assert (segment["iscrowd"], segment["area"]) == (0, 16) and "bbox" not in segment


def test_masks_that_are_all_crowds_are_named_where_nothing_is_left_to_learn(read):
    data = copy.deepcopy(INSTANCES)
    for entry in data["annotations"]:
        entry["iscrowd"] = 1
    with pytest.raises(ValueError, match="no image with an object.*all 2 annotations are crowds"):
        read(data, skip_empty=True)
