"""Class tables against the lists of the data sets' own repositories (../shared/data/metadata) and by hand."""

import json
import pickle

import numpy as np
import pytest
import transformers
from helpers import SHARED

from mask2former_hf import Mask2FormerConfig
from mask2former_hf.data.classes import IGNORE, ClassTable, count_ids
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.data.statistics import look_through

METADATA = SHARED / "data" / "metadata"
needs_metadata = pytest.mark.skipif(not METADATA.is_dir(), reason="class lists (../shared/data/metadata) not found")
SIZES = {  # classes, things (README of the shared data; original_behaviour.md, a.1)
    "coco-panoptic": (133, 80),
    "coco-instance": (80, 80),
    "coco-stuff-10k": (171, 80),
    "ade20k-semantic": (150, 100),
    "ade20k-panoptic": (150, 100),
    "ade20k-instance": (100, 100),
    "cityscapes-semantic": (19, 8),
    "cityscapes-panoptic": (19, 8),
    "cityscapes-instance": (8, 8),
    "mapillary-semantic": (65, 37),
    "mapillary-panoptic": (65, 37),
    "ytvis-2019": (40, 40),
    "ytvis-2021": (40, 40),
}


@pytest.mark.parametrize("name", SIZES)
def test_class_sets_have_their_numbers_of_classes_and_things(name):
    table = ClassTable.load(name)
    assert (len(table), len(table) - len(table.stuff_label_ids)) == SIZES[name]


def metadata(name):
    return json.loads((METADATA / f"{name}.json").read_text())


@needs_metadata
@pytest.mark.parametrize(
    ("name", "file", "shift"),
    [
        ("coco-panoptic", "coco_panoptic_133", 0),
        ("coco-instance", "coco_instance_80", 0),
        ("coco-stuff-10k", "coco_stuff_10k_171", 0),
        ("ade20k-semantic", "ade20k_150", 1),
        ("ade20k-panoptic", "ade20k_150", 0),
        ("mapillary-panoptic", "mapillary_vistas_panoptic_65", 0),
        ("ytvis-2019", "ytvis_2019_40", 0),
        ("ytvis-2021", "ytvis_2021_40", 0),
    ],
)
def test_class_sets_equal_the_lists_of_the_repositories(name, file, shift):
    expected = [(row["id"] + shift, row["name"].strip(), bool(row.get("isthing", 0))) for row in metadata(file)]
    assert [(row.id, row.name, row.isthing) for row in ClassTable.load(name).rows] == expected


@needs_metadata
def test_ade20k_instances_are_the_things_of_ade20k():
    table = ClassTable.load("ade20k-instance")
    assert [(row.id, row.name) for row in table.rows] == [
        (row["id"], row["name"]) for row in metadata("ade20k_instance_100")
    ]
    assert {row.id for row in table.rows} == {row["id"] for row in metadata("ade20k_150") if row["isthing"]}


@needs_metadata
def test_cityscapes_indices_are_train_ids_and_all_other_label_ids_are_ignored():
    labels = [row for row in metadata("cityscapes_labels_35") if row["id"] >= 0]
    semantic, instance = ClassTable.load("cityscapes-semantic"), ClassTable.load("cityscapes-instance")
    for row in labels:
        assert semantic.to_index(row["id"]) == (None if row["trainId"] == 255 else row["trainId"])
        known = row["hasInstances"] and not row["ignoreInEval"]
        assert (instance.to_index(row["id"]) is not None) == known
        if known:
            assert instance.id2label[instance.to_index(row["id"])] == row["name"]
    assert [row[1:] for row in semantic.rows] == [row[1:] for row in ClassTable.load("cityscapes-panoptic").rows]


@needs_metadata
def test_mapillary_labels_are_positions_and_unlabelled_is_ignored():
    table = ClassTable.load("mapillary-semantic")
    for position, row in enumerate(metadata("mapillary_vistas_66")):
        index = table.to_index(position)
        assert index == (position if row["evaluate"] else None)
        if row["evaluate"]:
            assert table.rows[index][2:] == (row["readable"], row["instances"])


def test_an_unknown_class_set_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="name='coco': no such class set; there are ade20k-instance, .*ytvis-2021"):
        ClassTable.load("coco")


def test_ids_of_equal_names_are_merged_and_indices_follow_the_declaration():
    table = ClassTable.from_labels({7: "road", 3: IGNORE, 0: "car", 9: "road"}, things=["car"])
    assert table.id2label == {0: "road", 1: "car"}
    assert [table.to_index(original) for original in (7, 3, 0, 9, "car")] == [0, None, 1, 0, 1]
    assert table.stuff_label_ids == [0]
    with pytest.raises(ValueError, match="5 is not declared: add it to the classes, or map it to IGNORE"):
        table.to_index(5)
    with pytest.raises(ValueError, match=r"things has \['bus'\], which labels does not name"):
        ClassTable.from_labels({0: "car"}, things=["bus"])


def test_ids_and_names_occur_once():
    rows = [{"id": 3, "name": "a"}, {"id": 4, "name": "a"}]
    with pytest.raises(ValueError, match=r"the name \['a'\] is declared more than once"):
        ClassTable.from_categories(rows)
    with pytest.raises(ValueError, match=r"the id \[3\] is declared more than once"):
        ClassTable.from_categories([rows[0], {"id": 3, "name": "b"}])
    with pytest.raises(ValueError, match="at least one class"):
        ClassTable.from_labels({0: IGNORE})


@pytest.mark.parametrize(
    "data",
    [
        {"classes": ["road", "car"], "void_id": 255, "colors": [[0, 0, 0]]},
        {"classes": [[0, "road", 0], [1, "car", 0]], "ignored": [255]},
        {"0": "road", "1": "car", "255": None},
    ],
)
def test_three_forms_of_json_declare_the_same(tmp_path, data):
    (tmp_path / "classes.json").write_text(json.dumps(data))
    assert ClassTable.from_json(tmp_path / "classes.json") == ClassTable.from_labels(
        {0: "road", 1: "car", 255: IGNORE}
    )


def test_coco_categories_as_json_keep_their_thing_flags(tmp_path):
    categories = [{"id": 9, "name": "sky", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}]
    for data in (categories, {"images": [], "categories": categories}):
        (tmp_path / "classes.json").write_text(json.dumps(data))
        table = ClassTable.from_json(tmp_path / "classes.json")
        assert [tuple(row) for row in table.rows] == [(0, 2, "car", True), (1, 9, "sky", False)]
    (tmp_path / "classes.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="not a list of classes; write one as"):
        ClassTable.from_json(tmp_path / "classes.json")


@pytest.mark.parametrize("config_class", [Mask2FormerConfig, transformers.Mask2FormerConfig])
def test_the_table_is_kept_in_the_config_of_both_implementations(tmp_path, config_class):
    table = ClassTable.load("cityscapes-panoptic")
    Mask2FormerConfig(**table.config_fields(range(19))).save_pretrained(tmp_path)
    config = config_class.from_pretrained(tmp_path)
    assert config.num_labels == 19
    assert (config.id2label, config.label2id["rider"]) == (table.id2label, 12)
    assert config.stuff_label_ids == list(range(11))
    assert config.class_table == {"ids": [row.id for row in table.rows], "pixels": list(range(19))}


def test_the_printed_table_names_id_index_kind_and_pixels():
    table = ClassTable.from_labels({7: "road", 24: "person", 9: "road", 0: IGNORE}, things=["person"])
    assert table.format_table([3000, 1000]).splitlines() == [
        "  id  index  name       kind   pixels   share",
        "7, 9      0  road       stuff   3,000  75.00%",
        "  24      1  person     thing   1,000  25.00%",
        "   0      -  (ignored)  -           -       -",
    ]
    assert "pixels" not in table.format_table()
    with pytest.raises(ValueError, match="pixel_counts has 1 numbers for 2 classes"):
        table.format_table([1])


def test_pixels_are_counted_by_class_over_any_iterable_of_examples():
    class Scenes(ScenesDataset):
        classes = ClassTable.from_labels({i: str(i) for i in range(5)})

    scenes, expected = Scenes(4, size=32, seed=1), [0] * 5
    for scene in scenes:
        for segment in scene.segments:
            expected[segment["category_id"]] += (scene.segmentation == segment["id"]).sum()
    assert look_through(scenes).pixels == tuple(expected)


def test_counting_runs_equals_counting_pixels():
    rng = np.random.default_rng(0)
    for ids in (rng.integers(-1, 5, (30, 40)), np.full((3, 4), 7), np.zeros((0, 4), dtype=int), np.array([[5]])):
        values, counts = np.unique(ids, return_counts=True)
        assert count_ids(ids) == (values.tolist(), counts.tolist())


def test_a_table_survives_pickling():
    table = ClassTable.load("cityscapes-semantic")
    assert pickle.loads(pickle.dumps(table)) == table
