"""`evaluate` on files whose classes are some of the checkpoint's."""

import json

import numpy as np
import pytest
from helpers import tiny_model
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.cli.main import main

NAMES = ["bird", "cat", "dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: label for label, name in enumerate(NAMES)}}
    tiny_model("resnet", task="instance", num_labels=3, stuff_label_ids=[], **labels).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(checkpoint, tmp_path):
    """A function that evaluates an image of a dog, by a json with these categories; the summary's classes."""
    pytest.importorskip("pycocotools")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")

    def evaluate(categories, *options):
        dog = next(number for number, name in categories.items() if name.lower() == "dog")
        square = [4, 4, 40, 4, 40, 40, 4, 40]
        entry = {"id": 1, "image_id": 1, "category_id": dog, "segmentation": [square], "iscrowd": 0}
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
            "annotations": [entry],
            "categories": [{"id": number, "name": name} for number, name in categories.items()],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        paths = ["--images", tmp_path, "--annotations", tmp_path / "a.json", "--json", tmp_path / "out.json"]
        given = ["--model", checkpoint, "--data", "coco-instances", *paths, "--device", "cpu", *options]
        code = main(["evaluate", *map(str, given)])
        rows = json.loads((tmp_path / "out.json").read_text())["ap"]["per_class"] if code == 0 else {}
        return code, {label: row for label, row in rows.items() if row["AP"] is not None}

    return evaluate


@pytest.mark.parametrize("categories", [{1: "dog"}, {3: "Dog"}, {1: "dog", 7: "bird"}])
def test_a_json_with_fewer_classes_needs_no_flag(evaluate, categories):
    """A dog is the checkpoint's label 2, whatever its number is in the file."""
    code, measured = evaluate(categories)
    assert code == 0 and [(label, row["name"]) for label, row in measured.items()] == [("2", "dog")]


def test_a_class_that_the_checkpoint_lacks_is_named_in_one_line(evaluate, capsys):
    code, _ = evaluate({1: "dog", 2: "horse"})
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("mask2former-hf"))
    assert code == 2 and "only in the data: 'horse'; only in the model: 'bird', 'cat'" in line
