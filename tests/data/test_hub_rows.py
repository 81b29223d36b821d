"""Rows of a data set as people have them: every field with every wrong value is read or refused with the row."""

import io

import numpy as np
import pytest
from PIL import Image
from wrong_values import VALUES, assert_names, changed, places

from mask2former_hf.data.classes import ClassTable
from mask2former_hf.data.hub_dataset import HubDataset

pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
H, W = 6, 8


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "png")
    return stream.getvalue()


PHOTO = {"bytes": png(np.full((H, W, 3), 90, np.uint8)), "path": None}
MAP = {"bytes": png(np.full((H, W, 3), [9, 0, 0], np.uint8)), "path": None}
LABELS = {"bytes": png(np.full((H, W), 7, np.uint8)), "path": None}
OBJECT = {
    "id": 5,
    "category_id": 7,
    "iscrowd": 0,
    "area": 16,
    "bbox": [1, 1, 4, 4],
    "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]],
}
RUNS = {"category": "dog", "mask": {"size": [H, W], "counts": [7, 4, 37]}}
KINDS = {
    "semantic": ({"key": 1, "image": PHOTO, "map": LABELS}, {"label": "map"}),
    "panoptic": (
        {"key": 1, "image": PHOTO, "map": MAP, "info": [{"id": 9, "category_id": 7, "iscrowd": 0}]},
        {"label": "map", "segments_info": "info"},
    ),
    "instances": ({"key": 1, "image": PHOTO, "objects": [OBJECT, RUNS]}, {"objects": "objects"}),
}
CLASSES = ClassTable.from_labels({7: "dog", 8: "cat"}, things=["dog", "cat"])
FIELDS = [(kind, path) for kind, (row, _) in KINDS.items() for path in places(row)]


def read(row, kind, **options):
    dataset = HubDataset([row], CLASSES, image_id="key", **KINDS[kind][1] | options)
    return dataset[0]


@pytest.mark.parametrize("kind, path", FIELDS, ids=[f"{kind}-{'.'.join(map(str, path))}" for kind, path in FIELDS])
def test_every_field_with_every_wrong_value_is_read_or_refused_with_the_row(kind, path):
    for value in VALUES.values():
        try:
            example = read(changed(KINDS[kind][0], path, value), kind)
        except ValueError as error:
            assert_names(error, "row ")
            continue
        except FileNotFoundError as error:  # a name that could be one
            assert path[-1] == "path" and value == "x" or "x" in str(error), (value, error)
            continue
        assert example.image.shape == (H, W, 3) and example.size == (H, W)
        assert all(segment["category_id"] in (0, 1) for segment in example.segments)
        assert all(segment["iscrowd"] in (0, 1) for segment in example.segments)


@pytest.mark.parametrize(
    "kind, path, value, rule",
    [
        ("semantic", ("key",), [], r"row 0 has key=\[\]; it must be a whole number or a text"),
        ("semantic", ("image",), 5, "row 1, image: a int is not an image; cast the column with datasets.Image"),
        ("semantic", ("image", "bytes"), b"x", "row 1, image: not a readable image .*leave the row out"),
        ("semantic", ("map", "bytes"), PHOTO["bytes"][:40], "row 1, map: not a readable image"),
        ("panoptic", ("info",), "x", "row 1: info is 'x'; it must be a list of dicts, or a dict of lists"),
        ("panoptic", ("info", 0, "id"), 1.5, r"row 1: info\[0\] has id=1.5; it must be a whole number from 1"),
        ("panoptic", ("info", 0, "iscrowd"), 7, r"row 1: info\[0\] has iscrowd=7; it must be 0 or 1"),
        ("instances", ("objects", 0), 5, r"row 1: objects\[0\] is 5; it must have the fields category_id"),
        ("instances", ("objects", 0, "area"), float("nan"), r"objects\[0\] has area=nan"),
        ("instances", ("objects", 0, "category_id"), 1.5, r"objects\[0\] has category_id=1.5"),
        ("instances", ("objects", 0, "segmentation"), 1.5, r"row 1: objects\[0\]: the mask of an object"),
    ],
)
def test_the_message_names_row_column_value_and_rule(kind, path, value, rule):
    with pytest.raises(ValueError, match=rule):
        read(changed(KINDS[kind][0], path, value), kind)


def test_numbers_of_numpy_are_numbers():
    entry = {key: np.asarray(value) if key != "segmentation" else value for key, value in OBJECT.items()}
    plain, numpy = (read(KINDS["instances"][0] | {"objects": [one]}, "instances") for one in (OBJECT, entry))
    assert plain.segments == numpy.segments


@pytest.mark.parametrize("outside", ["../secret.png", "{}/secret.png", "link.png"])
def test_a_path_that_leaves_the_folder_of_the_data_set_is_never_opened(tmp_path, outside):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (tmp_path / "secret.png", folder / "a.png"):
        path.write_bytes(PHOTO["bytes"])
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    row = KINDS["semantic"][0]
    for inside in ("a.png", str(folder / "a.png")):
        assert read(row | {"image": {"bytes": None, "path": inside}}, "semantic", folder=folder).size == (H, W)
    with pytest.raises(ValueError, match="row 1, image: .* points out of the data set's folder"):
        read(row | {"image": {"bytes": None, "path": outside.format(tmp_path)}}, "semantic", folder=folder)
