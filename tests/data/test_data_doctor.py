"""The doctor names what is wrong with data, says what mends it, and is silent about healthy data."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mask2former_hf import ClassTable, ScenesDataset
from mask2former_hf.data.checks import Plan
from mask2former_hf.data.coco import CocoInstances, CocoPanoptic
from mask2former_hf.data.colour_maps import ColourMaps
from mask2former_hf.data.doctor import examine_data
from mask2former_hf.data.example import Example
from mask2former_hf.data.findings import ADVICE, ERROR, WARNING
from mask2former_hf.data.folders import InstanceMaps, LabelMaps
from mask2former_hf.data.formats.convert import convert
from mask2former_hf.data.wrong_ids import explain_json

H, W, N = 32, 48, 10
NAMES = {0: "sky", 1: "road", 2: "car", 3: "tree"}
COLOURS = {"sky": [10, 20, 30], "road": [128, 64, 128], "car": [0, 0, 142], "tree": [107, 142, 35]}


class Folder:
    """Images and label maps of two splits, whose pixels a test spoils before they are written."""

    def __init__(self, path):
        self.path, rng = path, np.random.default_rng(0)
        self.images = {split: [rng.integers(0, 255, (H, W, 3), np.uint8) for _ in range(N)] for split in SPLITS}
        quarters = np.repeat(np.arange(4, dtype=np.uint8), W // 4)[None].repeat(H, 0)
        self.maps = {split: [np.roll(quarters, 3 * k, 1) for k in range(N)] for split in SPLITS}
        self.options = {split: {} for split in SPLITS}  # of saving images

    def write(self, kind, classes):
        for split in SPLITS:
            for number, (image, ids) in enumerate(zip(self.images[split], self.maps[split], strict=True)):
                for place, array, options in (("images", image, self.options[split]), ("maps", ids, {})):
                    file = self.path / place / split / f"{split}{number}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(file, **options)
        folders = {split: [self.path / place / split for place in ("images", "maps")] for split in SPLITS}
        return {split: kind(*folders[split], classes) for split in SPLITS}


SPLITS = ("train", "val")


def findings(splits, **plan):
    return [one for one in examine_data(splits, Plan(**plan))[0] if one.severity != ADVICE]


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def spoil_all(maps, change):
    for split in SPLITS:
        maps[split] = [change(ids) for ids in maps[split]]


def never_seen(folder):
    spoil_all(folder.maps, lambda ids: np.where(ids == 2, 1, ids).astype(np.uint8))


def half_void(folder):
    spoil_all(folder.maps, lambda ids: np.where(ids < 3, 255, ids).astype(np.uint8))


def some_void(folder):
    folder.maps["train"][:3] = [np.where(ids < 3, 255, ids).astype(np.uint8) for ids in folder.maps["train"][:3]]


def one_class(folder):
    spoil_all(folder.maps, lambda ids: np.ones_like(ids))


def off_by_one(folder):
    spoil_all(folder.maps, lambda ids: ids + np.uint8(1))


def begin_with_one(folder):
    spoil_all(folder.maps, lambda ids: ids.clip(1))


def leak(folder):
    folder.images["val"][3] = folder.images["train"][7]


def twice(folder):
    folder.images["train"][1] = folder.images["train"][0]


def turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    folder.options["train"] = {"exif": exif}


def sixteen_bits(folder):
    folder.images["train"] = [image[..., 0].astype(np.uint16) * 16 for image in folder.images["train"]]


def some_grey(folder):
    folder.images["train"][:3] = [image[..., 0] for image in folder.images["train"][:3]]


def other_size(folder):
    folder.images["train"][4] = folder.images["train"][4][:-2]


def turned_against_its_map(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder.options["train"] = {"exif": exif}


def other_distribution(folder):
    folder.maps["val"] = [np.where(ids < 3, 0, ids).astype(np.uint8) for ids in folder.maps["val"]]


def only_in_val(folder):
    folder.maps["train"] = [np.where(ids == 3, 0, ids).astype(np.uint8) for ids in folder.maps["train"]]


def large_val(folder):
    for kept in (folder.images, folder.maps):
        kept["val"] = [array.repeat(3, 0).repeat(3, 1) for array in kept["val"]]


SICK_MAPS = {  # how it was spoiled -> severity, what is said, what the repair has
    never_seen: (WARNING, "1 of 4 classes are never seen: car", "add images"),
    half_void: (WARNING, "75% of the pixels are ignored", "declare"),
    some_void: (WARNING, "in 3 of 10 images masks cover less than half", "annotate"),
    one_class: (WARNING, "every pixel that counts is 'road'", "a class of their own"),
    off_by_one: (ERROR, "20 of 20|10 of 10 examples cannot be read", "off by one.*name the classes from 1"),
    begin_with_one: (WARNING, "class 0, 'sky', never occurs", "name the classes from 1"),
    leak: (WARNING, "1 images are in both", "take them out of one"),
    twice: (WARNING, "1 images are there twice", "keep one"),
    turned: (WARNING, "10 of the images looked at are turned by their EXIF tag", "upright"),
    sixteen_bits: (WARNING, "have 16 bits.*nearly black", "--channels 1"),
    some_grey: (WARNING, "3 of the 10 images looked at are grey", "both kinds"),
    other_size: (ERROR, "1 of 10 examples cannot be used.*30 x 48.*32 x 48", "mend"),
    turned_against_its_map: (ERROR, "They agree if the EXIF rotation", "upright without the EXIF tag"),
    other_distribution: (WARNING, "distributed differently; 'sky'", "at random"),
    only_in_val: (WARNING, "tree is only in val", "divide the images anew"),
    large_val: (WARNING, "short side of images is 32 in train and 96 in val", "--test-size"),
}


@pytest.mark.parametrize("spoil", SICK_MAPS, ids=lambda spoil: spoil.__name__)
def test_sick_label_maps_are_found_and_the_repair_is_named(folder, spoil):
    spoil(folder)
    found = findings(folder.write(LabelMaps, {**NAMES, 255: None}))
    check(found, *SICK_MAPS[spoil])


def check(found, severity, what, repair):
    texts = [(one.severity, f"{one.what}\n{one.repair}") for one in found]
    fits = [text for kind, text in texts if kind == severity and re.search(f"(?s)(?:{what}).*{repair}", text)]
    assert fits, texts
    assert all(one.where and one.why for one in found)


def test_red_and_blue_of_colour_maps_swapped(folder):
    palette = np.array(list(COLOURS.values()), dtype=np.uint8)[:, ::-1]
    spoil_all(folder.maps, lambda ids: np.ascontiguousarray(palette[ids]))
    check(findings(folder.write(ColourMaps, COLOURS)), ERROR, "10 of 10 examples cannot be read", "red and blue")


def test_objects_that_nearly_fill_their_image_and_a_background_among_the_classes(folder):
    spoil_all(folder.maps, lambda ids: np.ones_like(ids))
    found = findings(folder.write(InstanceMaps, ["background"]))
    check(found, WARNING, "in 10 of 10 images an object fills", "leave the background out")
    check(found, WARNING, "'background' is a class of objects", "take the class out")


def test_more_objects_than_queries_and_objects_under_a_pixel(folder):
    spots = np.zeros((H, W), dtype=np.uint8)
    spots[::4, ::6] = np.arange(1, 65).reshape(8, 8)
    spoil_all(folder.maps, lambda ids: spots)
    found = findings(folder.write(InstanceMaps, ["cell"]), queries=50, side=16)
    check(found, ERROR, "more objects than the 50 queries; train0.png has 64", "at least --queries 64")
    check(found, WARNING, "640 of 640 objects are under a pixel when the short side has 16", "larger images")
    found = findings(folder.write(InstanceMaps, ["cell"]), side=64)
    check(found, WARNING, "640 of 640 objects have under 16 pixels", "--crop")


def test_few_objects_in_one_split(folder):
    folder.maps["train"] = [np.arange(H * W).reshape(H, W) % 20 + 1 for _ in range(N)]
    folder.maps["train"] = [ids.astype(np.uint8) for ids in folder.maps["train"]]
    check(findings(folder.write(InstanceMaps, ["cell"])), WARNING, "20.0 objects per image in train", "missing")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Healthy data of both of COCO's formats, two splits each."""
    root = tmp_path_factory.mktemp("scenes")
    for name in ("coco-instances", "coco-panoptic"):
        for split, seed in (("train", 0), ("val", 1000)):
            convert(ScenesDataset(12, size=64, seed=seed), root / name, name, split)
    return root


def panoptic(root, split, annotations=None, maps=None):
    place = root / "coco-panoptic"
    annotations = annotations or place / f"annotations/panoptic_{split}.json"
    return CocoPanoptic(place / "images" / split, annotations, maps or place / "panoptic" / split)


def instances(root, split, annotations=None):
    place = root / "coco-instances"
    return CocoInstances(place / "images" / split, annotations or place / f"annotations/instances_{split}.json")


def changed(root, kind, tmp_path, change):
    """The json of the training data, changed."""
    content = json.loads((root / f"coco-{kind}/annotations/{kind}_train.json").read_text())
    change(content)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("reader", [panoptic, instances])
def test_healthy_scenes_are_passed_in_silence(scenes, reader):
    assert findings({split: reader(scenes, split) for split in SPLITS}) == []


@pytest.mark.parametrize("kind, classes", [(LabelMaps, NAMES), (InstanceMaps, ["cell"]), (ColourMaps, COLOURS)])
def test_healthy_maps_are_passed_in_silence(folder, kind, classes):
    if kind is ColourMaps:
        spoil_all(folder.maps, lambda ids: np.array(list(COLOURS.values()), dtype=np.uint8)[ids])
    assert findings(folder.write(kind, classes), queries=100) == []


def test_red_and_blue_of_panoptic_ids_swapped(scenes, tmp_path):
    for path in (scenes / "coco-panoptic/panoptic/train").iterdir():
        Image.fromarray(np.asarray(Image.open(path))[..., ::-1].copy()).save(tmp_path / path.name)
    found = findings({"train": panoptic(scenes, "train", maps=tmp_path), "val": panoptic(scenes, "val")})
    check(found, ERROR, "12 of 12 .*segments_info does not describe", "red and blue of the PNGs")


def test_stuff_in_several_segments(scenes, tmp_path):
    def everything_is_stuff(content):
        for category in content["categories"]:
            category["isthing"] = 0

    path = changed(scenes, "panoptic", tmp_path, everything_is_stuff)
    found = findings({"train": panoptic(scenes, "train", path)})
    check(found, WARNING, "is stuff and has several segments in", "isthing to 1")


def test_objects_without_a_pixel_and_crowds_by_mistake(scenes, tmp_path):
    def spoil(content):
        for number, entry in enumerate(content["annotations"]):
            entry["iscrowd"] = int(number % 3 > 0)
        content["annotations"][0] |= {"segmentation": [[1, 1, 1, 1, 1, 1]], "area": 0}

    found = findings({"train": instances(scenes, "train", changed(scenes, "instances", tmp_path, spoil))})
    check(found, WARNING, "objects are crowds", "set iscrowd to 0")
    check(found, WARNING, "1 of .* objects have no pixel", "take them out")


@pytest.mark.parametrize("shift", [1, -1])
def test_a_json_whose_category_ids_are_all_off_by_one(scenes, tmp_path, shift):
    def shift_ids(content):
        for entry in content["annotations"]:
            entry["category_id"] += shift
        used = {entry["category_id"] - shift for entry in content["annotations"]}
        content["categories"] = [row for row in content["categories"] if row["id"] in used]

    path = changed(scenes, "instances", tmp_path, shift_ids)
    with pytest.raises(ValueError, match="not among the categories"):
        instances(scenes, "train", path)
    assert f"off by {shift:+d}" in explain_json(path)


def test_segments_that_overlap_in_panoptic_data():
    class Overlapping(list):
        task, classes = "panoptic", ClassTable.from_labels({1: "cat", 2: "dog"}, things=("cat", "dog"))

    layers = np.zeros((2, 64, 64), dtype=np.int32)
    layers[0, :40], layers[1, 20:] = 1, 2
    segments = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
    found = findings({"train": Overlapping([Example(None, layers, segments)])})
    check(found, ERROR, "1 of 1 images .* overlap", "front")
