"""Training augmentation against the original's recorded mappers, OpenCV's numbers and plain geometry."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from helpers import generated_scene as scene
from torch.utils.data import DataLoader, IterableDataset

from mask2former_hf.data.augmentation import (
    BACKGROUND_ID,
    AugmentedDataset,
    FixedSizeCrop,
    HorizontalFlip,
    LargeScaleJitter,
    PadTo,
    RandomCrop,
    ResizeShortestEdge,
    by_name,
    instance_lsj,
    panoptic_lsj,
    replay,
    resize_crop,
)
from mask2former_hf.data.example import Example
from mask2former_hf.data.scenes import ScenesDataset

CROP = {"short_sides": [40, 64, 90], "max_size": 120, "crop": (48, 56), "pad": 64}
PIPELINES = {
    "coco_panoptic_lsj": {"size": 64},
    "coco_instance_lsj": {"size": (64, 80)},
    "mask_former_semantic": CROP,
    "mask_former_instance": CROP,
    "mask_former_panoptic": CROP | {"pad": None, "single_category_max_area": 0.75},
}


def flat(ids, categories=None):
    """An example whose image shows the ids: every segment has one colour of its own."""
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    numbers = [number for number in np.unique(ids).tolist() if number > 0]
    categories = categories or {number: number % 3 for number in numbers}
    segments = [{"id": number, "category_id": categories[number]} for number in numbers]
    return Example(palette[ids], ids.astype(np.int32), segments), palette


def same(one, other):
    for field in dataclasses.fields(Example):
        here, there = getattr(one, field.name), getattr(other, field.name)
        if isinstance(here, np.ndarray):
            assert here.dtype == there.dtype and np.array_equal(here, there), field.name
        else:
            assert here == there, field.name
    return True


# Geometry


@pytest.mark.parametrize("name", PIPELINES)
def test_image_and_map_stay_together(name):
    rng = np.random.default_rng(5)
    seeds = rng.uniform(0, 1, (6, 2)) * (150, 200)
    y, x = np.mgrid[:150, :200]
    cells = ((y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2).argmin(-1) + 1
    example, palette = flat(cells)
    pipeline = by_name(name, PIPELINES[name] | ({"colour": False} if "crop" in PIPELINES[name] else {}))
    compared, agreeing = 0, dict.fromkeys([(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)], 0)
    for index in range(20):
        result = pipeline(example, np.random.default_rng(index))
        ids, image = result.segmentation, result.image
        padding = ids == (0 if name == "mask_former_semantic" else BACKGROUND_ID)
        assert (image[padding] == 128).all()
        around = np.lib.stride_tricks.sliding_window_view(np.pad(ids, 2, constant_values=-9), (5, 5))
        inside = (around == ids[..., None, None]).all((2, 3)) & ~padding
        compared += inside.sum()
        assert np.array_equal(image[inside], palette[ids[inside]])
        distances = abs(image[:, :, None].astype(int) - palette[1:7]).sum(-1)
        seen = np.where(padding, 0, distances.argmin(-1) + 1)
        for shift in agreeing:
            agreeing[shift] += (np.roll(seen, shift, (0, 1)) == ids)[~padding].sum()
    assert compared > 10000
    assert max(agreeing, key=agreeing.get) == (0, 0)


def test_a_flip_mirrors_image_and_map():
    example = scene()
    flipped = HorizontalFlip(p=1.0)(example, np.random.default_rng(0))
    assert np.array_equal(flipped.image, example.image[:, ::-1])
    assert np.array_equal(flipped.segmentation, example.segmentation[:, ::-1])
    still = HorizontalFlip(p=0.0)(example, np.random.default_rng(0))
    assert same(dataclasses.replace(still, augmentation=()), example)


def test_jitter_draws_sizes_between_its_bounds_and_keeps_the_aspect():
    example, _ = flat(np.ones((90, 160), dtype=np.int32))
    rng = np.random.default_rng(0)
    drawn = [LargeScaleJitter(1024).draw(example, rng) for _ in range(2000)]
    widths = np.array([p["width"] for p in drawn])
    heights = np.array([p["height"] for p in drawn])
    assert 102 <= widths.min() < 125 and 2020 < widths.max() <= 2048 and abs(widths.mean() - 1.05 * 1024) < 40
    assert abs(heights - widths * 90 / 160).max() <= 1


@pytest.mark.parametrize(
    "sides, box, scale, expected",
    [
        ((427, 640), 256, 1.0, (171, 256)),  # 170.8
        ((360, 640), 1024, 2.0, (1152, 2048)),
        ((500, 333), (100, 200), 0.5, (50, 33)),  # 33.3
        ((45, 100), 100, 0.1, (4, 10)),  # 4.5 goes to the even number
    ],
)
def test_jitter_size_rule(sides, box, scale, expected):
    example, _ = flat(np.ones(sides, dtype=np.int32))
    drawn = LargeScaleJitter(box, scale, scale).draw(example, np.random.default_rng(0))
    assert (drawn["height"], drawn["width"]) == expected


def test_a_thin_image_never_shrinks_to_nothing():
    example, _ = flat(np.ones((2, 400), dtype=np.int32))
    result = panoptic_lsj(16, 0.1, 0.1)(example, np.random.default_rng(0))
    assert result.image.shape == (16, 16, 3)


@pytest.mark.parametrize(
    "sides, short, longest, expected",
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((360, 640), 800, 1333, (750, 1333)),
        ((427, 640), 512, 2048, (512, 767)),
        ((100, 100), 33, 2048, (33, 33)),
    ],
)
def test_short_side_rule(sides, short, longest, expected):
    example, _ = flat(np.ones(sides, dtype=np.int32))
    drawn = ResizeShortestEdge([short], longest).draw(example, np.random.default_rng(0))
    assert (drawn["height"], drawn["width"]) == expected


def test_fixed_size_windows_lie_on_the_diagonal_and_reach_both_corners():
    example, _ = flat(np.ones((100, 60), dtype=np.int32))
    rng = np.random.default_rng(0)
    drawn = [FixedSizeCrop(40, BACKGROUND_ID).draw(example, rng) for _ in range(500)]
    assert {(0, 0), (60, 20)} <= {(p["top"], p["left"]) for p in drawn}
    assert all(abs(p["top"] - 3 * p["left"]) <= 2 for p in drawn)


def test_free_windows_reach_all_corners():
    example, _ = flat(np.ones((12, 11), dtype=np.int32))
    rng = np.random.default_rng(0)
    places = {(p["top"], p["left"]) for p in (RandomCrop((10, 10)).draw(example, rng) for _ in range(200))}
    assert places == {(top, left) for top in range(3) for left in range(2)}


@pytest.mark.parametrize("old, new", [(37, 64), (64, 37), (50, 100), (333, 128)])
def test_the_corner_rule_is_that_of_torch(old, new):
    ids = np.arange(old * old, dtype=np.int32).reshape(old, old)
    example = Example(np.zeros((old, old, 3), np.uint8), ids, [])
    ours = ResizeShortestEdge.apply(example, {"height": new, "width": new, "nearest": "corner"}).segmentation
    theirs = torch.nn.functional.interpolate(torch.from_numpy(ids)[None, None].double(), (new, new), mode="nearest")
    assert np.array_equal(ours, theirs[0, 0].numpy())


@pytest.mark.parametrize("name", PIPELINES)
def test_overlapping_maps_move_like_single_ones(name):
    example = scene()
    maps = np.stack([example.segmentation, np.where(example.segmentation > 2, 99, 0).astype(np.int32)])
    pipeline = by_name(name, {k: v for k, v in PIPELINES[name].items() if k != "single_category_max_area"})
    several = pipeline(dataclasses.replace(example, segmentation=maps), np.random.default_rng(3))
    for index in range(2):
        single = pipeline(dataclasses.replace(example, segmentation=maps[index]), np.random.default_rng(3))
        assert np.array_equal(several.segmentation[index], single.segmentation)
    none = pipeline(dataclasses.replace(example, segmentation=maps[:0], segments=[]), np.random.default_rng(3))
    assert none.segmentation.shape == (0, *several.segmentation.shape[1:])


# Segments


def test_empty_segments_are_kept_or_dropped_as_the_recipe_says():
    ids = np.ones((64, 64), dtype=np.int32)
    ids[0, 0] = 2
    example, _ = flat(ids)
    kept = {}
    for name, parameters in PIPELINES.items():
        parameters = parameters | ({"min_scale": 0.3, "max_scale": 0.4} if "size" in parameters else {})
        results = [by_name(name, parameters)(example, np.random.default_rng(i)) for i in range(10)]
        lost = [result for result in results if not (result.segmentation == 2).any()]
        assert lost
        kept[name] = {len(result.segments) for result in lost}
    assert kept == {
        "coco_panoptic_lsj": {2},
        "coco_instance_lsj": {1},
        "mask_former_semantic": {1},
        "mask_former_instance": {2},
        "mask_former_panoptic": {2},
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_stale_areas_go_names_stay_and_the_input_is_not_changed(name):
    example = dataclasses.replace(scene(), file_name="a.jpg")
    example.segments[0]["bbox"] = [0, 0, 5, 5]
    before = pickle.loads(pickle.dumps(example))
    result = by_name(name, PIPELINES[name])(example, np.random.default_rng(0))
    assert same(example, before)
    assert result.file_name == "a.jpg" and all("iscrowd" in segment for segment in result.segments)
    assert not any({"area", "bbox"} & segment.keys() for segment in result.segments)
    for array in (result.image, result.segmentation):
        assert array.flags.c_contiguous and array.flags.writeable


def test_the_category_limit_holds_where_a_window_can_meet_it():
    ids = np.ones((64, 200), dtype=np.int32)
    ids[:, 60:80], ids[:, 80:], ids[:20] = 2, 3, 0
    example, _ = flat(ids, {1: 0, 2: 1, 3: 0})  # two segments of one category count together

    def shares(limit):
        rng = np.random.default_rng(0)
        for _ in range(300):
            p = RandomCrop(40, limit).draw(example, rng)
            window = ids[p["top"] : p["top"] + 40, p["left"] : p["left"] + 40]
            yield max((window == 2).sum(), np.isin(window, (1, 3)).sum()) / (window > 0).sum()

    # A window is fine if 16 of its 40 columns or more show segment 2: 29 of 161 places. Ten tries miss with p = .14.
    fine = 29 / 161
    plain, limited = (np.mean([share < 0.625 for share in shares(limit)]) for limit in (1.0, 0.625))
    expected = 1 - (1 - fine) ** 10
    assert abs(plain - fine) < 0.07 and limited > 0.8 and abs(limited - expected) < 0.1


def test_ten_tries_without_success_leave_the_last_window():
    example, _ = flat(np.ones((50, 50), dtype=np.int32))
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    drawn = RandomCrop(20, 0.75).draw(example, rng)
    assert drawn == [RandomCrop(20).draw(example, other) for _ in range(10)][-1]


# Replay


@pytest.mark.parametrize("name", PIPELINES)
def test_a_record_that_went_through_json_repeats_the_result(name):
    pipeline = by_name(name, PIPELINES[name])
    for index in range(5):
        example = scene(index)
        result = pipeline(example, np.random.default_rng(index))
        assert same(replay(example, json.loads(json.dumps(result.augmentation))), result)


def test_a_record_names_the_steps_in_the_original_order():
    names = {
        name: [step for step, _ in by_name(name, PIPELINES[name])(scene(), np.random.default_rng(0)).augmentation]
        for name in PIPELINES
    }
    assert names["coco_panoptic_lsj"] == ["HorizontalFlip", "LargeScaleJitter", "FixedSizeCrop"]
    assert names["coco_instance_lsj"] == [*names["coco_panoptic_lsj"], "DropEmptySegments"]
    assert names["mask_former_panoptic"] == ["ResizeShortestEdge", "RandomCrop", "SSDColour", "HorizontalFlip"]
    assert names["mask_former_instance"] == [*names["mask_former_panoptic"], "PadTo"]
    assert names["mask_former_semantic"] == [*names["mask_former_instance"], "DropEmptySegments"]


# Data sets


class Stream(IterableDataset):
    """Scenes without indices; a worker reads every n-th."""

    def __init__(self, length=6):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        yield from (scene(index, (32, 32)) for index in range(first, self.length, step))


def first(examples):
    return examples[0]


def augmented(**arguments):
    return AugmentedDataset(ScenesDataset(6, size=(40, 56)), by_name("mask_former_semantic", CROP), **arguments)


def test_workers_change_nothing_and_persistent_ones_see_the_epoch():
    alone, shared = augmented(seed=7), augmented(seed=7)
    loader = DataLoader(shared, batch_size=1, num_workers=2, persistent_workers=True, collate_fn=first)
    for epoch in (0, 3):
        shared.set_epoch(epoch)
        alone.set_epoch(epoch)
        results = list(loader)
        assert len(results) == 6 and all(same(result, alone[index]) for index, result in enumerate(results))


def test_draws_depend_on_seed_epoch_and_index_and_on_nothing_else():
    dataset = augmented(seed=1)
    start = dataset[2]
    records = [dataset[index].augmentation for index in (5, 0, 2)]
    assert same(dataset[2], start) and same(dataset[-4], start) and len({json.dumps(r) for r in records}) == 3
    dataset.set_epoch(1)
    assert dataset.epoch == 1 and dataset[2].augmentation != start.augmentation
    dataset.set_epoch(0)
    assert same(dataset[2], start)
    assert augmented(seed=2)[2].augmentation != start.augmentation
    assert same(augmented(seed=1, rank=3)[2], start)
    with pytest.raises(IndexError):
        dataset[6]


def test_iterable_data_is_augmented_by_rank_worker_and_position():
    pipeline = panoptic_lsj(32)
    stream = AugmentedDataset(Stream(), pipeline, seed=4, rank=0)
    assert isinstance(stream, IterableDataset)
    one = list(stream)
    assert all(map(same, one, stream)) and len({json.dumps(e.augmentation) for e in one}) == 6
    assert all(map(same, one, DataLoader(stream, batch_size=1, collate_fn=first, num_workers=1)))
    other = list(AugmentedDataset(Stream(), pipeline, seed=4, rank=1))
    assert all(a.augmentation != b.augmentation for a, b in zip(one, other, strict=True))
    two = list(DataLoader(stream, batch_size=1, collate_fn=first, num_workers=2))
    assert len({json.dumps(e.augmentation) for e in two}) == 6
    stream.set_epoch(2)
    assert stream.dataset.epoch == 2
    assert all(a.augmentation != b.augmentation for a, b in zip(one, stream, strict=True))


def test_the_rank_of_a_launched_process_is_read_from_its_environment(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    assert AugmentedDataset(Stream(), panoptic_lsj(32)).rank == 5


@pytest.mark.parametrize("make", [augmented, lambda: AugmentedDataset(Stream(), panoptic_lsj(32))])
def test_a_data_set_survives_pickling(make):
    dataset = make()
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert type(copy) is type(dataset) and copy.epoch == 3
    assert same(next(iter(copy)), next(iter(dataset)))


# Mistakes


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: HorizontalFlip(p=1.5), "p=1.5"),
        (lambda: LargeScaleJitter(0), "size=0.*1 or more"),
        (lambda: LargeScaleJitter(64, 2.0, 1.0), "min_scale=2.0, max_scale=1.0"),
        (lambda: panoptic_lsj(64, min_scale=0.0), "min_scale=0.0"),
        (lambda: instance_lsj((64, -1)), r"size=\(64, -1\)"),
        (lambda: RandomCrop(12.5), "size=12.5"),
        (lambda: RandomCrop(12, 0.0), "single_category_max_area=0.0"),
        (lambda: ResizeShortestEdge([], 10), r"choices=\[\]"),
        (lambda: ResizeShortestEdge([5], 0), "max_size=0"),
        (lambda: ResizeShortestEdge([5], 10, "middle"), "nearest='middle'"),
        (lambda: resize_crop([32], 64, 32, 16, padding_id=0, keep_empty=True), "crop=32, pad=16"),
        (lambda: by_name("lsj", {}), "mapper='lsj'.*coco_panoptic_lsj"),
        (lambda: augmented(seed=-1), "seed=-1"),
        (lambda: augmented(rank=-1), "rank=-1"),
        (lambda: augmented().set_epoch(-1), "epoch=-1"),
        (lambda: replay(scene(), [["Blur", {}]]), "'Blur'.*HorizontalFlip"),
        (lambda: PadTo(32, 0)(scene(), np.random.default_rng(0)), "72x96, larger than the 32x32"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
