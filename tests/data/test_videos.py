"""Annotated videos, clips cut out of them by the original's rules, and generated ones."""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, SHARED, needs_golden
from PIL import Image
from safetensors.torch import load_file

from mask2former_hf.data.clips import NO_LABEL, ClipDataset, ClipRecipe, cut
from mask2former_hf.data.held_out import Part
from mask2former_hf.data.moving_scenes import MovingScenes
from mask2former_hf.data.videos import DavisFolders, Video, VideoObject, YoutubeVis

needs_davis = pytest.mark.skipif(not (SHARED / "data" / "video_davis").is_dir(), reason="../shared/data not found")
DAVIS = SHARED / "data" / "video_davis"


# --- clips -----------------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("case", ["video_r50_ytvis", "video_swin_ytvis"])
def test_a_clip_is_that_of_the_original_s_mapper(case, clip):
    """Its frames bit for bit and its targets by id; polygons, objects absent in a frame, tiny ones and a crowd."""
    folder = GOLDEN / case
    record = json.loads((folder / "mapper.json").read_text())["videos"][clip]
    raw, golden = np.load(folder / "mapper.npz"), load_file(folder / "inputs.safetensors")
    objects = {}
    for number, annotations in enumerate(record["annotations_of_selected_frames"]):
        for entry in annotations:
            kind = (entry["id"], entry["category_id"], bool(entry["iscrowd"]))
            objects.setdefault(kind, [None, None])[number] = entry["segmentation"]
    objects = tuple(VideoObject(number, label, masks, crowd) for (number, label, crowd), masks in objects.items())
    size = (record["height"], record["width"])
    video = Video("clip", size, 2, objects, lambda frame: raw[f"video{clip}.raw_frame{frame}"])
    recipe = ClipRecipe(short_sides=[record["short_edge"]], flip=float(record["flip"]))
    drawn = recipe.draw(video, np.random.default_rng(0))
    assert drawn["numbers"] == [0, 1] and drawn["flip"] == record["flip"]
    ours = recipe(video, np.random.default_rng(0))
    for number in range(2):
        assert np.array_equal(ours.frames[number].transpose(2, 0, 1), golden[f"video{clip}.frame{number}"].numpy())
    ids = [max(pair) for pair in golden[f"prepared{clip}.ids"].tolist()]
    theirs = dict(zip(ids, golden[f"prepared{clip}.labels"].tolist(), strict=True))
    assert dict(zip(ours.ids, np.where(ours.labels == NO_LABEL, 40, ours.labels).tolist(), strict=True)) == theirs
    height, width = ours.masks.shape[-2:]
    for number, masks in zip(ids, golden[f"prepared{clip}.masks"], strict=True):
        own = ours.masks[ours.ids.index(number)]
        assert np.array_equal(own, masks[:, :height, :width].bool().numpy()), number
    labels = cut(video, drawn, label_of="any").labels
    assert NO_LABEL in ours.labels and NO_LABEL not in labels


def numbered_video(length, objects=()):
    return Video("numbered", (20, 30), length, tuple(objects), lambda frame: np.full((20, 30, 3), frame, np.uint8))


def test_frames_lie_near_the_first_drawn_and_in_order():
    recipe, rng = ClipRecipe(frames=4, frame_range=5, short_sides=[20]), np.random.default_rng(0)
    drawn = [recipe.draw(numbered_video(100), rng)["numbers"] for _ in range(300)]
    assert all(numbers == sorted(numbers) and numbers[-1] - numbers[0] <= 10 for numbers in drawn)
    assert any(len(set(numbers)) < 4 for numbers in drawn), "others may occur twice"
    pairs = [ClipRecipe(frames=2, short_sides=[20]).draw(numbered_video(3), rng)["numbers"] for _ in range(100)]
    assert {tuple(pair) for pair in pairs} == {(0, 1), (0, 2), (1, 2)}, "two frames differ"
    assert recipe.draw(numbered_video(1), rng)["numbers"] == [0] * 4, "a video of one frame stands still"


def test_a_clip_is_changed_as_a_whole():
    """One size and one mirror image for all frames; masks move with the pixels."""
    mask = np.zeros((20, 30), bool)
    mask[:, :10] = True
    frames = [np.where(mask[..., None], [255, 0, 0], 0).astype(np.uint8)] * 6
    video = Video(1, (20, 30), 6, (VideoObject(7, 2, [mask] * 6),), frames.__getitem__)
    data, flips = ClipDataset([video], ClipRecipe(frames=3, short_sides=[40, 60])), set()
    for epoch in range(12):
        data.set_epoch(epoch)
        clip = data[0]
        assert clip.frames.shape == (3, *clip.masks.shape[2:], 3) and clip.frames.shape[1] in (40, 60)
        assert np.array_equal(clip.frames[..., 0] > 127, clip.masks[0])
        assert np.array_equal(data[0].frames, clip.frames), "the same in every process"
        flips.add(bool(clip.masks[0, 0, 0, 0]))
    assert flips == {True, False}


def test_an_object_in_no_sampled_frame_is_no_target():
    mask = np.ones((20, 30), bool)
    objects = [VideoObject(1, 0, [mask, None, None]), VideoObject(2, 1, [mask, mask, None], iscrowd=True)]
    drawn = {"numbers": [1, 2], "height": 20, "width": 30, "flip": False}
    assert cut(numbered_video(3, objects), drawn).masks.shape == (0, 2, 20, 30)


# --- readers ---------------------------------------------------------------------------------------------------------


def write_youtube_vis(folder, **changes):
    (folder / "a").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / "a" / f"{number}.png")
    square = [[1, 1, 5, 1, 5, 4, 1, 4]]
    content = {
        "videos": [{"id": 5, "width": 8, "height": 6, "length": 3, "file_names": [f"a/{n}.png" for n in range(3)]}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {
                "id": 1,
                "video_id": 5,
                "category_id": 9,
                "iscrowd": 0,
                "segmentations": [square, None, {"size": [6, 8], "counts": [0, 6, 42]}],
            },
            {
                "id": 2,
                "video_id": 5,
                "category_id": 3,
                "iscrowd": 1,
                "segmentations": [None, square, None],
                "bboxes": [None, None, None],
            },
        ],
    } | changes
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def test_youtube_vis_has_polygons_run_lengths_nulls_and_crowds(tmp_path):
    reader = YoutubeVis(tmp_path, write_youtube_vis(tmp_path))
    (video,) = reader
    assert reader.classes.id2label == {0: "cat", 1: "dog"} and (video.id, video.size, video.length) == (5, (6, 8), 3)
    assert video.frame(2)[0, 0].tolist() == [2, 0, 0]
    dog, crowd = video.objects
    assert dog.label == 1 and not dog.iscrowd and crowd.iscrowd
    assert [int(dog.mask(frame, video.size).sum()) for frame in range(3)] == [12, 0, 6]
    assert dog.mask(2, video.size)[:, 0].all()
    assert crowd.segmentations == [None] * 3, "an entry without a box counts as null"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"annotations": [{"video_id": 5, "category_id": 9, "segmentations": [None]}]},
            "1 segmentations, its video 3 frames",
        ),
        ({"annotations": [{"video_id": 6, "category_id": 9, "segmentations": []}]}, "of video 6, which videos lacks"),
        (
            {"annotations": [{"video_id": 5, "category_id": 4, "segmentations": [None] * 3}]},
            "category_id 4 is not declared",
        ),
        ({"videos": []}, "videos is empty"),
        (
            {"annotations": [{"video_id": 5, "category_id": 9, "segmentations": [7, None, None]}]},
            "must be a list with, per frame",
        ),
    ],
)
def test_a_json_that_contradicts_itself_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        YoutubeVis(tmp_path, write_youtube_vis(tmp_path, **changes))


def test_a_frame_of_another_size_is_named(tmp_path):
    path = write_youtube_vis(tmp_path)
    Image.new("RGB", (9, 6)).save(tmp_path / "a" / "1.png")
    with pytest.raises(ValueError, match="frame 1 of video 5 is 6x9, the video 6x8"):
        YoutubeVis(tmp_path, path)[0].frame(1)


def test_headers_tell_every_frame_that_is_missing_damaged_or_of_another_size(tmp_path):
    reader = YoutubeVis(tmp_path, write_youtube_vis(tmp_path))
    reader.check_headers(progress=False)
    frames = [tmp_path / "a" / f"{number}.png" for number in range(3)]
    frames[0].unlink()
    Image.new("RGB", (9, 6)).save(frames[1])
    frames[2].write_bytes(b"no image")
    with pytest.raises(ValueError, match="^1 of 1 videos cannot be used:\n- 3 of 3 files of video 5 cannot") as caught:
        reader.check_headers(progress=False)
    first, second, third = str(caught.value).splitlines()[2:]
    assert str(frames[0]) in first
    assert f"{frames[1]}: the image is 6 x 9 (height x width) and its annotation 6 x 8" in second
    assert str(frames[2]) in third


def test_headers_of_davis_folders_tell_maps_of_another_size_and_of_no_frame(tmp_path):
    for name, kind, sizes in (("jpg", "RGB", [(8, 6)] * 3), ("png", "L", [(8, 6), (8, 7)])):
        (tmp_path / name / "dog").mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new(kind, size).save(tmp_path / name / "dog" / f"{number}.{name}")
    reader = DavisFolders(tmp_path / "jpg", tmp_path / "png")
    with pytest.raises(ValueError, match=r"1 of 5 files of video 'dog' .*\n  .*1\.png: the image is 7 x 8"):
        reader.check_headers(progress=False)
    (tmp_path / "jpg" / "dog" / "1.jpg").unlink()
    with pytest.raises(ValueError, match=r"video 'dog': 1 of 2 maps are of frames that are not there, such as 1\.png"):
        Part(reader, [0]).check_headers(progress=False)


@needs_davis
def test_davis_folders_and_their_youtube_vis_json_say_the_same():
    folders = DavisFolders(DAVIS / "JPEGImages", DAVIS / "Annotations")
    reader = YoutubeVis(DAVIS / "JPEGImages", DAVIS / "annotations" / "instances_train.json")
    videos = {video.id: video for video in folders}
    names = {"dog": "dog", "car-shadow": "sedan", "dance-twirl": "person"}
    for video in reader:
        (thing,) = video.objects
        label = reader.classes.id2label[thing.label]
        other = videos[next(name for name, known in names.items() if known == label)]
        assert other.size == video.size == (480, 854) and other.length == video.length
        for frame in (0, video.length - 1):
            assert np.array_equal(other.objects[0].mask(frame, other.size), thing.mask(frame, video.size))
            assert np.array_equal(other.frame(frame), video.frame(frame))


# --- generated -------------------------------------------------------------------------------------------------------


def test_moving_scenes_are_a_function_of_seed_and_index():
    one, other = MovingScenes(3, 4, size=48), MovingScenes(3, 4, size=48)
    assert np.array_equal(one[2].frame(3), other[2].frame(3))
    assert not np.array_equal(one[2].frame(3), one[1].frame(3))
    assert not np.array_equal(one[2].frame(3), MovingScenes(3, 4, size=48, seed=1)[2].frame(3))


def test_things_move_hide_each_other_leave_and_enter():
    moved = hidden = left = entered = 0
    for video in MovingScenes(30, 12, size=64):
        frames = range(video.length)
        masks = np.stack([[thing.mask(t, video.size) for t in frames] for thing in video.objects])
        assert (masks.sum(0) <= 1).all(), "what is in front hides what is behind"
        areas = masks.sum((2, 3))
        seen = areas > 0
        assert (areas[seen] >= 12).all() and seen.any(1).all()
        moved += sum(not np.array_equal(own[0], own[-1]) for own in masks)
        entered += (~seen[:, 0]).sum()
        left += (~seen[:, -1]).sum()
        hidden += (areas.min(1) < 0.5 * areas.max(1)).sum()
    assert moved > 60 and hidden > 20 and left > 5 and entered > 5


def test_a_loader_makes_clips_of_moving_scenes():
    data = ClipDataset(MovingScenes(4, 8, size=48), ClipRecipe(short_sides=[48]), seed=3)
    clips = list(torch.utils.data.DataLoader(data, batch_size=None))
    assert len(clips) == 4 and all(clip.frames.shape == (2, 48, 48, 3) for clip in clips)
