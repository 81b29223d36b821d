"""Readers of `datasets`, on data sets made in memory; nothing is loaded from the Hub."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mask2former_hf.data.classes import BACKGROUND_ID, IGNORE, ClassTable
from mask2former_hf.data.hub_dataset import HubDataset, HubStream, node

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
H, W = 8, 10
LABELS = {0: IGNORE, 300: "road", 600: "car"}


def images(count=3):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (H, W, 3), dtype=np.uint8) for _ in range(count)]


def label_maps(count=3):
    rng = np.random.default_rng(1)
    return [rng.choice([0, 300, 600], (H, W)).astype(np.uint16) for _ in range(count)]


def pictures(arrays):
    return [Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize("convert", [pictures, list], ids=["image columns", "array columns"])
def test_label_maps_in_a_column(convert):
    rows = datasets.Dataset.from_dict({"image": convert(images()), "label": convert(label_maps())})
    dataset = HubDataset(rows, LABELS, label="label")
    assert (dataset.task, len(dataset), dataset.classes.id2label) == ("semantic", 3, {0: "road", 1: "car"})
    for example, image, labels in zip(dataset, images(), label_maps(), strict=True):
        assert (example.image == image).all()
        assert (example.segmentation == labels // 300).all()
        assert [s["area"] for s in example.segments] == [(labels == 300).sum(), (labels == 600).sum()]
    assert dataset[1].image_id == 1


def test_undecoded_images_are_decoded():
    rows = datasets.Dataset.from_dict({"image": pictures(images()), "label": pictures(label_maps())})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    assert (HubDataset(rows, LABELS, label="label")[2].image == images()[2]).all()


@pytest.mark.parametrize("as_lists", [False, True], ids=["list of dicts", "dict of lists"])
def test_panoptic_maps_with_segments_info(as_lists):
    ids = np.zeros((H, W), dtype=int)
    ids[:3], ids[3:5] = 5, 70000
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    segments = [{"id": 5, "category_id": 9, "iscrowd": 0}, {"id": 70000, "category_id": 2, "iscrowd": 1}]
    if as_lists:
        segments = {key: [segment[key] for segment in segments] for key in segments[0]}
    rows = datasets.Dataset.from_dict(
        {"image": pictures(images(1)), "map": pictures([png]), "info": [segments], "key": ["x7"]}
    )
    classes = ClassTable.from_labels({9: "sky", 2: "dog"}, things=["dog"])
    dataset = HubDataset(rows, classes, label="map", segments_info="info", image_id="key")
    assert dataset.task == "panoptic"
    assert (dataset[0].segmentation == ids).all()
    assert [tuple(segment.values()) for segment in dataset[0].segments] == [
        (5, 0, 0, 0, 30),
        (70000, 1, 1, 1, 20),
    ]
    assert dataset[0].image_id == "x7"
    with pytest.raises(ValueError, match="classes has no thing: panoptic data has things and stuff"):
        HubDataset(rows, {9: "sky", 2: "dog"}, label="map", segments_info="info")


POLYGON = [[2, 1, 6, 1, 6, 5, 2, 5]]
RLE = {"size": [H, W], "counts": [17, 4, 4, 4, 4, 4, 4, 4, 35]}
BITMASK = np.zeros((H, W), dtype=np.uint8)
BITMASK[1:5, 2:6] = 255


@pytest.mark.parametrize(
    ("key", "mask"),
    [("segmentation", POLYGON), ("segmentation", RLE), ("mask", BITMASK), ("bitmask", Image.fromarray(BITMASK))],
    ids=["polygon", "run lengths", "array", "image"],
)
def test_objects_as_polygons_run_lengths_arrays_or_images(key, mask):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    first, second = {"category": "dog", key: mask}, {"category": "cat", key: mask}
    rows = datasets.Dataset.from_dict({"image": pictures(images(2)), "objects": [[first, second], []]})
    example, empty = HubDataset(rows, {4: "cat", 9: "dog"}, objects="objects")
    assert example.segmentation.shape == (2, H, W)
    for segment, layer in zip(example.segments, example.segmentation, strict=True):
        assert (layer == np.where(BITMASK, segment["id"], BACKGROUND_ID)).all()
        assert (segment["area"], segment["isthing"]) == (16, 1)
    assert [segment["category_id"] for segment in example.segments] == [1, 0]
    assert (empty.segmentation == BACKGROUND_ID).all()


def test_objects_in_columns_of_their_own():
    rows = datasets.Dataset.from_dict(
        {"image": pictures(images(1)), "masks": [[BITMASK, 255 - BITMASK]], "labels": [[9, 4]], "crowd": [[0, 1]]}
    )
    columns = {"category_id": "labels", "segmentation": "masks", "iscrowd": "crowd"}
    example = HubDataset(rows, {4: "cat", 9: "dog"}, objects=columns)[0]
    assert [(s["category_id"], s["iscrowd"], s["area"]) for s in example.segments] == [(1, 0, 16), (0, 1, 64)]
    assert (example.segmentation == np.where(BITMASK, 1, 2)).all()


def test_errors_name_columns_and_rows():
    rows = datasets.Dataset.from_dict({"image": pictures(images()), "label": pictures(label_maps())})
    with pytest.raises(ValueError, match="no column mask: its columns are image, label"):
        HubDataset(rows, LABELS, label="mask")
    with pytest.raises(ValueError, match="give label for semantic data, label and segments_info"):
        HubDataset(rows, LABELS)
    with pytest.raises(ValueError, match=r"row 0: has the labels \[300\] that are not declared"):
        HubDataset(rows, {0: IGNORE, 600: "car"}, label="label")[0]
    with pytest.raises(ValueError, match="dataset has no rows"):
        HubDataset(rows.select([]), LABELS, label="label")
    with pytest.raises(ValueError, match=r"3 of 3 examples cannot be used:\n- row 0: mode RGB is not a map"):
        HubDataset(rows, LABELS, label="image").check(progress=False)
    boxes = datasets.Dataset.from_dict(
        {"image": pictures(images(1)), "objects": [[{"label": 1, "bbox": [1, 2, 3, 4]}]]}
    )
    with pytest.raises(ValueError, match="row 0: an object has label, bbox but none of segmentation, mask, bitmask"):
        HubDataset(boxes, {1: "a"}, objects="objects")[0]
    with pytest.raises(TypeError, match="has no length: use HubStream"):
        HubDataset(rows.to_iterable_dataset(), LABELS, label="label")
    with pytest.raises(TypeError, match="has a length and an index: use HubDataset"):
        HubStream(rows, LABELS, label="label")


def rows_of_shards(shards):
    for shard in shards:
        for number, (image, labels) in enumerate(zip(images(), label_maps(), strict=True)):
            yield {"image": image, "label": labels, "number": 3 * shard + number}


@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_nodes_see_every_row_of_a_stream_once(shards, num_workers):
    rows = datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": list(range(shards))})
    seen = []
    for rank in range(2):
        stream = HubStream(rows, LABELS, label="label", image_id="number", rank=rank, world_size=2)
        part = list(DataLoader(stream, batch_size=None, num_workers=num_workers))
        assert len(part) < 3 * shards
        for example in part:
            assert (np.asarray(example.segmentation) == label_maps()[example.image_id % 3] // 300).all()
        seen += [example.image_id for example in part]
    assert sorted(seen) == list(range(3 * shards))


def test_the_node_comes_from_the_environment_and_row_names_differ_between_nodes(monkeypatch):
    rows = datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": [0, 1]})
    names = set()
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert node() == (rank, 2)
        names |= {example.image_id for example in HubStream(rows, LABELS, label="label")}
    assert len(names) == 6
    alone = HubStream(rows, LABELS, label="label", rank=0, world_size=1)
    assert len(list(alone)) == 6
    with pytest.raises(ValueError, match="give both, with 0 <= rank < world_size"):
        HubStream(rows, LABELS, label="label", rank=2, world_size=2)


def test_the_node_comes_from_torch_distributed_where_it_is_initialised(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert node() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_a_shuffled_stream_changes_with_the_epoch_and_repeats_with_it():
    rows = datasets.IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": [0, 1, 2, 3]})
    stream = HubStream(rows.shuffle(seed=0, buffer_size=12), LABELS, label="label", image_id="number")
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([example.image_id for example in stream])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[1]) == list(range(12))
