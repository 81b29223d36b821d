"""Videos on the page: the same results as of the command, what is left out is said, and what does not work too."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from videos import KINDS, save_checkpoints, write_video

from mask2former_hf import MovingScenes, Segmenter, VideoSegmenter
from mask2former_hf.cli.main import main
from mask2former_hf.inference import page
from mask2former_hf.inference.page_content import TRACK_COLUMNS, track_rows
from mask2former_hf.inference.page_video import Runs, answer_video
from mask2former_hf.inference.video_files import VideoSource

LENGTH = 12  # two windows of a model of clips


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def segmenters(checkpoints):
    return {name: page.load_segmenter(checkpoints / name, "cpu") for name in KINDS}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    pytest.importorskip("av", reason="video files need PyAV")
    scene = MovingScenes(1, LENGTH, size=(48, 66))[0]
    return write_video(tmp_path_factory.mktemp("videos") / "walk.mp4", map(scene.frame, range(LENGTH)))


def plain(frames, total):
    return frames


def never():
    return False


def ask(
    segmenter, path, task="instance", threshold=0.1, progress=plain, most_frames=100, most_pixels=10**6, stopped=never
):
    """The answer with its files read, which are gone afterwards: what is said, the overlay, rows, tracks."""
    path = None if path is None else str(path)
    given = segmenter, path, task, threshold, progress, most_frames, most_pixels, stopped
    answers = list(map(read, answer_video(*given)))
    assert len(answers) == 1
    return answers[0]


def read(answer):
    said, overlay, rows, files = answer
    tracks = [json.loads(Path(file).read_text()) for file in files if file.endswith("tracks.json")]
    return said, overlay and len(list(VideoSource(overlay))), rows, *tracks


def test_a_checkpoint_s_own_kind_of_segmenter_is_loaded(segmenters):
    assert isinstance(segmenters["clips"], VideoSegmenter) and isinstance(segmenters["images"], Segmenter)


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_gives_what_the_command_gives(kind, checkpoints, segmenters, video, tmp_path, capsys):
    seen = []

    def counting(frames, total):
        assert total == LENGTH
        for number, frame in enumerate(frames):
            seen.append(number)
            yield frame

    said, overlay, rows, tracks = ask(segmenters[kind], video, progress=counting)
    assert said == "" and overlay == LENGTH and seen == list(range(LENGTH))
    model = ["--model", str(checkpoints / kind), "--device", "cpu", "--threshold", "0.1"]
    assert main(["predict", str(video), *model, "--output", str(tmp_path / "out")]) == 0
    theirs = json.loads((tmp_path / "out" / "tracks.json").read_text())
    assert [track | {"video_id": str(video)} for track in tracks] == theirs
    assert {track["video_id"] for track in tracks} == {"walk.mp4"}, "no folder of the server"
    assert len(rows) > 0 and all(len(row) == len(TRACK_COLUMNS) for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_the_limit_is_left_out_and_said(kind, segmenters, video):
    said, overlay, rows, tracks = ask(segmenters[kind], video, most_frames=5)
    assert "these are its first 5 frames" in said and overlay == 5
    assert {len(track["segmentations"]) for track in tracks} == {5} and max(row[-1] for row in rows) == 4
    said, overlay, *_ = ask(segmenters[kind], video, most_frames=1)
    assert overlay == 1 and "its first 1 frames" in said


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_that_is_damaged_in_the_middle_is_shown_up_to_there(kind, segmenters, video, monkeypatch):
    whole = VideoSource.__iter__

    def broken(self):
        for number, frame in enumerate(whole(self)):
            if number == 5 and self.name == str(video):
                raise ValueError(f"{self.name}: damaged after 5 frames")
            yield frame

    monkeypatch.setattr(VideoSource, "__iter__", broken)
    said, overlay, _, tracks = ask(segmenters[kind], video)
    assert "walk.mp4: damaged after 5 frames. Shown is what came before: 5 frames." in said and overlay == 5
    assert str(video.parent) not in said and {len(track["segmentations"]) for track in tracks} == {5}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_segmented_before_a_stop_is_shown(kind, segmenters, video):
    answers = iter([False] * 5 + [True])
    said, overlay, _, tracks = ask(segmenters[kind], video, stopped=lambda: next(answers))
    assert "Stopped. Shown is what came before: 5 frames." in said and "longer" not in said
    assert overlay == 5 and {len(track["segmentations"]) for track in tracks} == {5}
    said, *rest = ask(segmenters[kind], video, stopped=lambda: True)
    assert "Stopped" in said and rest == [None, []]


def test_stop_ends_the_runs_that_are_there_and_no_other():
    runs = Runs()
    with runs.run("a") as first, runs.run("b") as other:
        runs.stop("a")
        runs.ask("a")  # another click
        with runs.run("a") as second:
            assert [first(), second(), other()] == [True, False, False]
            runs.stop("a")
            assert second()
        assert runs.is_running("a")
    assert not runs.is_running("a") and not runs.is_running("b")


def test_stop_ends_a_run_that_waits_and_a_closed_page_leaves_nothing():
    runs = Runs()
    runs.stop("a")
    with runs.run("a") as stopped:
        assert stopped()
    with runs.run("a") as stopped:
        assert not stopped()
        runs.close("a")
        assert stopped()
    runs.stop("a"), runs.ask("a"), runs.stop("b"), runs.close("b")
    assert vars(runs) == vars(Runs())


def test_what_cannot_be_segmented_is_a_message_without_a_path(segmenters, video, tmp_path, monkeypatch):
    images = segmenters["images"]
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    for name in ("empty.mp4", "cut.mp4"):
        said, *rest = ask(images, tmp_path / name)
        assert f"{name}: cannot be read as a video" in said and str(tmp_path) not in said and rest == [None, []]
    assert "66 x 48 pixels, and this page takes 0.002 million" in ask(images, video, most_pixels=2000)[0]
    assert "models of clips have &#x27;instance&#x27; alone" in ask(segmenters["clips"], video, task="panoptic")[0]
    said, overlay, rows, _ = ask(images, video, threshold=1.0)
    assert re.search(r"No object has a score above .* The best score of the first frames is 0\.\d\d", said)
    assert overlay == LENGTH and rows == []
    assert ask(images, None) == ("", None, [])
    monkeypatch.setitem(sys.modules, "av", None)
    said, overlay, rows = ask(images, video)
    assert "pip install av" in said and overlay is None


def test_semantic_results_have_colours_and_no_objects(segmenters, video):
    said, overlay, rows, tracks = ask(segmenters["images"], video, task="semantic")
    assert said == "" and overlay == LENGTH and rows == tracks == []


def test_objects_without_a_pixel_are_no_rows():
    tracks = [
        {"id": 3, "category_id": 1, "score": 0.51249, "segmentations": [None, {}, None, {}]},
        {"id": 4, "category_id": 0, "score": 0.9, "segmentations": [None] * 4},
    ]
    assert track_rows(tracks, {0: "cat", 1: "dog"}) == [[3, "dog", 0.512, 1, 3]]


def test_in_the_browser_a_video_becomes_an_overlay_a_table_and_files(segmenters, video, serve, browser, tmp_path):
    (tmp_path / "damaged.mp4").write_bytes(video.read_bytes()[:500])
    view = browser.new_page()
    view.set_default_timeout(20000)
    view.goto(serve(segmenters["clips"], most_frames=8))
    view.get_by_label("Threshold").first.fill("0.1")
    view.set_input_files("#video input[type=file]", video)
    view.wait_for_selector("#video-files a[download='tracks.json']")
    view.wait_for_function("document.querySelector('#video-overlay video').videoWidth > 0")
    assert "these are its first 8 frames" in view.locator("#video-said").inner_text()
    with view.expect_download() as download:
        view.locator("#video-files a[download='tracks.json']").click()
    tracks = json.loads(Path(download.value.path()).read_text())
    assert np.shape([track["segmentations"] for track in tracks])[1] == 8
    view.locator("#video button[aria-label*=lear]").first.click()
    view.set_input_files("#video input[type=file]", tmp_path / "damaged.mp4")
    view.get_by_text("damaged.mp4: cannot be read as a video").wait_for()


def test_in_the_browser_a_running_video_is_stopped_and_the_next_one_is_not(
    segmenters, video, serve, browser, monkeypatch
):
    whole, slow = VideoSource.__iter__, [True]

    def endless(self):
        while slow[0]:
            for frame in whole(self):
                time.sleep(0.1)
                yield frame
        yield from whole(self)

    monkeypatch.setattr(VideoSource, "__iter__", endless)
    view = browser.new_page()
    view.set_default_timeout(20000)
    view.goto(serve(segmenters["clips"], most_frames=10000))
    assert view.locator("#stop-video").is_disabled()
    view.set_input_files("#video input[type=file]", video)
    view.locator("#stop-video:enabled").wait_for()
    view.wait_for_timeout(500)
    view.locator("#stop-video").click()
    view.get_by_text("Stopped").wait_for()
    view.locator("#stop-video:disabled").wait_for()
    slow[0] = False
    view.locator("#segment-video").click()
    view.wait_for_selector("#video-files a[download='tracks.json']")
    view.wait_for_function("!document.querySelector('#video-said').innerText.includes('Stopped')")


def test_in_the_browser_the_webcam_gives_a_video(segmenters, serve, browser):
    pytest.importorskip("av", reason="video files need PyAV")
    view = browser.new_context(permissions=["camera"]).new_page()
    view.set_default_timeout(20000)
    view.goto(serve(segmenters["images"], most_frames=4))
    view.get_by_role("tab", name="Video").click()
    view.get_by_label("Threshold").last.fill("0.1")
    view.locator("#video").get_by_label("Capture from camera").click()
    view.get_by_text("Click to Access Webcam").click()
    view.wait_for_function("document.querySelector('#video video')?.currentTime > 0")
    record = view.locator("#video").get_by_label("start recording")
    record.click()
    view.wait_for_timeout(2000)  # a busy browser's first frames come late
    record.click()
    view.wait_for_selector("#video-files a[download='video.mp4']")
