"""`doctor` prints what it finds, worst first, and its exit code says whether anything would fail."""

import json

from mask2former_hf import ScenesDataset
from mask2former_hf.cli.main import main
from mask2former_hf.data.formats.convert import convert


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
