"""Formats of other tools on the command line: `predict --format`, `convert-data`, and training on what comes back."""

import json

import numpy as np
import pytest
from helpers import SHARED, sure_checkpoint
from PIL import Image

from mask2former_hf.cli.main import main
from mask2former_hf.data.formats.writers import TOOL_WRITERS
from mask2former_hf.data.recognise import recognise

pytest.importorskip("shapely")
NUCLEI = SHARED / "data" / "nuclei_dsb2018"
FILES = {
    "geojson": {"a.geojson", "b.geojson", "classes.json"},
    "yolo": {"labels/a.txt", "labels/b.txt", "data.yaml"},
    "labelme": {"a.json", "b.json", "classes.json"},
    "label-studio": {"label_studio.json", "label_config.xml", "classes.json"},
    "parquet": {"segments.parquet", "classes.json"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = sure_checkpoint(tmp_path_factory, task="instance", num_queries=20)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("work") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for name, size in (("a.png", (60, 90)), ("b.jpg", (100, 70))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_predict_writes_every_format_into_a_folder_of_its_name(checkpoint, photos, tmp_path):
    assert set(FILES) == set(TOOL_WRITERS)
    output = tmp_path / "out"
    arguments = ["predict", str(photos), "--model", str(checkpoint), "--output", str(output), "--threshold", "0.1"]
    assert main([*arguments, "--format", "coco", *FILES, "--tolerance", "0.5"]) == 0
    for name, files in FILES.items():
        assert files_below(output / name) == files
    entries = json.loads((output / "instances.json").read_text())
    lines = (output / "yolo/labels/a.txt").read_text().splitlines()
    features = json.loads((output / "geojson/a.geojson").read_text())["features"]
    assert len(lines) == len(features) == sum(entry["file_name"] == "a.png" for entry in entries) > 0
    assert features[0]["properties"]["measurements"]["score"] == entries[0]["score"]
    tasks = json.loads((output / "label-studio/label_studio.json").read_text())
    assert [task["data"]["image"].split("d=")[-1] for task in tasks] == ["a.png", "b.jpg"]
    assert tasks[0]["predictions"][0]["model_version"] == checkpoint.name  # no path of this machine
    assert main([*arguments, "--format", "yolo"]) == 2  # results of another run are there


def test_predictions_in_labelme_s_format_are_corrected_and_trained_on(checkpoint, photos, tmp_path, capsys):
    output = photos.parent / "labels"
    arguments = ["--model", str(checkpoint), "--output", str(output), "--threshold", "0.1"]
    assert main(["predict", str(photos), *arguments, "--format", "labelme"]) == 0
    file = output / "labelme" / "a.json"
    content = json.loads(file.read_text())
    assert (file.parent / content["imagePath"]).resolve() == photos / "a.png"
    content["shapes"] = [{**content["shapes"][0], "label": "cell", "points": [[5, 5], [60, 5], [60, 40], [5, 40]]}]
    file.write_text(json.dumps(content))  # what a person corrected, in a class that the model did not know
    (file.parent / "classes.json").write_text(json.dumps(["cell", *(f"LABEL_{k}" for k in range(5))]))
    run = [
        "--output",
        str(tmp_path / "run"),
        "--backbone",
        "tiny",
        "--steps",
        "1",
        "--batch-size",
        "1",
        "--crop",
        "64",
    ]
    assert main(["train", str(file.parent), *run, "--held-out", "0.5", "--queries", "60"]) == 0
    said = capsys.readouterr().out
    assert "recognised data: labelme" in said and "cell" in said
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_wrong_tolerance_and_a_missing_package_are_one_line(checkpoint, photos, tmp_path, capsys, monkeypatch):
    arguments = ["predict", str(photos), "--model", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--format", "yolo", "--tolerance", "-1"]) == 2
    assert "--tolerance -1.0: must be 0 (exact) or more pixels" in capsys.readouterr().err
    monkeypatch.setattr("mask2former_hf.data.formats.writers.find_spec", lambda name: None)
    assert main([*arguments, "--format", "parquet"]) == 2
    assert "--format parquet: needs the packages pyarrow: pip install" in capsys.readouterr().err


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="real data (../shared/data) not found")
def test_convert_data_turns_both_splits_and_says_what_is_lost(tmp_path, capsys):
    for split, count in (("train", 2), ("val", 1)):
        (tmp_path / "from" / "images" / split).mkdir(parents=True)
        (tmp_path / "from" / "labels" / split).mkdir(parents=True)
        for path in sorted((NUCLEI / "images" / split).iterdir())[:count]:
            (tmp_path / "from" / "images" / split / path.name).symlink_to(path)
            truth = NUCLEI / "instance_labels" / split / path.name
            (tmp_path / "from" / "labels" / split / path.name).symlink_to(truth)
    (tmp_path / "from" / "labels").rename(tmp_path / "from" / "numbers")  # a name that says nothing
    source, flags = str(tmp_path / "from"), ["--data", "instance-maps", "--classes", "nucleus"]
    for split in ("train", "val"):
        flags += [f"--{split}-images", f"images/{split}", f"--{split}-maps", f"numbers/{split}"]
    assert main(["convert-data", source, str(tmp_path / "yolo"), "--format", "yolo", *flags]) == 0
    said = capsys.readouterr().out
    assert "train: 2 images, 1 classes" in said and "val: 1 images, 1 classes" in said
    found = recognise(tmp_path / "yolo")
    assert found["data"] == "yolo" and found["val_images"] == tmp_path / "yolo/images/val"
    assert main(["convert-data", str(tmp_path / "yolo"), str(tmp_path / "back"), "--format", "instance-maps"]) == 0
    for truth in (tmp_path / "from" / "numbers").rglob("*.png"):
        back = tmp_path / "back/instance_labels" / truth.relative_to(tmp_path / "from/numbers")
        ours, theirs = np.asarray(Image.open(back)), np.asarray(Image.open(truth))
        pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)
        assert len(pairs[0]) == len(set(pairs[0])) == len(set(pairs[1]))  # the same objects, numbered anew


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["nowhere", "to", "--format", "yolo"], "FROM nowhere: no such folder of data"),
        ([".", "to", "--format", "yolo"], "no annotations recognised"),
        ([".", ".", "--format", "yolo"], "exists already and is not empty; name another folder"),
        ([".", "to", "--format", "yolo", "--tolerance", "-2"], "--tolerance -2.0: must be 0"),
    ],
)
def test_what_cannot_be_converted_is_one_line(arguments, problem, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(["convert-data", *arguments]) == 2
    assert problem in capsys.readouterr().err
