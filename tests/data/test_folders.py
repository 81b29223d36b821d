"""Readers of folders on small generated ones: image modes, label maps, id maps, and what is wrong with files."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from mask2former_hf.data.classes import BACKGROUND_ID, IGNORE, ClassTable
from mask2former_hf.data.folders import InstanceMaps, LabelMaps

LABELS = {0: IGNORE, 1: "road", 300: "car"}


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path, **options)


def save_json(path, data):
    path.write_text(json.dumps(data))
    return path


def noise(height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Images


def label_folder(tmp_path, names=("a", "b"), dtype=np.uint8, ending=".png"):
    """Images and label maps with 0, 1 and, where it fits, 300."""
    rng = np.random.default_rng(0)
    for name in names:
        save(tmp_path / "images" / f"{name}.jpg", noise())
        values = [0, 1] if dtype == np.uint8 else [0, 1, 300]
        save(tmp_path / "maps" / f"{name}{ending}", rng.choice(values, (6, 8)).astype(dtype))
    return tmp_path / "images", tmp_path / "maps"


def test_images_of_every_mode_become_upright_rgb(tmp_path):
    images, maps = label_folder(tmp_path, names=())
    rgb = noise()
    turned = Image.Exif()
    turned[0x0112] = 6  # stored rotated: turn by 90 degrees clockwise to view
    grey = rgb[..., 0]
    expected = {
        "alpha": rgb,
        "grey": np.stack([grey] * 3, -1),
        "turned": np.rot90(rgb, -1),
        "bits": np.full((6, 8, 3), 255),
    }
    save(images / "alpha.png", np.dstack([rgb, grey]))
    save(images / "grey.png", grey)
    save(images / "turned.png", rgb, exif=turned)
    save(images / "bits.png", np.ones((6, 8), dtype=bool))
    for name, image in expected.items():
        save(maps / f"{name}.png", np.ones(image.shape[:2], dtype=np.uint8))
    for example in LabelMaps(images, maps, LABELS):
        assert example.image.dtype == np.uint8
        assert example.image.flags.writeable
        assert (example.image == expected[example.image_id]).all()


def test_16_bits_are_read_as_the_processor_reads_them_and_fractions_are_refused(tmp_path):
    images, maps = label_folder(tmp_path, names=())
    save(images / "a.png", np.full((6, 8), 1000, dtype=np.uint16))
    save(images / "b.tif", np.full((6, 8), 0.5, dtype=np.float32))
    for name in "ab":
        save(maps / f"{name}.png", np.ones((6, 8), dtype=np.uint8))
    dataset = LabelMaps(images, maps, LABELS)
    assert (dataset[0].image == 4).all()  # 1000 / 257 = 3.9
    with pytest.raises(ValueError, match=r"b\.tif: image is float32 from 0.5 to 0.5; .* scale it first"):
        dataset[1]


# Label maps


@pytest.mark.parametrize(
    ("dtype", "ending"), [(np.uint8, ".png"), (np.uint16, ".png"), (np.uint16, ".tif"), (np.int32, ".tiff")]
)
def test_label_maps_of_8_and_16_bits(tmp_path, dtype, ending):
    images, maps = label_folder(tmp_path, dtype=dtype, ending=ending)
    for example in LabelMaps(images, maps, LABELS):
        labels = np.asarray(Image.open(maps / f"{example.image_id}{ending}"))
        assert (example.segmentation == (labels == 1) + 2 * (labels == 300)).all()
        present = [(0, (labels == 1).sum()), (1, (labels == 300).sum())]
        assert [(s["id"] - 1, s["category_id"], s["area"]) for s in example.segments] == [
            (index, index, area) for index, area in present if area
        ]


def test_palette_positions_are_labels(tmp_path):
    images, maps = label_folder(tmp_path, names=("a",))
    labels = np.asarray(Image.open(maps / "a.png"))
    palette = Image.fromarray(labels).convert("P")
    palette.putdata(labels.ravel().tolist())
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.save(maps / "a.png")
    assert (LabelMaps(images, maps, LABELS)[0].segmentation == labels).all()


def test_undeclared_labels_are_an_error_that_lists_them_with_the_file(tmp_path):
    images, maps = label_folder(tmp_path, dtype=np.uint16)
    dataset = LabelMaps(images, maps, {1: "road"})
    with pytest.raises(ValueError, match=r"a\.png: has the labels \[0, 300\] that are not declared; give each a name"):
        dataset[0]
    with pytest.raises(ValueError, match=r"2 of 2 examples cannot be used:\n- .*a\.png.*\n- .*b\.png"):
        dataset.check(progress=False)


def test_cityscapes_suffixes_and_city_folders(tmp_path):
    save(tmp_path / "images" / "ulm" / "ulm_0_1_leftImg8bit.png", noise())
    save(tmp_path / "maps" / "ulm" / "ulm_0_1_gtFine_labelIds.png", np.full((6, 8), 26, dtype=np.uint8))
    save(tmp_path / "maps" / "ulm" / "ulm_0_1_gtFine_instanceIds.png", np.full((6, 8), 26001, dtype=np.uint16))
    classes = ClassTable.load("cityscapes-semantic")
    folders = tmp_path / "images", tmp_path / "maps"
    with pytest.raises(FileNotFoundError, match="or give image_suffix and map_suffix"):
        LabelMaps(*folders, classes)
    example = LabelMaps(*folders, classes, image_suffix="_leftImg8bit", map_suffix="_gtFine_labelIds")[0]
    assert (example.image_id, example.segments[0]["category_id"]) == ("ulm/ulm_0_1", 13)


def test_missing_empty_double_and_unfit_files_are_named(tmp_path):
    images, maps = label_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder, where the images should be"):
        LabelMaps(tmp_path / "nowhere", maps, LABELS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no maps here"):
        LabelMaps(images, tmp_path / "empty", LABELS)
    save(images / "c.jpg", noise())
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images have no map in .*, first c\.jpg"):
        LabelMaps(images, maps, LABELS)
    save(maps / "c.png", np.ones((6, 9), dtype=np.uint8))
    save(maps / "d.png", np.ones((6, 8), dtype=np.uint8))
    with pytest.raises(FileNotFoundError, match=r"1 of 4 maps have no image in .*, first d\.png"):
        LabelMaps(images, maps, LABELS)
    (images / "d.jpg").write_bytes(b"no image")
    dataset = LabelMaps(images, maps, LABELS)  # opens nothing
    with pytest.raises(ValueError, match=r"c\.jpg: the image is 6 x 8 \(height x width\) and its annotation 6 x 9"):
        dataset[2]
    with pytest.raises(OSError, match=r"d\.jpg: not a readable image"):
        dataset[3]
    with pytest.raises(ValueError, match="2 of 4 examples cannot be used"):
        dataset.check(progress=False)
    save(maps / "a.tif", np.ones((6, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"has a\.png and a\.tif: remove one"):
        LabelMaps(images, maps, LABELS)


def test_headers_show_files_that_cannot_be_opened_and_sizes_that_differ_before_a_run(tmp_path):
    images, maps = label_folder(tmp_path, names=("a", "b", "c", "d", "e"))
    dataset = LabelMaps(images, maps, LABELS)
    dataset.check_headers(progress=False)
    turned = Image.Exif()
    turned[0x0112] = 6
    save(images / "a.jpg", noise(7, 8))
    save(images / "b.jpg", noise(), exif=turned)  # its map was drawn on the stored pixels
    save(images / "c.jpg", noise(8, 6), exif=turned)  # upright, it has the size of its map
    (images / "d.jpg").write_bytes(b"no image")
    whole = (images / "e.jpg").read_bytes()
    (images / "e.jpg").write_bytes(whole[: len(whole) - 40])
    with pytest.raises(ValueError, match="3 of 5 examples cannot be used") as caught:
        dataset.check_headers(progress=False)
    first, second, third = str(caught.value).split("\n")[1:]
    assert "a.jpg: the image is 7 x 8 (height x width) and its annotation 6 x 8" in first
    assert "b.jpg: the image is 8 x 6" in second and "EXIF" in second
    assert "d.jpg: not a readable image" in third
    with pytest.raises(OSError, match=r"e\.jpg: not a readable image .*truncated"):
        dataset[4]  # headers do not show it, reading names it


def test_colours_are_no_label_map(tmp_path):
    images, maps = label_folder(tmp_path, names=("a",))
    save(maps / "a.png", noise())
    with pytest.raises(ValueError, match=r"a\.png: mode RGB is not a map of ids"):
        LabelMaps(images, maps, LABELS)[0]


# Id maps


def id_folder(tmp_path):
    """Background 0 and the ids 1, 5 and 600 in each of two images."""
    for name in ("a", "b"):
        save(tmp_path / "images" / f"{name}.png", noise())
        ids = np.zeros((6, 8), dtype=np.uint16)
        ids[0], ids[1, :3], ids[2:4] = 1, 5, 600
        save(tmp_path / "maps" / f"{name}.png", ids)
    return tmp_path / "images", tmp_path / "maps"


def test_ids_are_one_class_or_follow_a_table(tmp_path):
    folders = id_folder(tmp_path)
    example = InstanceMaps(*folders, "cell")[0]
    assert np.unique(example.segmentation).tolist() == [BACKGROUND_ID, 1, 5, 600]
    assert [(s["id"], s["category_id"], s["area"]) for s in example.segments] == [
        (1, 0, 8),
        (5, 0, 3),
        (600, 0, 16),
    ]
    rows = {1: "dog", 5: "cat", 600: "dog"}
    save_json(tmp_path / "table.json", rows)
    (tmp_path / "table.csv").write_text("id,class\n" + "".join(f"{number},{name}\n" for number, name in rows.items()))
    (tmp_path / "images.csv").write_text(
        "image,id,class\n" + "".join(f"{image},{n},{name}\n" for image in "ab" for n, name in rows.items())
    )
    for table in (rows, {"a": rows, "b": rows}, *(tmp_path / n for n in ("table.json", "table.csv", "images.csv"))):
        dataset = InstanceMaps(*folders, ["cat", "dog"], table)
        assert [s["category_id"] for s in dataset[1].segments] == [1, 0, 1]
        assert dataset.classes.stuff_label_ids == []


def test_an_id_without_a_class_is_an_error_that_names_it(tmp_path):
    folders = id_folder(tmp_path)
    with pytest.raises(ValueError, match=r"a\.png: has the ids \[5, 600\] that the table does not declare"):
        InstanceMaps(*folders, ["cat", "dog"], {1: "dog"})[0]
    with pytest.raises(ValueError, match="'cow' is not declared"):
        InstanceMaps(*folders, ["cat", "dog"], {1: "cow"})
    with pytest.raises(ValueError, match="table has no entry for 1 images, the first is 'b'"):
        InstanceMaps(*folders, ["cat", "dog"], {"a": {1: "cat"}})
    with pytest.raises(ValueError, match="2 classes: give a table"):
        InstanceMaps(*folders, ["cat", "dog"])


def test_cityscapes_instance_ids_hold_class_and_crowd(tmp_path):
    ids = np.array([[26001, 26001, 26002, 24], [7, 0, 24000, 33]])
    save(tmp_path / "images" / "a.png", noise(2, 4))
    save(tmp_path / "maps" / "a.png", ids.astype(np.uint16))
    classes = ClassTable.load("cityscapes-instance")
    example = InstanceMaps(tmp_path / "images", tmp_path / "maps", classes, divisor=1000)[0]
    found = [(s["id"], classes.id2label[s["category_id"]], s["iscrowd"]) for s in example.segments]
    assert found == [
        (24, "person", 1),
        (33, "bicycle", 1),
        (24000, "person", 0),
        (26001, "car", 0),
        (26002, "car", 0),
    ]
    assert (example.segmentation == np.where(np.isin(ids, [0, 7]), BACKGROUND_ID, ids)).all()


# Workers


def test_worker_processes_read_the_same(tmp_path):
    folders = label_folder(tmp_path, names="abcde")
    dataset = LabelMaps(*folders, LABELS)
    for copy in (pickle.loads(pickle.dumps(dataset)), DataLoader(dataset, batch_size=None, num_workers=2)):
        for one, other in zip(dataset, copy, strict=True):
            assert one.image_id == other.image_id
            assert (np.asarray(other.segmentation) == one.segmentation).all()
    with pytest.raises(IndexError, match="there are 5 examples, 0 to 4"):
        dataset[5]
