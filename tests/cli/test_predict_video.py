"""`mask2former-hf predict` of videos."""

import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image
from videos import save_checkpoints, write_video

from mask2former_hf import Mask2FormerForVideoSegmentation, MovingScenes
from mask2former_hf.cli.main import main
from mask2former_hf.inference.video_files import VideoSource

pytest.importorskip("av", reason="video files need PyAV")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def frames():
    return [MovingScenes(1, 12, size=(48, 66))[0].frame(number) for number in range(12)]


def predict(source, model, output, *more):
    return main(["predict", str(source), "--model", str(model), "--output", str(output), "--device", "cpu", *more])


@pytest.mark.parametrize("kind", ["clips", "images"])
def test_a_video_file_becomes_an_overlay_and_tracks(kind, checkpoints, frames, tmp_path, capsys):
    source = write_video(tmp_path / "in.mp4", frames)
    assert predict(source, checkpoints / kind, tmp_path / "out", "--threshold", "0.1") == 0
    assert "12 frames" in capsys.readouterr().out
    overlay = VideoSource(tmp_path / "out" / "video.mp4")
    assert overlay.rate == 5 and len(list(overlay)) == 12
    tracks = json.loads((tmp_path / "out" / "tracks.json").read_text())
    assert tracks and len({track["id"] for track in tracks}) == len(tracks)
    for track in tracks:
        assert len(track["segmentations"]) == 12 and 0 <= track["category_id"] < 5 and 0 < track["score"] <= 1
        assert all(code is None or code["size"] == [48, 66] for code in track["segmentations"])
    assert predict(source, checkpoints / kind, tmp_path / "out") == 2, "results of another run are not overwritten"


def test_a_folder_is_a_video_if_one_says_so(checkpoints, frames, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames[:3]):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number:03d}.png")
    assert predict(tmp_path / "frames", checkpoints / "clips", tmp_path / "out", "--video") == 0
    assert "3 frames" in capsys.readouterr().out
    Image.fromarray(frames[0][:40]).save(tmp_path / "frames" / "003.png")
    assert predict(tmp_path / "frames", checkpoints / "images", tmp_path / "changes", "--video") == 2
    shown = capsys.readouterr()
    assert "a frame is 40x66, those before are 48x66" in shown.err and "3 frames" in shown.out, (
        "what came before is kept"
    )


def test_files_that_are_no_videos_are_named(checkpoints, frames, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    whole = write_video(tmp_path / "whole.mp4", frames).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("text.mp4", "empty.mp4", "cut.mp4"):
        assert predict(tmp_path / name, checkpoints / "clips", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert f"{name}: cannot be read as a video" in said and ("is empty" in said) == (name == "empty.mp4")
    assert predict(tmp_path / "none.mp4", checkpoints / "clips", tmp_path / "out") == 2
    assert "none.mp4: no such file" in capsys.readouterr().err
    for flags in (["--tta"], ["--level", "1"]):
        assert predict(tmp_path / "whole.mp4", checkpoints / "clips", tmp_path / "out", *flags) == 2
        assert f"{flags[0]}: is for images" in capsys.readouterr().err


def test_a_video_in_which_nothing_is_found_gets_a_hint(checkpoints, frames, tmp_path, capsys):
    source = write_video(tmp_path / "one.mp4", frames[:1])
    assert predict(source, checkpoints / "images", tmp_path / "out", "--threshold", "1") == 0
    shown = capsys.readouterr().out
    assert "1 frames, 0 objects" in shown and "try --threshold" in shown
    assert 0 < float(shown.split("best score of the first frames ")[1].split(";")[0]) < 1
    assert predict(source, checkpoints / "clips", tmp_path / "other", "--stuff", "1") == 2
    assert "--stuff=[1]: is for models of images" in capsys.readouterr().err


def test_a_written_video_has_its_frames_upright_and_even(tmp_path):
    frames = [np.full((33, 51, 3), [250, 20 * number, 0], np.uint8) for number in range(5)]
    back = list(VideoSource(write_video(tmp_path / "video.mp4", frames)))
    assert [frame.shape for frame in back] == [(32, 50, 3)] * 5
    for frame, read in zip(frames, back, strict=True):
        assert abs(frame[0, 0].astype(int) - read.mean((0, 1))).max() < 12


def test_the_rate_of_a_recording_that_does_not_say_it_is_that_of_its_frames(tmp_path):
    """As of a browser's webm; seven frames, one every 140 milliseconds."""
    import av

    with av.open(str(tmp_path / "recording.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.time_base, stream.codec_context.framerate = Fraction(1, 1000), Fraction(0)
        for number in range(7):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 140 * number, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    source = VideoSource(tmp_path / "recording.mkv")
    assert source.rate == pytest.approx(1 / 0.14) and len(list(source)) == 7


def test_the_demo_of_videos_leaves_a_checkpoint_figures_and_pictures(tmp_path, capsys):
    pytest.importorskip("pycocotools", reason="average precision needs a COCO package")
    flags = ["--steps", "1", "--batch-size", "1", "--eval-images", "1", "--pictures", "1", "--device", "cpu"]
    assert main(["demo", "--video", "--output", str(tmp_path), *flags]) == 0
    assert "switches" in capsys.readouterr().out
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["steps"] == 1 and {"clips", "frames linked by overlap"} <= set(figures)
    assert (tmp_path / "pictures" / "000.png").exists() and len(
        list(VideoSource(tmp_path / "pictures" / "000.mp4"))
    ) == 16
    assert Mask2FormerForVideoSegmentation.from_pretrained(tmp_path).config.id2label[0] == "disc"
