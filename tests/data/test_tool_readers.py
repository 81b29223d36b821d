"""Readers of what annotation tools export, on files as the tools write them; round trips of the real data."""

import base64
import io
import json
from collections import Counter

import numpy as np
import pytest
from helpers import SHARED
from PIL import Image, ImageDraw, TiffImagePlugin

from mask2former_hf.data.classes import BACKGROUND_ID
from mask2former_hf.data.coco import CocoInstances, CocoPanoptic
from mask2former_hf.data.colour_maps import ColourMaps
from mask2former_hf.data.folders import LabelMaps
from mask2former_hf.data.formats.convert import convert
from mask2former_hf.data.formats.labelled_mask import masks_of_example
from mask2former_hf.data.geojson import GeoJsonFiles
from mask2former_hf.data.kinds import load_split
from mask2former_hf.data.label_studio import LabelStudioTasks
from mask2former_hf.data.labelme import LabelmeFiles
from mask2former_hf.data.palette import voc_palette
from mask2former_hf.data.recognise import recognise
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.data.yolo import YoloSegments
from mask2former_hf.training.settings import TrainingSettings

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="real data (../shared/data) not found")
SIZE = (40, 60)  # of the images here
SQUARE = np.zeros(SIZE, bool)
SQUARE[10:30, 12:42] = True


def image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (90, 120, 60)).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def found(example, classes):
    """(label, mask) of each object."""
    return [(classes.id2label[s["category_id"]], m) for s, m in zip(example.segments, example.masks(), strict=True)]


def check(example, classes, *expected):
    objects = found(example, classes)
    assert [label for label, _ in objects] == [label for label, _ in expected]
    for (_, mask), (label, truth) in zip(objects, expected, strict=True):
        assert np.array_equal(mask, truth), label


# YOLO


def yolo_folder(root, text="0 0.2 0.25 0.7 0.25 0.7 0.75 0.2 0.75\n"):
    for split in ("train", "valid"):
        image(root / split / "images" / "a.jpg")
        image(root / split / "images" / "empty.jpg")
        write(root / split / "labels" / "a.txt", text)
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    return write(root / "data.yaml", yaml)


def test_a_yolo_export_of_roboflow_is_recognised_and_read(tmp_path):
    yaml = yolo_folder(tmp_path)
    settings = TrainingSettings(**recognise(tmp_path))
    assert settings.data == "yolo" and settings.classes == str(yaml)
    for split, folder in (("train", "train"), ("val", "valid")):
        dataset = load_split(settings, split)
        assert dataset.images == tmp_path / folder / "images"
        assert dataset.classes.id2label == {0: "cat", 1: "dog"} and dataset.classes.stuff_label_ids == []
        assert dataset.file_names() == ["a.jpg", "empty.jpg"]
        check(dataset[0], dataset.classes, ("cat", SQUARE))
        assert dataset[1].segments == () and (dataset[1].segmentation == BACKGROUND_ID).all()


def test_yolo_labels_of_ultralytics_layout_lie_where_its_rule_says(tmp_path):
    image(tmp_path / "images" / "train" / "a.png")
    write(tmp_path / "labels" / "train" / "a.txt", "1 0.2 0.25 0.7 0.25 0.7 0.75 0.2 0.75")
    write(
        tmp_path / "data.yaml", "path: /datasets/mine\ntrain: images/train\nval: images/train\nnames: {0: cat, 1: dog}"
    )
    settings = TrainingSettings(**recognise(tmp_path))
    assert settings.val_images is None  # the same images again are nothing to measure on
    check(load_split(settings, "train")[0], load_split(settings, "train").classes, ("dog", SQUARE))


def test_ultralytics_list_of_images_is_read_with_the_texts_where_its_rule_says(tmp_path):
    for name in ("images/train/a.png", "more/images/b.png"):
        image(tmp_path / name)
    write(tmp_path / "labels/train/a.txt", "1 0.2 0.25 0.7 0.25 0.7 0.75 0.2 0.75")
    write(tmp_path / "train.txt", f"\ufeff./images/train/a.png\n\n{tmp_path}/more/images/b.png\n")
    write(tmp_path / "data.yaml", "path: .\ntrain: train.txt\nnames: {0: cat, 1: dog}")
    settings = TrainingSettings(**recognise(tmp_path))
    assert settings.train_images == tmp_path / "train.txt" and settings.train_annotations is None
    dataset = load_split(settings, "train")
    assert dataset.file_names() == ["images/train/a.png", "more/images/b.png"]
    check(dataset[0], dataset.classes, ("dog", SQUARE))
    assert dataset[1].segments == ()
    write(tmp_path / "train.txt", "images/train/a.png\ngone.png\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt: 1 of 2 images are not there, first .*gone\.png"):
        YoloSegments(tmp_path / "train.txt", None, ["cat"])
    with pytest.raises(ValueError, match="labels=.*texts of a list of images lie where Ultralytics looks"):
        YoloSegments(tmp_path / "train.txt", tmp_path / "labels", ["cat"])


@pytest.mark.parametrize(
    "line, problem",
    [
        ("0 0.5 0.5 0.2 0.2", "has a box, of which no mask can be made; export segmentation"),
        ("0 0.1 0.1 0.2", "4 numbers that begin with 0; a line is a class"),
        ("0.5 0.1 0.1 0.2 0.2 0.3 0.1", "begin with 0.5; a line is a class, a whole number"),
        ("0 1 1 200 1 200 100", "has the coordinate 200.0; they are parts of width and height"),
        ("cat 0.1 0.1 0.2 0.2 0.3 0.1", "are not numbers"),
        ("0 nan 0.1 0.2 0.2 0.3 0.1", "has the coordinate nan"),
        ("7 0.1 0.1 0.2 0.2 0.3 0.1", "7 is not declared"),
    ],
)
def test_what_is_wrong_with_a_line_of_yolo_names_file_and_line(line, problem, tmp_path):
    yaml = yolo_folder(tmp_path, line)
    dataset = YoloSegments(tmp_path / "train/images", tmp_path / "train/labels", yaml)
    with pytest.raises(ValueError, match=rf"a\.txt.*{problem}"):
        dataset[0]
    write(tmp_path / "train/labels/b.txt", "")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 texts .* have no image .* first b\.txt"):
        YoloSegments(tmp_path / "train/images", tmp_path / "train/labels", yaml)


# labelme


def shape(label, points, kind="polygon", **more):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def labelme_file(path, *shapes, image_path="a.png", size=SIZE):
    content = {"version": "5.4.1", "flags": {}, "shapes": list(shapes), "imagePath": image_path, "imageData": None}
    return write(path, content | {"imageHeight": size[0], "imageWidth": size[1]})


CORNERS = [[12, 10], [42, 10], [42, 30], [12, 30]]


def test_every_shape_of_labelme_with_an_area_is_read_and_the_others_are_named(tmp_path, caplog):
    image(tmp_path / "a.png")
    stored = io.BytesIO()
    Image.fromarray(SQUARE[10:30, 12:42]).save(stored, format="PNG")
    labelme_file(
        tmp_path / "a.json",
        shape("polygon", CORNERS),
        shape("rectangle", [[42, 10], [12, 30]], "rectangle"),
        shape("mask", [[12, 10], [41, 29]], "mask", mask=base64.b64encode(stored.getvalue()).decode()),
        shape("circle", [[30, 20], [30, 28]], "circle"),
        shape("way", [[1, 1], [9, 9]], "line"),
        shape("__ignore__", CORNERS),
    )
    dataset = LabelmeFiles(tmp_path)
    row, column = np.mgrid[0.5:40, 0.5:60]
    circle = (row - 20) ** 2 + (column - 30) ** 2 <= 64
    check(
        dataset[0], dataset.classes, ("polygon", SQUARE), ("rectangle", SQUARE), ("mask", SQUARE), ("circle", circle)
    )
    assert "shapes[4] is a line, which has no area" in caplog.text
    assert "__ignore__" not in dataset.classes.id2label.values()


def test_shapes_of_a_group_are_one_object_and_a_flag_makes_crowds(tmp_path):
    image(tmp_path / "a.png")
    left, right = [[12, 10], [20, 10], [20, 30], [12, 30]], [[20, 10], [42, 10], [42, 30], [20, 30]]
    parts = [shape("cat", points, group_id=3) for points in (left, right)]
    labelme_file(tmp_path / "a.json", *parts, shape("cat", CORNERS, flags={"crowd": True}), shape("cat", CORNERS))
    dataset = LabelmeFiles(tmp_path)
    check(dataset[0], dataset.classes, *[("cat", SQUARE)] * 3)
    assert [segment["iscrowd"] for segment in dataset[0].segments] == [0, 1, 0]


def test_labelme_images_are_found_by_path_by_name_and_in_a_folder(tmp_path):
    image(tmp_path / "photos" / "a.png")
    labelme_file(tmp_path / "labels" / "a.json", shape("cat", CORNERS), image_path="..\\photos\\a.png")
    image(tmp_path / "labels" / "b.jpg")
    labelme_file(tmp_path / "labels" / "b.json", shape("dog", CORNERS), image_path="C:\\other\\machine\\b.jpg")
    dataset = LabelmeFiles(tmp_path / "labels")
    assert dataset.file_names() == ["a.png", "b.jpg"] and dataset.classes.id2label == {0: "cat", 1: "dog"}
    dataset.check(progress=False)
    labelme_file(tmp_path / "labels" / "c.json", shape("cat", CORNERS), image_path="c.png")
    with pytest.raises(FileNotFoundError, match=r"images of 1 of 3 files are not there: c\.json \(c\.png\)"):
        LabelmeFiles(tmp_path / "labels")
    image(tmp_path / "photos" / "c.png", (41, 60))
    with pytest.raises(
        ValueError, match=r"c\.png: the image is 41 x 60 \(height x width\) and its annotation 40 x 60"
    ):
        LabelmeFiles(tmp_path / "labels", tmp_path / "photos")[1 + 1]


def in_base64(picture):
    stored = io.BytesIO()
    picture.save(stored, format="PNG")
    return base64.b64encode(stored.getvalue()).decode()


def test_an_image_that_labelme_s_json_holds_is_read_where_no_file_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    path = labelme_file(tmp_path / "from" / "a.json", shape("cat", CORNERS), image_path="gone.jpg")
    content = json.loads(path.read_text()) | {"imageData": in_base64(Image.fromarray(pixels))}
    write(path, content)
    dataset = LabelmeFiles(tmp_path / "from")
    dataset.check_headers(progress=False)
    assert np.array_equal(dataset[0].image, pixels) and dataset.file_names() == ["a.png"]
    check(dataset[0], dataset.classes, ("cat", SQUARE))
    convert(dataset, tmp_path / "to", "coco-instances")
    back = load_split(TrainingSettings(**recognise(tmp_path / "to")), "train")
    assert np.array_equal(back[0].image, pixels)
    write(path, content | {"imageHeight": SIZE[0] + 1})
    with pytest.raises(
        ValueError, match=r"a\.json: the image is 40 x 60 \(height x width\) and its annotation 41 x 60"
    ):
        LabelmeFiles(tmp_path / "from")[0]
    write(path, content | {"imageData": "AAAA"})
    with pytest.raises(ValueError, match=r"a\.json: imageData is no image in base64"):
        LabelmeFiles(tmp_path / "from")[0]


def test_a_mask_of_a_thousand_megapixels_in_a_small_text_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    image(tmp_path / "a.png")
    for size in ((2000, 2000), (30, 20)):
        bomb = in_base64(Image.new("1", size))
        labelme_file(tmp_path / "a.json", shape("cat", [[12, 10], [12, 10]], "mask", mask=bomb))
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=rf"its mask has {size[1]} x {size[0]} pixels and its place 1 x 1"):
            LabelmeFiles(tmp_path).annotation(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1])
    bomb = in_base64(Image.new("1", (2000, 2000)))
    labelme_file(tmp_path / "a.json", shape("cat", [[12, 10], [12, 10]], "mask", mask=bomb))
    with pytest.raises(ValueError, match=r"shapes\[0\]: its mask is no image .*decompression bomb"):
        LabelmeFiles(tmp_path).draw(
            [(0, {"shape_type": "mask", "points": np.ones((2, 2)), "mask": bomb})], SIZE, "shapes"
        )


@pytest.mark.parametrize(
    "wrong, problem",
    [
        (
            shape("cat", CORNERS, flags={"crowd": "false"}),
            r"shapes\[0\], flags, has crowd='false'; it must be true or",
        ),
        (shape("cat", CORNERS[:2]), r"shapes\[0\]: a polygon of 2 points; it has 3 or more"),
        (shape("cat", [[1, "x"]]), r"shapes\[0\] has points=.*it must be a list of points"),
        (shape("cat", [[1e300, 0], *CORNERS]), r"shapes\[0\] has points=.*it must be a list of points"),
        (shape("", CORNERS), r"shapes\[0\] has label=''; it must be a text"),
        (shape("cat", [[12, 10], [41, 29]], "mask", mask="AAAA"), r"shapes\[0\]: its mask is no image in base64"),
    ],
)
def test_what_is_wrong_with_a_shape_names_file_and_shape(wrong, problem, tmp_path):
    image(tmp_path / "a.png")
    labelme_file(tmp_path / "a.json", wrong)
    with pytest.raises(ValueError, match=rf"a\.json: {problem}"):
        LabelmeFiles(tmp_path, classes=["cat"])[0]


# Maps in colours

ROAD, CAR = (128, 64, 128), (64, 0, 128)


def colour_folder(root, classes, name="classes.json", colours=(ROAD, CAR), maps="masks"):
    picture = Image.new("RGB", SIZE[::-1], colours[0])
    ImageDraw.Draw(picture).rectangle((12, 10, 41, 29), colours[1])
    image(root / "images" / "a.png")
    (root / maps).mkdir(parents=True)
    picture.save(root / maps / "a.png")
    return write(root / name, classes)


@pytest.mark.parametrize(
    "name, classes",
    [
        ("classes.json", {"classes": ["road", "car"], "void_id": 2, "colors": [ROAD, CAR, (0, 0, 0)]}),
        ("classes.json", [{"name": "road", "color": "#804080"}, {"name": "car", "color": CAR}]),
        ("colors.json", {"road": ROAD, "car": CAR, "Void": [0, 0, 0]}),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nroad:128,64,128::\ncar:64,0,128::\n"),
        ("class_dict.csv", "name,r,g,b\nroad,128,64,128\ncar,64,0,128\nVoid,0,0,0\n"),
    ],
)
def test_colours_of_every_tool_are_recognised_and_read(name, classes, tmp_path):
    colour_folder(tmp_path, classes, name)
    settings = TrainingSettings(**recognise(tmp_path))
    assert settings.data == "colour-maps"
    dataset = load_split(settings, "train")
    assert dataset.classes.id2label == {0: "road", 1: "car"} and dataset.task == "semantic"
    check(dataset[0], dataset.classes, ("road", ~SQUARE), ("car", SQUARE))


def test_names_alone_have_the_colours_of_voc_whose_border_is_void(tmp_path):
    # https://www.pascal-voc.org, VOCdevkit: aeroplane, person, tv/monitor and the border
    assert voc_palette(256)[[0, 1, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip
    colour_folder(tmp_path, ["background", "aeroplane"], colours=((128, 0, 0), (224, 224, 192)))
    dataset = ColourMaps(tmp_path / "images", tmp_path / "masks", ["background", "aeroplane"])
    check(dataset[0], dataset.classes, ("aeroplane", ~SQUARE))
    assert np.array_equal(dataset[0].void(), SQUARE)


def test_colours_that_are_no_class_are_counted_and_two_classes_have_two_colours(tmp_path):
    classes = colour_folder(tmp_path, {"road": ROAD, "car": (1, 2, 3)})
    with pytest.raises(
        ValueError, match=r"a\.png: has 1 colours that are no class, such as \[64, 0, 128\] \(600 pixels"
    ):
        ColourMaps(tmp_path / "images", tmp_path / "masks", classes)[0]
    with pytest.raises(ValueError, match=r"'car' and 'road' have the colour \[1, 2, 3\]"):
        ColourMaps(tmp_path / "images", tmp_path / "masks", {"road": (1, 2, 3), "car": (1, 2, 3)})


# GeoJSON and Label Studio


def test_geojson_of_qupath_is_read_with_holes_and_without_points(tmp_path):
    image(tmp_path / "a.png")
    hole = [[20, 15], [20, 20], [30, 20], [30, 15], [20, 15]]
    square = {"type": "Polygon", "coordinates": [[*CORNERS, CORNERS[0]], hole]}
    names = {"objectType": "detection", "classification": {"name": "Tumor", "color": [200, 0, 0]}, "isLocked": False}
    features = [
        {"type": "Feature", "id": "1b4f", "geometry": square, "properties": names},
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [3, 4]}, "properties": names},
    ]
    write(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": features})
    settings = TrainingSettings(**recognise(tmp_path))
    assert (settings.data, settings.classes) == ("geojson", ["Tumor"])
    expected = SQUARE.copy()
    expected[15:20, 20:30] = False
    dataset = load_split(settings, "train")
    check(dataset[0], dataset.classes, ("Tumor", expected))
    features[0]["properties"] = {"objectType": "detection"}
    write(tmp_path / "a.geojson", {"type": "FeatureCollection", "features": features})
    with pytest.raises(ValueError, match=r"a\.geojson: features\[0\] has no class"):
        GeoJsonFiles(tmp_path)


def studio_result(kind, label, **value):
    sizes = {"original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
    return {"type": kind, "from_name": "label", "to_name": "image", **sizes, "value": {kind: [label], **value}}


def test_label_studio_s_export_is_read_with_the_last_annotation_that_counts(tmp_path):
    percent = (np.array(CORNERS) / (60, 40) * 100).tolist()
    polygon = studio_result("polygonlabels", "cat", points=percent, closed=True)
    box = studio_result("rectanglelabels", "dog", x=20, y=25, width=50, height=50, rotation=0)
    tasks = [
        {
            "data": {"image": "/data/upload/3/0a1b2c3d-a.png"},
            "annotations": [
                {"was_cancelled": False, "result": [box]},
                {
                    "was_cancelled": False,
                    "result": [polygon, box, {"type": "choices", "value": {"choices": ["good"]}}],
                },
                {"was_cancelled": True, "result": []},
            ],
            "predictions": [{"result": [box]}],
        },
        {"data": {"image": "/data/local-files/?d=photos/b%20b.png"}, "predictions": [{"result": [box]}]},
    ]
    for name in ("a.png", "b b.png"):
        image(tmp_path / "photos" / name)
    source = write(tmp_path / "export.json", tasks)
    dataset = LabelStudioTasks(tmp_path / "photos", source)
    check(dataset[0], dataset.classes, ("cat", SQUARE), ("dog", SQUARE))
    check(dataset[1], dataset.classes, ("dog", SQUARE))


@pytest.mark.parametrize(
    "result, problem",
    [
        *[
            (studio_result("brushlabels", "cat", format="rle", rle=rle), "a brush whose code does not fill 40 x 60")
            for rle in ([0, 0, 37, 128, 57, 27, 252], [])
        ],
        *[
            (studio_result("brushlabels", "cat", format="rle", rle=rle), "has rle=.*; it must be a list of bytes")
            for rle in (None, "text", [300, 2], 10**9, [float("nan")])
        ],
        *[
            (studio_result("polygonlabels", "cat", points=points), "has points=.*; it must be a list of three or more")
            for points in (
                [[1, "x"]],
                [[1, 1], [9, 9]],
                [[1, 1], [9, 9], [1e7, 0]],
                [[1, 1], [9, 9], [float("nan"), 0]],
            )
        ],
        (studio_result("rectanglelabels", "cat", x=1, y=1, width=5, height=5, rotation=30), "a turned rectangle"),
        (studio_result("polygonlabels", None, points=[]), r"has polygonlabels=\[None\]; it must be a list of labels"),
    ],
)
def test_what_is_wrong_with_a_result_of_label_studio_names_the_file(result, problem, tmp_path):
    image(tmp_path / "photos" / "a.png")
    source = write(tmp_path / "export.json", [{"data": {"image": "a.png"}, "annotations": [{"result": [result]}]}])
    with pytest.raises(ValueError, match=rf"export\.json.*{problem}"):
        LabelStudioTasks(tmp_path / "photos", source, classes="cat")[0]


# Round trips


def targets(dataset, index):
    example = dataset.annotation(index)
    masks = masks_of_example(example, dataset.classes.id2label)
    return Counter((mask.label, mask.iscrowd, mask.box, mask.mask.tobytes()) for mask in masks)


def some(dataset, count):
    """A reader of files with its first examples alone."""
    length = min(count, len(dataset))
    dataset.__class__ = type("Some", (type(dataset),), {"__len__": lambda self: length})
    return dataset


REAL = {  # kind of data -> reader, and its arguments below ../shared/data
    "instance": (CocoInstances, "nuclei_dsb2018/images/val", "nuclei_dsb2018/annotations/instances_val.json"),
    "crowds": (CocoInstances, "objects_cc0/val", "objects_cc0/annotations/instances_val.json"),  # and overlaps
    "panoptic": (
        CocoPanoptic,
        "coco_panoptic/val",
        "coco_panoptic/annotations/panoptic_val.json",
        "coco_panoptic/panoptic_val",
    ),
    "semantic": (LabelMaps, "camvid/images/val", "camvid/labels/val", "camvid/classes.json"),
}
OF_OBJECTS = ("coco-instances", "yolo", "labelme", "geojson", "label-studio", "parquet")
ROUND_TRIPS = [
    *[("instance", name) for name in ("instance-maps", *OF_OBJECTS)],
    *[("crowds", name) for name in OF_OBJECTS],
    *[("panoptic", name) for name in ("coco-panoptic", "labelme", "yolo")],
    *[("semantic", name) for name in ("label-maps", "colour-maps", "geojson")],
]
WITHOUT_CROWDS = ("yolo", "label-studio")


@needs_data
@pytest.mark.parametrize("name, format", ROUND_TRIPS)
def test_real_data_have_the_same_targets_after_a_round_trip(name, format, tmp_path):
    pytest.importorskip("shapely")
    reader, *paths = REAL[name]
    dataset = some(reader(*(DATA / path for path in paths)), 7 if name == "crowds" else 2)
    lost = convert(dataset, tmp_path, format, "train")
    back = load_split(TrainingSettings(**recognise(tmp_path)), "train")
    assert len(back) == len(dataset) and set(back.classes.id2label.values()) == set(dataset.classes.id2label.values())
    places = {back.annotation(index).file_name.split("/")[-1]: index for index in range(len(back))}
    crowds = 0
    for index in range(len(dataset)):
        before = targets(dataset, index)
        crowds += sum(key[1] for key in before)
        if format in WITHOUT_CROWDS:
            before = Counter(key for key in before.elements() if not key[1])
        assert targets(back, places[dataset.annotation(index).file_name.split("/")[-1]]) == before
    assert sum(lost.values()) == (crowds if format in WITHOUT_CROWDS else 0)


def test_background_of_objects_becomes_a_class_of_semantic_maps(tmp_path):
    image(tmp_path / "from" / "a.png")
    labelme_file(tmp_path / "from" / "a.json", shape("cat", CORNERS))
    assert convert(LabelmeFiles(tmp_path / "from"), tmp_path / "to", "label-maps") == {}
    settings = TrainingSettings(**recognise(tmp_path / "to"))
    dataset = load_split(settings, "train")
    check(dataset[0], dataset.classes, ("cat", SQUARE), ("background", ~SQUARE))


def test_what_is_hidden_is_counted_and_images_without_files_are_written(tmp_path):
    scenes = ScenesDataset(2, size=48)
    scenes.classes, scenes.task = load_split(TrainingSettings(data="scenes"), "train").classes, "panoptic"
    assert convert(scenes, tmp_path / "a", "coco-panoptic") == {}
    back = load_split(TrainingSettings(**recognise(tmp_path / "a")), "train")
    assert np.array_equal(back[1].image, scenes[1].image) and len(back[1].segments) == len(scenes[1].segments)
    image(tmp_path / "b" / "a.png")
    labelme_file(tmp_path / "b" / "a.json", shape("cat", CORNERS), shape("dog", CORNERS))
    (count,) = convert(LabelmeFiles(tmp_path / "b"), tmp_path / "c", "coco-panoptic").values()
    assert count == SQUARE.sum()
    with pytest.raises(ValueError, match="2 classes: a map of object numbers says no class"):
        convert(LabelmeFiles(tmp_path / "b"), tmp_path / "d", "instance-maps")


def test_geojson_in_the_coordinates_of_a_map_is_read_back_in_pixels(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[33550], tags[33922] = (0.3, 0.3, 0.0), (0.0, 0.0, 0.0, 412345.6, 5234567.8, 0.0)  # 0.3 m, upper left corner
    tags.tagtype |= {33550: 12, 33922: 12}
    (tmp_path / "from").mkdir()
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "from" / "a.tif", tiffinfo=tags)
    labelme_file(tmp_path / "from" / "a.json", shape("cat", CORNERS), image_path="a.tif")
    convert(LabelmeFiles(tmp_path / "from"), tmp_path / "to", "geojson")
    feature = json.loads((tmp_path / "to/train/a.geojson").read_text())["features"][0]
    assert np.allclose(np.min(feature["geometry"]["coordinates"][0], axis=0), (412345.6 + 3.6, 5234567.8 - 9.0))
    dataset = GeoJsonFiles(tmp_path / "to/train")
    check(dataset[0], dataset.classes, ("cat", SQUARE))
