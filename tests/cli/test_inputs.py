"""Files that a command is given: every wrong setting and every damaged checkpoint is one line and exit code 2."""

import argparse
import json
import re
import shutil
from dataclasses import fields

import pytest
import torch
from helpers import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from wrong_values import VALUES, assert_names

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.cli import env, train
from mask2former_hf.cli.main import UserError, main
from mask2former_hf.data.class_forms import class_table
from mask2former_hf.training.setting_checks import check
from mask2former_hf.training.settings import TrainingSettings, complete

SETTINGS = [entry.name for entry in fields(TrainingSettings)]
NEEDED = {"output": "out", "backbone": "tiny", "data": "scenes", "steps": 1}


def read(text, folder):
    """The settings that the file says, checked as `train` checks them before it reads any data."""
    (folder / "run.yaml").write_text(text)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    train.add_arguments(parser)
    arguments = parser.parse_args([str(folder / "run.yaml")])
    arguments.parser = parser
    settings = train.settings_of(arguments)
    check(complete(settings)[0])
    if settings.classes is not None:
        class_table(settings.classes)
    return settings


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_with_every_wrong_value_is_taken_or_refused_by_name(tmp_path, name):
    kinds = {entry.name: str(entry.type) for entry in fields(TrainingSettings)}
    for value in VALUES.values():
        try:
            settings = read(json.dumps(NEEDED | {name: value}), tmp_path)
        except (UserError, ValueError) as error:
            names = (name, name.replace("_", "-"), "run.yaml: values are nested")
            assert_names(error, *names, "model=" if name == "backbone" else name)
            continue
        taken = getattr(settings, name)
        assert not isinstance(taken, dict) and ("str" in kinds[name] or taken == taken), (value, taken)


@pytest.mark.parametrize(
    "text, message",
    [
        ("classes: 5", "classes"),
        ("classes: &a [*a]", "nested more than 6 deep, or contain themselves: write them flat"),
        ("&a {steps: *a}", "nested more than 6 deep, or contain themselves"),
        ("classes: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("steps: 1\nsteps: 2", r"the keys \['steps'\] are there twice"),
        ("classes: {1: road, 1: car}", r"the keys \['1'\] are there twice"),
        ("batch-size: 1\nbatch_size: 2", r"the keys \['batch_size'\] are there twice, with - and with _: keep one"),
        ("stepps: 1", r"unknown keys \['stepps'\]"),
        ("- steps", "must be a mapping"),
        ("steps: [1", "run.yaml: .*expected.*: correct the file"),
        ("steps: 2020-13-45", "month must be in 1..12"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("short_sides: [1, [2]]", "short_sides: .* must be one value or a list of values"),
        ("bf16: 1", "bf16: 1 must be true or false"),
    ],
)
def test_a_file_of_settings_that_makes_no_sense_is_one_line(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    flags = ["--output", str(tmp_path / "out"), "--backbone", "tiny", "--data", "scenes"]
    flags += [] if "step" in text else ["--steps", "1"]
    assert main(["train", str(tmp_path / "run.yaml"), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and re.search(message, lines[0]) and len(lines[0]) < 1500, lines


@pytest.mark.parametrize(
    "flags, line",
    [
        (["nothere"], "nothere: there is no such folder of data, and no such YAML file: correct the path"),
        (
            ["--feature-cache", "c1"],
            "--feature-cache c1: needs --freeze-backbone without a number ('all') and --augmentation none: maps",
        ),
        (
            ["--data", "scenes", "--train-limit", "2", "--val-limit", "1", "--crop", "64", "--memory-budget", "0.001"],
            "or a smaller --batch-size or --crop\n",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_in_flags(tmp_path, capsys, flags, line):
    given = ["--output", str(tmp_path / "out"), "--backbone", "tiny", "--steps", "1", "--cpu"]
    assert main(["train", *flags, *given]) == 2
    assert line in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4]).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    Image.new("RGB", (40, 30)).save(folder / "photo.png")
    return folder


@pytest.fixture
def predict(checkpoint, tmp_path, capsys):
    """A function that damages a copy of the checkpoint and predicts with it; what is said on stderr."""

    def predict(damage):
        folder = tmp_path / "copy"
        shutil.copytree(checkpoint, folder)
        damage(folder)
        given = [str(folder / "photo.png"), "--model", str(folder), "--output", str(tmp_path / "out")]
        code = main(["predict", *given])
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line.startswith(("mask2former-hf", "Traceback"))]

    return predict


def edited(file, **changes):
    def damage(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def with_number(number):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["class_predictor.bias"][1] = number
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


DEEP_FILE = "[" * 100_000


@pytest.mark.parametrize(
    "damage, message",
    [
        (with_number(float("nan")), "class_predictor.bias has values that are nan or infinite, as 1 of its tensors"),
        (with_number(float("inf")), "class_predictor.bias has values that are nan or infinite"),
        (edited("config.json", hidden_dim=0), "hidden_dim=0: must be a whole number from 1"),
        (edited("config.json", hidden_dim="wide"), "'hidden_dim' expected int, got str"),
        (edited("config.json", decoder_layers=10**6), "decoder_layers=1000000"),
        (edited("config.json", dropout=float("nan")), "dropout=nan"),
        (edited("config.json", id2label=[1]), "id2label"),
        (edited("config.json", backbone_config=5), "backbone_config"),
        (edited("config.json", backbone_config={"model_type": "no"}), r"cannot be read \(ValueError: .*no"),
        (lambda folder: (folder / "config.json").write_text(DEEP_FILE), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be read"),
        (edited("preprocessor_config.json", size={"shortest_edge": 0}), "preprocessor_config.json: size="),
        (edited("preprocessor_config.json", size="large"), "preprocessor_config.json: size="),
        (edited("preprocessor_config.json", image_std=[0, 1, 1]), r"preprocessor_config.json: image_std=\[0, 1, 1\]"),
        (edited("preprocessor_config.json", resample=99), "preprocessor_config.json: resample=99"),
        (edited("preprocessor_config.json", label_ids_to_fuse=5), "preprocessor_config.json: label_ids_to_fuse=5"),
        (lambda folder: (folder / "preprocessor_config.json").write_text(DEEP_FILE), "preprocessor_config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "preprocessor_config.json"),
    ],
)
def test_a_checkpoint_with_senseless_numbers_is_one_line(predict, damage, message):
    code, lines = predict(damage)
    assert code == 2 and len(lines) == 1 and re.search(message, lines[0]) and len(lines[0]) < 900, lines


def test_a_checkpoint_that_prefers_tuples_works(predict):
    assert predict(edited("config.json", return_dict=False)) == (0, [])


def test_a_fault_of_ours_shows_a_traceback_and_asks_to_be_reported(monkeypatch, capsys):
    def fail():
        raise RuntimeError("two and two are five")

    monkeypatch.setattr(env, "kernel_report", fail)
    assert main(["env"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "RuntimeError: two and two are five" in said
    assert "please report it" in said.lower() and "`mask2former-hf env`" in said.splitlines()[-1]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no room. Tried to allocate"), OSError(28, "disk full")]
)
def test_what_the_machine_lacks_is_no_fault_and_one_line(monkeypatch, capsys, error):
    def fail():
        raise error

    monkeypatch.setattr(env, "kernel_report", fail)
    assert main(["env"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
