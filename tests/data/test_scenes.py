"""Generated scenes: deterministic, consistent, and hard enough to be a test."""

import subprocess
import sys

import numpy as np
import pytest

from mask2former_hf.data.large_scenes import LargeScene
from mask2former_hf.data.scenes import ID2LABEL, MIN_VISIBLE, STUFF_LABEL_IDS, ScenesDataset


def test_a_scene_depends_on_seed_and_index_alone():
    forwards = [ScenesDataset(5, seed=3)[i] for i in range(5)]
    longer = ScenesDataset(100, seed=3)
    np.random.seed(1)
    for index in (4, 0, 2):
        scene = longer[index]
        assert np.array_equal(scene.image, forwards[index].image)
        assert np.array_equal(scene.segmentation, forwards[index].segmentation)
        assert scene.segments == forwards[index].segments
    assert not np.array_equal(forwards[0].image, forwards[1].image)
    assert not np.array_equal(forwards[0].image, ScenesDataset(5, seed=4)[0].image)


def test_another_process_makes_the_same_scene():
    code = "from mask2former_hf.data.scenes import ScenesDataset as S; print(int(S(9)[7].image.astype(int).sum()))"
    there = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert there == ScenesDataset(9)[7].image.astype(int).sum()


@pytest.mark.parametrize("size", [64, 128, (48, 96)])
def test_annotations_describe_the_map(size):
    for index in range(30):
        scene = ScenesDataset(30, size=size)[index]
        height, width = (size, size) if isinstance(size, int) else size
        assert scene.image.shape == (height, width, 3) and scene.image.dtype == np.uint8
        ids = scene.segmentation
        assert ids.shape == (height, width) and ids.dtype == np.int32
        listed = {segment["id"]: segment for segment in scene.segments}
        assert set(np.unique(ids)) == set(listed) and 0 not in listed
        for number, segment in listed.items():
            assert segment["area"] == (ids == number).sum() >= MIN_VISIBLE
            assert segment["isthing"] == (segment["category_id"] not in STUFF_LABEL_IDS)
            assert segment["category_id"] in ID2LABEL


def test_scenes_have_every_class_neighbours_of_one_class_and_hidden_things():
    scenes = [ScenesDataset(60)[i] for i in range(60)]
    counts = [[s["category_id"] for s in scene.segments] for scene in scenes]
    assert {label for labels in counts for label in labels} == set(ID2LABEL)
    assert sum(len(labels) != len(set(labels)) for labels in counts) > 20
    drawn = sum(len(set(range(3)) & set(labels)) > 0 for labels in counts)
    assert drawn > 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": -1}, "length=-1"),
        ({"length": 1, "size": 8}, "size=8.*at least 16"),
        ({"length": 1, "num_things": (3, 2)}, "num_things"),
        ({"length": 1, "noise": -1.0}, "noise=-1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScenesDataset(**arguments)


def test_an_index_out_of_range_is_an_index_error():
    with pytest.raises(IndexError, match="index=2.*2 examples, 0 to 1"):
        ScenesDataset(2)[2]


def test_windows_of_a_large_scene_are_parts_of_the_same_scene():
    scene = LargeScene((300, 420), 60, unit=90, seed=2)
    image, ids = scene.read((0, 0, 420, 300)), scene.ids((0, 0, 420, 300))
    assert len(scene.things) == 60 and set(np.unique(ids)) <= set(scene.labels())
    for left, top, right, bottom in [(0, 0, 100, 80), (250, 130, 420, 300), (77, 101, 78, 102)]:
        assert (scene.read((left, top, right, bottom)) == image[top:bottom, left:right]).all()
        assert (scene.ids((left, top, right, bottom)) == ids[top:bottom, left:right]).all()
    assert (scene.read((0, 0, 420, 300), step=4) == image[::4, ::4]).all()
    assert (LargeScene((300, 420), 60, unit=90, seed=2).read((0, 0, 420, 300)) == image).all()


def test_things_that_lie_apart_are_seen_whole():
    scene = LargeScene((300, 420), 500, unit=60, seed=1, apart=True)
    ids = scene.ids((0, 0, 420, 300))
    assert 40 < len(scene.things) < 500
    for number in range(len(scene.things)):
        assert (scene.runs(number).crop((0, 0, 420, 300)) == (ids == number + 3)).all()


def test_a_scene_of_a_hundred_thousand_pixels_is_there_at_once():
    scene = LargeScene((100_000, 100_000), 1000, unit=400)
    window = scene.runs(500).box
    assert scene.read(window).std() > 5 and 503 in scene.ids(window)
