"""COCO json by hand: every encoding of masks, overlaps, crowds, and what is wrong in files."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from mask2former_hf.data.annotations import decode_mask, stack_masks
from mask2former_hf.data.classes import BACKGROUND_ID, ClassTable
from mask2former_hf.data.coco import CocoInstances, CocoPanoptic
from mask2former_hf.data.reader import PackedRecords
from mask2former_hf.data.rle import read_counts, to_rle
from mask2former_hf.data.statistics import look_through

mask_tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
H, W = 20, 30
CATEGORIES = [{"id": 90, "name": "sky", "isthing": 0}, {"id": 7, "name": "dog", "isthing": 1}]


def box(top, left, bottom, right):
    mask = np.zeros((H, W), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def polygon(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def compressed(mask):
    rle = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def runs(mask):
    """Run lengths column by column, beginning with zeros."""
    flat, counts, value = mask.T.ravel(), [0], False
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": [H, W], "counts": counts}


@pytest.fixture
def instances(tmp_path):
    """Two images of noise, the second without objects; a function that writes changed annotations and reads them."""
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)).save(tmp_path / name)
    data = {
        "images": [{"id": n, "file_name": f"{name}.png", "height": H, "width": W} for n, name in ((5, "a"), (2, "b"))],
        "annotations": [],
        "categories": copy.deepcopy(CATEGORIES),
    }

    def read(annotations, change=lambda data: None, **options):
        data["annotations"] = [
            {"id": 10**12 + k, "image_id": 5, "category_id": 7, **a} for k, a in enumerate(annotations)
        ]
        change(data)
        (tmp_path / "instances.json").write_text(json.dumps(data))
        return CocoInstances(tmp_path, tmp_path / "instances.json", **options)

    return read


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask():
    corners = (3, 4, 12, 20)
    expected = box(*corners)
    for segmentation in (polygon(*corners), compressed(expected), runs(expected)):
        assert (decode_mask(segmentation, (H, W), "here") == expected).all()
    encoded = mask_tools.decode(mask_tools.frPyObjects(runs(expected), H, W))
    assert (encoded == expected).all()


def test_compressed_run_lengths_of_any_mask_are_read():
    rng = np.random.default_rng(0)
    for height, width, share in (
        (1, 1, 0.0),
        (1, 1, 1.0),
        (7, 5, 0.5),
        (300, 200, 0.001),
        (40, 900, 0.9),
        (60, 50, 0.0),
    ):
        mask = rng.random((height, width)) < share
        assert (decode_mask(compressed(mask), mask.shape, "here") == mask).all()


def test_a_mask_of_several_polygons_is_their_union():
    mask = decode_mask(polygon(0, 0, 5, 5) + polygon(3, 3, 9, 9), (H, W), "here")
    assert (mask == (box(0, 0, 5, 5) | box(3, 3, 9, 9))).all()


def test_polygons_of_one_or_two_points_are_empty_not_boxes():
    assert not decode_mask([[1, 1], [2, 2, 9, 9]], (H, W), "here").any()


def test_malformed_masks_are_named():
    with pytest.raises(ValueError, match="here: a polygon of 7 numbers"):
        decode_mask([[1, 2, 3, 4, 5, 6, 7]], (H, W), "here")
    with pytest.raises(
        ValueError, match=r"here: an RLE of size \[30, 20\] for an image of height and width \[20, 30\]"
    ):
        decode_mask({"size": [W, H], "counts": [W * H]}, (H, W), "here")
    for text, total in (("", 0), ("52", 7)):
        with pytest.raises(ValueError, match=f"counts of an RLE sum to {total}, not to"):
            decode_mask({"size": [H, W], "counts": text}, (H, W), "here")
    with pytest.raises(ValueError, match="counts of an RLE sum to 5, not to H \\* W = 600"):
        decode_mask({"size": [H, W], "counts": [2, 3]}, (H, W), "here")


@pytest.mark.parametrize(
    "counts",
    [
        [2**63 - 1, 2**63 - 1, 2002],  # wraps to 2000 in 64 bits
        [2**62] * 4 + [2000],
        [2**64 - 1, 2001],
        [2**70],
        [-1, 2001],
        [1000, 2000, -1000],
        [[2000]],
        [[1], [2, 3]],
        [2000.0],
        [True] * 2000,
        "o" * 30 + "0",  # a number of 150 bits
        "oooooooooooooN",
        "\x7f\xff",
        "zzzzzzzz",
        {"a": 1},
        5,
    ],
)
def test_run_lengths_that_leave_the_mask_are_refused_before_anything_is_added(counts):
    with pytest.raises(ValueError, match="here: "):
        decode_mask({"size": [40, 50], "counts": counts}, (40, 50), "here")
    with pytest.raises(ValueError, match="segmentation: "):
        to_rle({"size": [40, 50], "counts": counts})


def test_random_texts_are_run_lengths_or_refused():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = bytes(rng.integers(48, 112, rng.integers(0, 20)).tolist()).decode()
        try:
            runs = read_counts({"size": [4, 5], "counts": text}, "here")
        except ValueError:
            continue
        assert runs.min() >= 0 and runs.sum() == 20


def test_sizes_without_end_take_no_memory(instances):
    size = [10**6, 10**6]
    objects = [{"segmentation": {"size": size, "counts": [10**12]}}]
    dataset = instances(objects, lambda data: data["images"][0].update(height=10**6, width=10**6))
    for read in (dataset.annotation, dataset.__getitem__):
        with pytest.raises(ValueError, match=r"a\.png: the image is 20 x 30 .* its annotation 1000000 x 1000000"):
            read(0)
    with pytest.raises(ValueError, match="1000000000000000000 pixels; images have at most"):
        read_counts({"size": [10**9, 10**9], "counts": [10**18]}, "here")


def test_a_list_of_run_lengths_is_united():
    parts = box(0, 0, 5, 5), box(3, 3, 9, 9)
    mask = decode_mask([compressed(parts[0]), runs(parts[1])], (H, W), "here")
    assert (mask == (parts[0] | parts[1])).all()


def test_disjoint_masks_share_a_layer_and_overlapping_ones_stay_complete():
    chain = [box(0, 0, 5, 10), box(0, 8, 5, 18), box(0, 16, 5, 26)]  # 1 meets 2 meets 3
    assert stack_masks([chain[0], chain[2]], (H, W)).shape == (H, W)
    layers = stack_masks(chain, (H, W))
    assert layers.shape == (2, H, W)
    for number, mask in enumerate(chain, 1):
        assert ((layers == number).any(0) == mask).all()
    assert stack_masks([box(0, 0, 9, 9)] * 3, (H, W)).shape == (3, H, W)
    assert (stack_masks([], (H, W)) == BACKGROUND_ID).all()


def test_random_masks_lie_complete_on_a_layer_each():
    rng = np.random.default_rng(0)
    for _ in range(20):
        masks = [np.kron(rng.random((4, 6)) < 0.2, np.ones((5, 5))).astype(bool) for _ in range(12)]
        layers = stack_masks(masks, (H, W))
        layers = layers[None] if layers.ndim == 2 else layers
        for number, mask in enumerate(masks, 1):
            on = [layer for layer in layers if (layer == number).any()]
            assert len(on) == mask.any()
            assert not on or ((on[0] == number) == mask).all()
        assert max(sum(masks).ravel()) <= len(layers) <= len(masks)


def test_crowds_overlaps_and_images_without_objects(instances):
    crowd = {"segmentation": runs(box(0, 0, 10, 30)), "iscrowd": 1, "area": 300, "bbox": [0, 0, 30, 10]}
    dataset = instances([{"segmentation": polygon(2, 2, 8, 8), "category_id": 90}, crowd])
    first, second = dataset
    assert first.segmentation.shape == (2, H, W)
    assert list(first.segments) == [
        {"id": 1, "category_id": 1, "isthing": 1, "iscrowd": 0, "area": 36, "annotation_id": 10**12},
        {
            "id": 2,
            "category_id": 0,
            "isthing": 1,
            "iscrowd": 1,
            "area": 300,
            "bbox": [0, 0, 30, 10],
            "annotation_id": 10**12 + 1,
        },
    ]
    assert (second.image_id, second.segments) == (2, ())
    assert (second.segmentation == BACKGROUND_ID).all()
    assert look_through(dataset).pixels == tuple([0, 36])
    assert len(instances([crowd], skip_empty=False)) == 2
    with pytest.raises(ValueError, match="no image with an object"):
        instances([crowd], skip_empty=True)
    assert len(instances([{**crowd, "iscrowd": 0}], skip_empty=True)) == 1
    assert pickle.loads(pickle.dumps(dataset))[0].segments == first.segments


@pytest.mark.parametrize(
    ("annotation", "change", "message"),
    [
        ({"segmentation": []}, None, r"1 annotations have no segmentation, such as the ids \[1000000000000\]"),
        ({"category_id": 8}, None, r"category_id \[8\] .* is not among the categories; add it there"),
        ({"image_id": 77}, None, "annotations have the image_id 77, which images does not list"),
        ({}, lambda data: data.update(categories=[]), "no categories; add them to the json"),
        ({}, lambda data: data["images"].append(data["images"][0]), "1 image ids occur twice"),
        ({}, lambda data: data.update(images=[], annotations=[]), "no image, there is nothing to read"),
        ({}, lambda data: data["images"][1].pop("width"), r"images\[1\] has no width; add it"),
        ({}, lambda data: data.pop("images"), "not a COCO json, .* there is no images"),
        ({}, lambda data: data["images"][0].update(file_name="c.png"), r"1 of 2 images .* are not there: c\.png"),
    ],
)
def test_an_inconsistent_instance_json_is_refused_at_once(instances, annotation, change, message):
    base = {"segmentation": polygon(0, 0, 5, 5)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        instances([base | annotation], change or (lambda data: None))


def test_an_image_of_another_size_than_the_json_says(instances):
    dataset = instances([], lambda data: data["images"][0].update(height=W, width=H))
    with pytest.raises(ValueError, match=r"a\.png: the image is 20 x 30 .* its annotation 30 x 20.*EXIF"):
        dataset[0]


@pytest.fixture
def panoptic(tmp_path):
    """An image with the segments 1, 300 (crowd) and 70000, and void; a function that writes changes and reads them."""
    ids = np.zeros((H, W), dtype=np.int64)
    ids[:5], ids[5:10], ids[10:15] = 1, 300, 70000
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(png).save(tmp_path / "a_map.png")
    Image.fromarray(png).save(tmp_path / "a.png")
    segments = [
        {"id": 1, "category_id": 90},
        {"id": 300, "category_id": 7, "iscrowd": 1},
        {"id": 70000, "category_id": 7, "iscrowd": 0},
    ]
    data = {
        "images": [{"id": "a", "file_name": "a.png"}],
        "annotations": [{"image_id": "a", "file_name": "a_map.png", "segments_info": segments}],
        "categories": copy.deepcopy(CATEGORIES),
    }

    def read(change=lambda data, segments: None, **options):
        change(data, segments)
        (tmp_path / "panoptic.json").write_text(json.dumps(data))
        return CocoPanoptic(tmp_path, tmp_path / "panoptic.json", tmp_path, **options)

    return read


def test_sparse_panoptic_categories_become_indices_in_the_order_of_ids(panoptic):
    dataset = panoptic()
    assert [tuple(row) for row in dataset.classes.rows] == [(0, 7, "dog", True), (1, 90, "sky", False)]
    example = dataset[0]
    assert [tuple(segment.values()) for segment in example.segments] == [
        (1, 1, 0, 0, 150),
        (300, 0, 1, 1, 150),
        (70000, 0, 1, 0, 150),
    ]
    assert np.unique(example.segmentation).tolist() == [0, 1, 300, 70000]
    assert look_through(dataset).pixels == tuple([150, 150])


def test_a_category_that_the_table_ignores_becomes_void(panoptic):
    example = panoptic(classes=ClassTable.from_labels({7: "dog", 90: None}, things=["dog"]))[0]
    assert np.unique(example.segmentation).tolist() == [0, 300, 70000]
    assert [segment["id"] for segment in example.segments] == [300, 70000]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data, s: s.pop(), r"a_map\.png: ids \[70000\] in the map that segments_info does not describe"),
        (
            lambda data, s: s.append({"id": 9, "category_id": 7}),
            r"ids \[9\] in segments_info that the map does not have",
        ),
        (lambda data, s: s.append(s[0]), r"ids \[1\] in segments_info twice"),
        (lambda data, s: s[0].update(category_id=8), r"category_id \[8\] .* not among the categories"),
        (lambda data, s: data["annotations"].clear(), "annotations is empty"),
        (lambda data, s: data["categories"][0].pop("isthing"), "categories without isthing"),
        (lambda data, s: data["annotations"][0].update(file_name="x.png"), r"panoptic maps .* not there: x\.png"),
        (lambda data, s: data["images"][0].update(file_name="x.png"), r"images .* not there: x\.png"),
    ],
)
def test_map_and_json_that_do_not_belong_together_are_refused(panoptic, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        panoptic(change)[0]


def test_cityscapes_json_names_files_that_lie_in_city_folders_under_another_suffix(tmp_path):
    (tmp_path / "images" / "ulm").mkdir(parents=True)
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.zeros((2, 3, 3), dtype=np.uint8)).save(tmp_path / "images" / "ulm" / "ulm_0_1_leftImg8bit.png")
    Image.fromarray(np.full((2, 3, 3), [1, 0, 0], dtype=np.uint8)).save(
        tmp_path / "maps" / "ulm_0_1_gtFine_panoptic.png"
    )
    segments = [{"id": 1, "category_id": 26}]
    data = {
        "images": [{"id": "ulm_0_1", "file_name": "ulm_0_1_gtFine_leftImg8bit.png"}],
        "annotations": [
            {"image_id": "ulm_0_1", "file_name": "ulm_0_1_gtFine_panoptic.png", "segments_info": segments}
        ],
    }
    (tmp_path / "p.json").write_text(json.dumps(data))
    classes = ClassTable.load("cityscapes-panoptic")
    example = CocoPanoptic(tmp_path / "images", tmp_path / "p.json", tmp_path / "maps", classes)[0]
    assert example.file_name == "ulm/ulm_0_1_leftImg8bit.png"
    assert classes.id2label[example.segments[0]["category_id"]] == "car"


def test_packed_records_are_the_records():
    records = [{"a": [1, 2]}, (3, "x"), None]
    packed = PackedRecords(records)
    assert (len(packed), list(packed[k] for k in range(3))) == (3, records)


@pytest.mark.parametrize(
    "segmentation, rule",
    [
        ([[1, 1, float("nan"), 1, 10, 10]], "coordinate nan"),
        ([[1, 1, float("inf"), 1, 10, 10]], "coordinate inf"),
        ([[1, 1, 1e9, 1, 10, 10]], "coordinate 1000000000.0"),
        ([[1, 1, "9", 1, 10, 10]], "coordinate '9'"),
        ([1, 1, 9, 1, 10, 10], "also a single polygon stands in a list"),
        ({"size": [H, W], "counts": [0.5, 599.5]}, "whole numbers"),
        ({"size": None, "counts": "a"}, "size None"),
    ],
)
def test_shapes_that_crash_the_coco_packages_are_refused(segmentation, rule):
    with pytest.raises(ValueError, match=rule):
        decode_mask(segmentation, (H, W), "here")
