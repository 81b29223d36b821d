"""Classes declared in any form, for every kind of data; and declarations that contradict the data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mask2former_hf.data import kinds
from mask2former_hf.data.class_forms import class_table
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.data.coco import CocoInstances, CocoPanoptic
from mask2former_hf.data.folders import InstanceMaps
from mask2former_hf.data.kinds import OF_A_SPLIT, load_both, load_split
from mask2former_hf.training.settings import TrainingSettings

OPEN = ("data classes image_suffix map_suffix divisor dataset image_column label_column segments_info_column").split()


def written(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


FORMS = {
    "a name": lambda folder: "nucleus",
    "a list": lambda folder: ["nucleus"],
    "a map": lambda folder: {0: "nucleus"},
    "a map with void": lambda folder: {0: "nucleus", 255: None},
    "categories": lambda folder: [{"id": 0, "name": "nucleus"}],
    "txt": lambda folder: written(folder, "classes.txt", "nucleus\n\n"),
    "json list": lambda folder: written(folder, "classes.json", '["nucleus"]'),
    "json dict": lambda folder: written(folder, "classes.json", '{"0": "nucleus"}'),
    "json names": lambda folder: written(folder, "classes.json", '{"classes": ["nucleus"]}'),
    "json table": lambda folder: written(folder, "classes.json", '{"classes": [[0, "nucleus", true]]}'),
    "json categories": lambda folder: written(
        folder, "classes.json", '{"categories": [{"id": 0, "name": "nucleus"}]}'
    ),
    "yaml": lambda folder: written(folder, "classes.yaml", "0: nucleus\n"),
    "yaml list": lambda folder: written(folder, "classes.yml", "- nucleus\n"),
    "a table": lambda folder: ClassTable.from_labels({0: "nucleus"}),
}
KINDS = ("instance-maps", "coco-instances", "coco-panoptic", "label-maps", "hub objects", "hub labels")


def coco(folder, name, categories, category=None):
    """A json of one image with one object of the last category, or of `category`."""
    category = list(categories)[-1] if category is None else category
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
        "categories": [{"id": number, "name": label, "isthing": 1} for number, label in categories.items()],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": category, "iscrowd": 0, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]}
        ],
    }
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    return tmp_path


def settings(kind, folder, classes):
    """Settings of one image with one object of id 0 for every kind."""
    given = dict.fromkeys((*OPEN, "objects_column", *OF_A_SPLIT)) | {"data": kind.split()[0], "classes": classes}
    places = {"images": folder / "images", "maps": folder / "maps", "annotations": folder / "a.json"}
    given |= {name: places[name] for name in kinds.KINDS[given["data"]].paths}
    (folder / "maps").mkdir()
    ids = np.zeros((8, 8), np.uint8)
    if kind == "instance-maps":
        ids[:4, :4] = 3
    if kind == "coco-panoptic":
        rgb = np.zeros((8, 8, 3), np.uint8)
        rgb[:4, :4, 0] = 3
        Image.fromarray(rgb).save(folder / "maps" / "a.png")
        content = json.loads(coco(folder, "a.json", {0: "nucleus"}).read_text())
        content["annotations"] = [{"image_id": 1, "segments_info": [{"id": 3, "category_id": 0}]}]
        (folder / "a.json").write_text(json.dumps(content))
    else:
        Image.fromarray(ids).save(folder / "maps" / "a.png")
    if kind == "coco-instances":
        coco(folder, "a.json", {0: "nucleus"})
    if kind.startswith("hub"):
        datasets = pytest.importorskip("datasets", reason="datasets is an extra")
        objects = [[{"category_id": 0, "segmentation": [[0.0, 0, 4, 0, 4, 4, 0, 4]]}]]
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "map": datasets.Image(),
                "objects": [{"category_id": datasets.Value("int64"), "segmentation": [[datasets.Value("float64")]]}],
            }
        )
        columns = {"image": [Image.new("RGB", (8, 8))], "map": [Image.fromarray(ids)], "objects": objects}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "data" / "train.parquet")
        column = {"objects_column": "objects"} if kind == "hub objects" else {"label_column": "map"}
        given |= {"dataset": str(folder / "data"), "split": "train", **column}
    return SimpleNamespace(**given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_one_class_is_understood_in_every_form_for_every_kind_of_data(kind, form, pictures):
    dataset = load_split(settings(kind, pictures, FORMS[form](pictures)))
    instances = dataset.task == "instance"
    assert dataset.classes.id2label == {0: "nucleus"}
    if instances:
        assert dataset.classes.stuff_label_ids == []
    (segment,) = dataset[0].segments
    assert segment["category_id"] == 0 and segment["area"] >= 16
    if instances or kind == "coco-panoptic":  # whose json says so
        assert segment["isthing"] == 1


def test_instances_stay_stuff_where_their_declaration_says_so():
    table = class_table({"classes": [[1, "nucleus", 1], [2, "smear", 0]]}, instances=True)
    assert table.stuff_label_ids == [1]
    table = class_table([{"id": 1, "name": "a"}, {"id": 2, "name": "b", "isthing": 0}], instances=True)
    assert table.stuff_label_ids == [1]


def test_a_misspelt_class_set_or_file_is_no_class():
    for given in ("ade20k-semnatic", "coco", "some/folder"):
        with pytest.raises(ValueError, match="no such class set and no file"):
            class_table(given)
    with pytest.raises(FileNotFoundError, match="no such file of classes"):
        class_table("missing.yaml")
    with pytest.raises(ValueError, match="declared more than once"):
        class_table("a,a")
    assert class_table("ade20k-semantic") == ClassTable.load("ade20k-semantic")


def test_names_of_objects_count_from_one_and_of_labels_from_zero(pictures):
    (pictures / "maps").mkdir()
    Image.fromarray(np.full((8, 8), 2001, np.uint16)).save(pictures / "maps" / "a.png")
    dataset = InstanceMaps(pictures / "images", pictures / "maps", "cell,nucleus", divisor=1000)
    assert [segment["category_id"] for segment in dataset[0].segments] == [1]
    assert [row.id for row in class_table("cell,nucleus").rows] == [0, 1]


@pytest.mark.parametrize("given", [{1: "cat", 2: "dog"}, ClassTable.from_labels({1: "cat"}), {0: "dog"}])
def test_declared_classes_that_contradict_the_json_are_refused_with_both_names(pictures, given):
    path = coco(pictures, "b.json", {1: "dog"})
    problem = "'dog' has the id 1 there and 0" if given == {0: "dog"} else "id 1 is 'dog' there and 'cat'"
    with pytest.raises(ValueError, match=problem):
        CocoInstances(pictures / "images", path, given)
    with pytest.raises(ValueError, match=problem):
        content = json.loads(path.read_text())
        content["annotations"] = [{"image_id": 1, "segments_info": []}]
        path.write_text(json.dumps(content))
        CocoPanoptic(pictures / "images", path, pictures, given)


def test_names_alone_are_looked_up_in_each_json(pictures):
    train, val = coco(pictures, "a.json", {1: "cat", 2: "dog"}), coco(pictures, "b.json", {1: "dog"})
    for path in (train, val):
        dataset = CocoInstances(pictures / "images", path, "cat,dog")
        assert dataset.classes.id2label == {0: "cat", 1: "dog"}
        assert [segment["category_id"] for segment in dataset[0].segments] == [1]


def test_ids_may_be_merged_under_one_name_of_ones_own(pictures):
    dataset = CocoInstances(pictures / "images", coco(pictures, "a.json", {1: "cat", 2: "dog"}), {1: "pet", 2: "pet"})
    assert [segment["category_id"] for segment in dataset[0].segments] == [0]


def both(pictures, train, val):
    paths = {f"{split}_images": pictures / "images" for split in ("train", "val")}
    paths |= {"train_annotations": coco(pictures, "a.json", train), "val_annotations": coco(pictures, "b.json", val)}
    return TrainingSettings(data="coco-instances", **paths)


def test_splits_that_list_different_classes_of_one_numbering_are_read_with_all_of_them(pictures):
    train, val, _ = load_both(both(pictures, {1: "cat", 7: "dog"}, {3: "cow", 7: "dog"}))
    assert train.classes.id2label == val.classes.id2label == {0: "cat", 1: "cow", 2: "dog"}
    assert train[0].segments[0]["category_id"] == val[0].segments[0]["category_id"] == 2


@pytest.mark.parametrize("val", [{1: "dog"}, {2: "cat"}])
def test_splits_that_number_a_class_differently_are_refused_with_both(pictures, val):
    with pytest.raises(ValueError, match="contradict each other: train has .*'cat', val .*(dog|cat)"):
        load_both(both(pictures, {1: "cat", 3: "dog"}, val))
