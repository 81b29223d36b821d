"""What lies in a folder is recognised as a person would; what is held out where nothing is there to measure on."""

import json

import numpy as np
import pytest
from helpers import SHARED
from PIL import Image

from mask2former_hf.data.held_out import hold_out
from mask2former_hf.data.recognise import recognise
from mask2former_hf.data.scenes import Scenes

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="annotated images (../shared/data) not found")
REAL = {  # folder -> kind, and paths below it
    "camvid": ("label-maps", {"train_images": "images/train", "val_maps": "labels/val", "classes": "classes.json"}),
    "nuclei_dsb2018": ("coco-instances", {"train_images": "images/train", "val_images": "images/val"}),
    "coco_instances": ("coco-instances", {"train_images": "train"}),
    "objects_cc0": ("coco-instances", {"train_images": "train", "val_annotations": "annotations/instances_val.json"}),
    "coco_panoptic": (
        "coco-panoptic",
        {"train_annotations": "annotations/panoptic_train.json", "val_maps": "panoptic_val"},
    ),
}


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_folders_are_recognised(name):
    kind, paths = REAL[name]
    found = recognise(DATA / name)
    assert found["data"] == kind
    assert {key: str(found[key]) for key in paths} == {key: str(DATA / name / path) for key, path in paths.items()}
    assert any(key.startswith("val_") for key in found) == (name != "coco_instances")


@needs_data
def test_a_kind_that_is_named_is_looked_for():
    found = recognise(DATA / "nuclei_dsb2018", "instance-maps")
    assert found["data"] == "instance-maps" and found["train_maps"] == DATA / "nuclei_dsb2018/instance_labels/train"
    with pytest.raises(ValueError, match="no coco-panoptic recognised"):
        recognise(DATA / "nuclei_dsb2018", "coco-panoptic")


def pair(folder, images, maps, names=("a", "b")):
    for place, mode in ((images, "RGB"), (maps, "L")):
        (folder / place).mkdir(parents=True)
        for name in names:
            Image.new(mode, (8, 8)).save(folder / place / f"{name}.png")


@pytest.mark.parametrize("places", [("images", "masks"), ("train/images", "train/labels"), ("imgs/train", "gt/train")])
def test_maps_beside_images_are_recognised_in_the_usual_places(places, tmp_path):
    folder = tmp_path / "validation-study"  # its own name says nothing about splits
    pair(folder, *places)
    assert recognise(folder) == {
        "data": "label-maps", "train_images": folder / places[0], "train_maps": folder / places[1],
    }  # fmt: skip


def test_what_is_not_recognised_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="no annotations recognised. Looked for COCO jsons .* data=, train_images="):
        recognise(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        recognise(tmp_path / "none")
    pair(tmp_path, "val/images", "val/labels")
    with pytest.raises(ValueError, match="only a split to measure on"):
        recognise(tmp_path)


class Named(Scenes):
    """Scenes with file names."""

    def __init__(self, names):
        super().__init__("val")
        self.length, self.names = len(names), names

    def file_names(self):
        return self.names


def test_a_share_is_held_out_and_nothing_is_in_both_parts():
    train, val, text = hold_out(Named([f"{number:012d}.jpg" for number in range(50)]), 0.1, seed=3)
    assert (len(train), len(val)) == (45, 5) and not set(train.indices) & set(val.indices)
    assert "5 of 50 images, drawn by the seed" in text
    again = hold_out(Named([f"{number:012d}.jpg" for number in range(50)]), 0.1, seed=3)[1]
    assert list(again.indices) == list(val.indices)
    assert np.array_equal(val[0].image, Scenes("val")[val.indices[0]].image)
    for share, number in ((0.0, 5), (1.0, 5), (0.5, 1)):
        with pytest.raises(ValueError, match="held_out="):
            hold_out(Named([str(index) for index in range(number)]), share)


def test_sequences_are_held_out_whole():
    names = [f"clip{clip}_{frame:04d}.png" for clip in "abcdefghij" for frame in range(4)]
    train, val, text = hold_out(Named(names), 0.2)
    clips = [{names[index].split("_")[0] for index in part.indices} for part in (train, val)]
    assert len(clips[1]) == 2 and not clips[0] & clips[1] and all(clip in text for clip in clips[1])
