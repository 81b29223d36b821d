"""What the doctor says of annotated videos, by each fault in turn, and of healthy ones."""

import json

import pytest
from youtube_vis import write_youtube_vis

from mask2former_hf import MovingScenes
from mask2former_hf.cli.main import main

NUMBER, FRAMES = 4, 3


@pytest.fixture
def folder(tmp_path):
    """YouTube-VIS' json beside its frames, twice: to train and to measure on."""
    pytest.importorskip("pycocotools", reason="masks are run-length codes")
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        write_youtube_vis(MovingScenes(NUMBER, FRAMES, size=48), tmp_path / split)
    return tmp_path


def change(folder, how):
    path = folder / "train" / "instances.json"
    content = json.loads(path.read_text())
    how(content, folder / "train" / "frames")
    path.write_text(json.dumps(content))


def cut_frame(content, frames):
    (frames / content["videos"][0]["file_names"][1]).write_bytes(b"no picture")


def wrong_size(content, frames):
    content["videos"][1]["height"] += 1


def no_masks(content, frames):
    content["annotations"][0]["segmentations"] = [None] * FRAMES


def bare_video(content, frames):
    own = content["videos"][2]["id"]
    content["annotations"] = [entry for entry in content["annotations"] if entry["video_id"] != own]


def new_class(content, frames):
    content["categories"].append({"id": 99, "name": "bird"})


def one_frame(content, frames):
    video = content["videos"][0]
    video["file_names"] = video["file_names"][:1]
    for entry in content["annotations"]:
        if entry["video_id"] == video["id"]:
            entry["segmentations"] = entry["segmentations"][:1]


def broken_mask(content, frames):
    content["annotations"][0]["segmentations"][0] = {"size": [48, 48], "counts": [1, 2]}


@pytest.mark.parametrize(
    "how, code, words",
    [
        (cut_frame, 1, "ERROR train: 1 of 4 videos cannot be used. 1 of 3 files of video"),
        (wrong_size, 1, "ERROR train: 1 of 4 videos cannot be used. 3 of 3 files of video"),
        (broken_mask, 1, "ERROR train: 1 of 4 videos cannot be used. object 0, frame 0"),
        (no_masks, 0, "WARNING train: 1 objects have no pixel in the frames that were looked at"),
        (bare_video, 0, "WARNING train: 1 of 4 videos have no object, such as ["),
        (new_class, 0, "classes are never seen: bird"),
        (one_frame, 0, "WARNING train: 1 of 4 videos have one frame, such as ["),
    ],
)
def test_each_fault_is_named_with_its_split(how, code, words, folder, capsys):
    change(folder, how)
    assert main(["doctor", "--data", str(folder)]) == code
    assert words in capsys.readouterr().out


def test_healthy_videos_are_called_so_by_their_folder_and_by_their_paths(folder, capsys):
    assert main(["doctor", "--data", str(folder)]) == 0
    assert "0 errors, 0 warnings: nothing looks wrong" in capsys.readouterr().out
    paths = [f"--train-{name}={folder / 'train' / file}" for name, file in
             (("images", "frames"), ("annotations", "instances.json"))]  # fmt: skip
    assert main(["doctor", "--data", "youtube-vis", *paths]) == 0
    assert "held out are" in capsys.readouterr().out


def test_a_video_file_is_told_what_looks_at_it(tmp_path, capsys):
    assert main(["doctor", "--data", str(tmp_path / "walk.mp4")]) == 2
    assert "walk.mp4: is a video without annotations, of which `predict` says" in capsys.readouterr().err
