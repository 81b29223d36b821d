"""`doctor` prints what it finds, worst first, and its exit code says whether anything would fail."""

import json

import numpy as np
from PIL import Image

from mask2former_hf import ScenesDataset
from mask2former_hf.cli.main import main
from mask2former_hf.cli.training_output import summary
from mask2former_hf.data.formats.convert import convert
from mask2former_hf.training.run import TrainingRun
from mask2former_hf.training.settings import TrainingSettings


def test_healthy_data_and_the_settings_that_fit_them(tmp_path, capsys):
    for split, seed in (("train", 0), ("val", 1000)):
        convert(ScenesDataset(12, size=64, seed=seed), tmp_path, "coco-instances", split)
    assert main(["doctor", "--data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0 errors, 0 warnings: nothing looks wrong" in out
    assert "repair: --crop " in out and "repair: --queries 100" in out


def test_data_that_cannot_be_read_end_with_1_and_say_why(tmp_path, capsys):
    convert(ScenesDataset(4, size=64), tmp_path, "coco-instances")
    path = tmp_path / "annotations/instances_train.json"
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["category_id"] += 1
    used = {entry["category_id"] - 1 for entry in content["annotations"]}
    content["categories"] = [row for row in content["categories"] if row["id"] in used]
    path.write_text(json.dumps(content))
    assert main(["doctor", "--data", str(tmp_path)]) == 1
    assert "repair: every category_id is off by +1" in capsys.readouterr().out


def test_without_anything_to_look_at_the_flags_are_named(capsys):
    assert main(["doctor"]) == 2
    assert "give --data FOLDER" in capsys.readouterr().err


def test_train_says_before_it_starts_what_the_doctor_finds_without_reading_more(tmp_path):
    for split in ("train", "val"):
        for number in range(4):
            for place, pixels in (
                ("images", np.zeros((32, 32, 3), np.uint8)),
                ("maps", (1 + np.arange(1024) % 2).reshape(32, 32)),
            ):
                file = tmp_path / place / split / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    data = {
        f"{split}_{place}": str(tmp_path / place / split) for split in ("train", "val") for place in ("images", "maps")
    }
    settings = TrainingSettings(
        output=tmp_path / "run", backbone="tiny", data="label-maps", classes={0: "sky", 1: "road", 2: "car"},
        crop=64, steps=1, cpu=True, **data,
    )  # fmt: skip
    lines = summary(TrainingRun(settings, show=False)).splitlines()
    assert [line[:44] for line in lines if line.startswith("Warning: ")] == [
        "Warning: train: class 0, 'sky', never occurs",
        "Warning: val: class 0, 'sky', never occurs a",
    ]
