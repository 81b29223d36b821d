"""`train` and `evaluate` as a user runs them: on generated scenes, on real data, and when something is wrong."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import SHARED
from PIL import Image
from processes import Python

import mask2former_hf
import mask2former_hf.training.setting_checks as setting_checks
from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.cli import train as train_command
from mask2former_hf.cli.main import main
from mask2former_hf.cli.settings import read_settings
from mask2former_hf.data.coco import CocoPanoptic
from mask2former_hf.data.example import Example
from mask2former_hf.data.json_files import write_json
from mask2former_hf.data.scenes import Scenes
from mask2former_hf.evaluation.evaluator import SegmentationEvaluator
from mask2former_hf.hub.model_card import INSTALL
from mask2former_hf.inference.segmenter import Segmenter
from mask2former_hf.model.mask_losses import Focal
from mask2former_hf.training.recipes import load_recipe, recipe_names
from mask2former_hf.training.settings import TrainingSettings, complete

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="annotated images (../shared/data) not found")
SMALL = ["--crop", 64, "--steps", 2, "--batch-size", 2, "--eval-every", 1, "--cpu"]
SCENES = ["--data", "scenes", "--train-limit", 6, "--val-limit", 3]
PANOPTIC = DATA / "coco_panoptic"


def command(*arguments):
    return main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """What the command says when it exits with 2 before it starts."""
    assert command("train", *arguments) == 2
    return capsys.readouterr().err


def panoptic_paths(prefix, split="val"):
    return [
        *(f"--{prefix}images", PANOPTIC / split, f"--{prefix}maps", PANOPTIC / f"panoptic_{split}"),
        *(f"--{prefix}annotations", PANOPTIC / "annotations" / f"panoptic_{split}.json"),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on scenes that was finished."""
    folder = tmp_path_factory.mktemp("run")
    assert command("train", *SCENES, "--backbone", "tiny", *SMALL, "--output", folder) == 0
    return folder


def test_a_run_leaves_a_checkpoint_its_figures_and_a_picture_of_the_first_batch(trained):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(trained)
    assert model.config.task == "panoptic" and model.config.num_labels == 5
    assert Mask2FormerImageProcessor.from_pretrained(trained).size == {"shortest_edge": 64, "longest_edge": 128}
    pixels = model.config.class_table["pixels"]  # of the six scenes looked at: 128 x 128 each, all of it labelled
    assert sum(pixels) == 6 * 128 * 128 and len(pixels) == 5
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "| pq |" in card and "disc" in card
    result = json.loads((trained / "results.json").read_text())
    assert result["steps"] == 2 and 0 <= result["metrics"]["pq"] <= 1
    width, height = Image.open(trained / "first_batch.png").size
    assert width == 2 * height  # two square images


def test_a_run_leaves_its_log_and_a_table_of_its_figures(trained):
    log = (trained / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in log)
    assert any("6 images to train on" in line for line in log) and any("step 2: eval_pq" in line for line in log)
    with (trained / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["pq"]) == json.loads((trained / "results.json").read_text())["metrics"]["pq"]


def test_a_run_leaves_a_report_of_its_results_and_its_curves(trained):
    page, result = (trained / "report.html").read_text(), json.loads((trained / "results.json").read_text())
    for heading in ("Metrics", "The run", "Classes", "What was taken for what", "The worst images", "Settings"):
        assert f">{heading}</" in page
    assert page.count("data:image/jpeg") == 3 * 3 and len(result["images"]) == 3  # scenes to measure
    assert {row["name"] for row in result["summary"]["pq"]["per_class"].values()} >= {"disc", "sky"}
    width, height = Image.open(trained / "curves.png").size
    assert width > 2 * height


def test_without_matplotlib_a_run_goes_on_and_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command("train", *SCENES, "--backbone", "tiny", *SMALL, "--output", tmp_path) == 0
    out, progress = capsys.readouterr()
    lines = [line for line in out.splitlines() if "need matplotlib" in line]
    assert len(lines) == 1 and "pip install matplotlib" in lines[0]
    assert "images" in json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "curves.png").exists()
    assert re.search(r"step 2: pq .* \(best pq [\d.]+ at step [12]\); 0 s left", out + progress)


def test_the_card_has_its_data_the_install_line_and_figures_in_percent(trained):
    text = (trained / "README.md").read_text()
    assert f"# {trained.name}\n" in text and f"name: {trained.name}\n" in text and INSTALL in text
    figures = json.loads((trained / "results.json").read_text())["metrics"]
    assert "## Results on scenes\n\n| metric | value in percent |" in text
    assert f"| pq | {100 * figures['pq']:.4g} |" in text


def test_the_terminal_shows_no_noise(tmp_path, capfd):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--steps", 1, "--metrics", "ap", "--output", tmp_path]
    assert command("train", *run) == 0
    said = "".join(capfd.readouterr())
    for noise in ("pin_memory", "Writing model shards", "Loading weights", "not a supported model", "nan"):
        assert noise not in said, noise


def test_help_is_in_groups_and_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        command("train", "--help")
    said = capsys.readouterr().out
    for title in train_command.GROUPS.values():
        assert f"\n{title}:\n" in said
    assert len(said.split("options:")[0].splitlines()) < 12  # no list of all flags before they are explained


def test_evaluate_gives_the_figures_that_training_ended_with(trained, tmp_path, capsys):
    path = tmp_path / "summary.json"
    arguments = ["--data", "scenes", "--limit", 3, "--json", path]
    assert command("evaluate", "--model", trained, *arguments, "--device", "cpu") == 0
    figures, summary = json.loads((trained / "results.json").read_text())["metrics"], json.loads(path.read_text())
    for name in ("pq", "sq", "rq"):
        assert summary["pq"]["all"][name] == pytest.approx(figures[name], abs=1e-6)
    assert "pq per class" in capsys.readouterr().out


def test_a_run_is_not_overwritten_and_resume_says_what_is_missing(trained, tmp_path, capsys):
    again = [*SCENES, "--backbone", "tiny", *SMALL]
    assert "--resume" in refused(capsys, *again, "--output", trained)
    assert "no complete checkpoint" in refused(capsys, *again, "--output", tmp_path / "new", "--resume")


def test_resume_goes_on_where_the_run_was(tmp_path):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--output", tmp_path]
    assert command("train", *run) == 0
    assert command("train", *run, "--steps", 3, "--resume") == 0
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_pq" in entry]
    assert evaluated == [1, 2, 3] and json.loads((tmp_path / "results.json").read_text())["steps"] == 3


def test_resuming_a_finished_run_says_so_and_leaves_everything(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert command("train", *SCENES, "--backbone", "tiny", *SMALL, "--output", trained, "--resume") == 0
    assert "is complete, all 2 steps are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_a_run_that_was_killed_before_its_results_writes_them_when_resumed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").unlink()
    assert command("train", *SCENES, "--backbone", "tiny", *SMALL, "--output", tmp_path / "run", "--resume") == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["metrics"]["pq"] == written["metrics"]["pq"] and not (tmp_path / "run" / "checkpoint-3").exists()


@pytest.mark.parametrize("start", ["--backbone", "--model"])
def test_the_mask_loss_can_be_chosen(trained, tmp_path, start):
    given = [*SCENES, *SMALL, "--steps", 1, start, "tiny" if start == "--backbone" else trained]
    assert command("train", *given, "--mask-loss", "focal", "--mask-weight", 20, "--output", tmp_path) == 0
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert model.criterion.settings.mask_terms["loss_mask"] == Focal(0.25, 2.0)
    assert model.config.mask_weight == 20


def test_a_teacher_teaches_with_labels_and_without_and_from_its_cache(trained, tmp_path, capsys):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--teacher", trained, "--log-every", 1]
    cache = ["--teacher-only", "--augmentation", "none", "--teacher-cache", tmp_path / "cache"]
    for name, options in {"both": [], "alone": cache}.items():
        assert command("train", *run, *options, "--output", tmp_path / name) == 0
        state = json.loads((tmp_path / name / "checkpoint-2" / "trainer_state.json").read_text())
        for row in (row for row in state["log_history"] if "loss" in row):
            terms = [value for key, value in row.items() if key.startswith(("loss_", "distillation_"))]
            assert len(terms) == (6 if name == "both" else 3)
            assert sum(terms) == pytest.approx(row["loss"], rel=1e-3)
    assert 2 <= len(list((tmp_path / "cache").iterdir())) <= 6
    assert "need --teacher" in refused(
        capsys, *SCENES, "--backbone", "tiny", *SMALL, *cache, "--output", tmp_path / "x"
    )
    said = refused(capsys, *run, "--teacher-cache", tmp_path, "--output", tmp_path / "x")
    assert "--augmentation none" in said


@pytest.mark.parametrize("augmentation", [["none"], ["lsj"], ["resize-crop", "--short-sides", 48, 96]])
def test_every_augmentation_trains(augmentation, tmp_path):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--steps", 1, "--augmentation", *augmentation]
    assert command("train", *run, "--output", tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 1


def test_a_yaml_file_says_what_flags_say_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    content = {"data": "scenes", "train-limit": 6, "val_limit": 3, "backbone": "tiny", "crop": 64, "steps": 9}
    path.write_text(yaml.safe_dump(content | {"batch_size": 2, "cpu": True, "output": str(tmp_path / "run")}))
    assert command("train", path, "--steps", 1) == 0
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    assert settings["steps"] == 1 and settings["crop"] == 64 and settings["train_limit"] == 6


def test_a_checkpoint_for_other_classes_keeps_the_rows_that_it_knows_by_name(trained, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "maps").mkdir()
    names = list(Mask2FormerForUniversalSegmentation.from_pretrained(trained).config.id2label.values())
    rng = np.random.default_rng(0)
    for index in range(2):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / f"images/{index}.png")
        Image.fromarray(np.repeat([[0], [1]], 35, 0).repeat(90, 1).astype(np.uint8)).save(
            tmp_path / f"maps/{index}.png"
        )
    data = ["--data", "label-maps", "--classes", f"{names[4]},marsh"]
    for split in ("train", "val"):
        data += [f"--{split}-images", tmp_path / "images", f"--{split}-maps", tmp_path / "maps"]
    frozen = ["--learning-rate", 0, "--weight-decay", 0]
    run = ["--model", trained, *SMALL, *frozen, "--queries", 30, "--output", tmp_path / "run"]
    assert command("train", *data, *run) == 0
    assert "random rows in the classifier: marsh" in capsys.readouterr().out
    old = Mask2FormerForUniversalSegmentation.from_pretrained(trained)
    new = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "run")
    assert new.config.num_queries == 30 and new.config.task == "semantic" and new.config.num_labels == 2
    torch.testing.assert_close(new.class_predictor.weight[[0, 2]], old.class_predictor.weight[[4, 5]])


def test_the_learning_rate_is_printed_with_its_reason_and_three_zeros_with_advice(tmp_path, capsys):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--steps", 3, "--clip", 0.5, "--output", tmp_path]
    assert command("train", *run) == 0
    said = capsys.readouterr().out
    assert "learning rate 0.001, 1 of that in the backbone, gradients clipped at 0.5 (clip as given" in said
    assert "as the backbone starts from random weights" in said
    assert "pq was 0 in three evaluations. Try: " in said and "--clip 1;" in said and said.count("Try: ") == 1


def test_setups_that_cannot_work_are_refused_before_training(tmp_path, capsys):
    output = ["--output", tmp_path / "run"]
    base = [*SCENES, "--backbone", "tiny", *output]
    assert "--output is missing" in refused(capsys, *SCENES)
    assert "--data is missing" in refused(capsys, "--backbone", "tiny", "--steps", 1, *output)
    assert "--steps is missing" in refused(capsys, *base)
    assert "choose one" in refused(capsys, *base, "--steps", 1, "--model", "somewhere")
    assert "--batch-size 0" in refused(capsys, *base, "--steps", 1, "--batch-size", 0)
    assert "--learning-rate -1.0" in refused(capsys, *base, "--steps", 1, "--learning-rate", -1)
    assert "--task depth" in refused(capsys, *base, "--steps", 1, "--task", "depth")
    assert "--queries" in refused(capsys, *base, "--steps", 1, "--queries", 1)
    assert "choose from pq, ap" in refused(capsys, *base, *SMALL, "--metrics", "dice")
    assert "not supported" in refused(capsys, *base, *SMALL, "--report-to", "paper")
    assert "needs --augmentation resize-crop" in refused(capsys, *base, "--steps", 1, "--short-sides", 64)
    missing = str(tmp_path / "vgg")
    assert "one of tiny, r50" in refused(capsys, *SCENES, *output, "--steps", 1, "--backbone", missing)
    assert "coco-panoptic-r50" in refused(capsys, *SCENES, *output, "--recipe", "coco-panoptic-r5")
    assert "clips of videos" in refused(capsys, *SCENES, *output, "--recipe", "ytvis-2019-r50")
    for flag, value in (("--weight-decay", "nan"), ("--clip", "inf"), ("--seed", -1), ("--num-workers", -1)):
        assert f"{flag} {value}: must be" in refused(capsys, *base, "--steps", 1, flag, value)
    assert "one or two numbers" in refused(capsys, *base, "--steps", 1, "--test-size", 64, 96, 128)
    assert "--test-size 0: must be at least 1" in refused(capsys, *base, "--steps", 1, "--test-size", 64, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("passes: 3", "unknown keys ['passes']"),
        ("data: coco", "argument --data: invalid choice: 'coco'"),
        ("steps: many", "argument --steps: invalid int value: 'many'"),
        ("steps: 1.5", "argument --steps: invalid int value: '1.5'"),
        ("cpu: 3", "cpu: 3 must be true or false"),
        ("steps: true", "steps: True must be one value"),
        ("steps: [1, 2]", "steps: [1, 2] must be one value"),
        ("- steps", "must be a mapping"),
        ("steps: {", "run.yaml: "),
        ("classes: {road: 0}\ndata: label-maps", "must be from numbers in the maps to names"),
    ],
)
def test_a_yaml_file_is_read_as_strictly_as_flags(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    rest = ["--backbone", "tiny", "--output", tmp_path / "run", "--train-images", tmp_path, "--train-maps", tmp_path]
    rest += [] if "steps" in text else ["--steps", 1]
    assert message in refused(capsys, path, *rest)
    assert not (tmp_path / "run").exists()


def test_numbers_without_a_point_and_lists_of_classes_are_understood_in_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\nshort_sides: [48, 96]\nclasses: [sky, road]\ncpu: true\nbf16: false\n")
    parser = train_command.argparse.ArgumentParser()
    train_command.add_arguments(parser)
    arguments = parser.parse_args([str(path), "--data", "label-maps"])
    arguments.parser = parser
    settings = read_settings(arguments, {"seed": 0})
    assert settings.learning_rate == 1e-5 and settings.short_sides == [48, 96] and settings.seed == 0
    assert settings.cpu is True and settings.bf16 is False and not hasattr(settings, "parser")
    assert settings.classes == ["sky", "road"]


def test_resume_refuses_other_settings_but_not_moved_files(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--output", tmp_path / "run", "--resume"]
    said = refused(capsys, *run, "--learning-rate", 1e-5, "--batch-size", 1)
    assert "learning_rate 1e-05 (was 0.001)" in said and "images_per_step 1 (was 2)" in said
    assert not list((tmp_path / "run").glob("checkpoint-3"))
    assert command("train", *run, "--steps", 3, "--batch-size", 1, "--accumulate", 2, "--num-workers", 1) == 0
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--steps", 1, "--output", tmp_path / "run"]
    assert command("train", *run) == 0
    (tmp_path / "run" / "checkpoint-1" / "complete").unlink()
    for name in ("config.json", "model.safetensors", "results.json"):
        (tmp_path / "run" / name).unlink()
    capsys.readouterr()
    assert command("train", *run, "--resume") == 0
    assert "starts from the beginning" in capsys.readouterr().out
    (tmp_path / "run" / "checkpoint-1" / "complete").unlink()
    for name in ("config.json", "model.safetensors", "results.json"):
        (tmp_path / "run" / name).unlink()
    assert command("train", *run) == 0


def test_a_folder_with_a_model_is_not_overwritten(trained, tmp_path, capsys):
    run = [*SCENES, *SMALL, "--model", trained]
    assert "which would be overwritten" in refused(capsys, *run, "--output", trained)
    (tmp_path / "other").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "other")
    assert "has a model" in refused(capsys, *run, "--output", tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.json"]


def test_overlapping_segments_and_panoptic_quality_are_refused_before_training(tmp_path, capsys):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "a.png")
    boxes = [[2, 2, 30, 2, 30, 30, 2, 30], [10, 10, 50, 10, 50, 35, 10, 35]]
    annotations = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": 1,
            "segmentation": [box],
            "iscrowd": 0,
            "area": 800,
            "bbox": [0] * 4,
        }
        for i, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "categories": [{"id": 1, "name": "disc"}],
        "annotations": annotations,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = ["--data", "coco-instances"]
    for split in ("train", "val"):
        data += [f"--{split}-images", tmp_path, f"--{split}-annotations", tmp_path / "a.json"]
    run = [*data, "--backbone", "tiny", *SMALL, "--steps", 1, "--output", tmp_path / "run"]
    said = refused(capsys, *run, "--metrics", "ap", "miou")
    assert "1 of 1 images have overlapping segments, and there is no miou of those" in said
    assert not (tmp_path / "run").exists()
    assert command("train", *run) == 0


def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(tmp_path):
    run = [*SCENES, "--backbone", "tiny", *SMALL, "--steps", 5000, "--eval-every", 5000, "--output", tmp_path / "run"]
    process = Python("-m", "mask2former_hf", "train", *run)
    assert process.wait_until(lambda process: re.search(r"[1-9]\d*/5000", process.stderr))
    process.kill(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130, done.stderr
    (step,) = {int(number) for number in re.findall(r"--resume goes on from step (\d+)", done.stdout)}
    assert f"Interrupted at step {step}." in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "run" / f"checkpoint-{step}" / "complete").is_file()
    assert not (tmp_path / "run" / "results.json").exists()
    assert command("train", *run, "--resume", "--steps", step + 1) == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == step + 1


def test_figures_that_are_not_numbers_are_null_in_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), 3: [np.float32(0.5), np.int64(2), True, None, "b"]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "3": [0.5, 2, True, None, "b"]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_label_that_no_class_has_is_refused_with_its_file(tmp_path, capsys):
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((40, 40), 7, np.uint8)).save(tmp_path / folder / "a.png")
    data = ["--data", "label-maps", "--classes", "sky,road", "--backbone", "tiny"]
    for split in ("train", "val"):
        data += [f"--{split}-images", tmp_path / "images", f"--{split}-maps", tmp_path / "maps"]
    said = refused(capsys, *data, *SMALL, "--output", tmp_path / "run")
    assert "7" in said and "a.png" in said
    (tmp_path / "maps" / "a.png").rename(tmp_path / "maps" / "b.png")
    assert "a.png" in refused(capsys, *data, *SMALL, "--output", tmp_path / "run") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_images_gives_settings_and_a_pipeline(name, tmp_path):
    recipe = load_recipe(name)
    if recipe.video:
        with pytest.raises(ValueError, match="clips"):
            recipe.pipeline()
        return
    one = {"id": 1, "category_id": 0}
    example = Example(np.zeros((120, 100, 3), np.uint8), np.ones((120, 100), np.int32), [one])
    image = recipe.pipeline()(example, np.random.default_rng(0)).image
    augmentation = recipe.augmentation
    if recipe.mapper.endswith("lsj"):
        assert image.shape == (1024, 1024, 3)
    elif augmentation["pad_size"] is not None:
        assert image.shape == (augmentation["pad_size"],) * 2 + (3,)
    else:
        assert all(side <= most for side, most in zip(image.shape, augmentation["crop_size"], strict=False))


def test_a_recipe_sets_what_settings_leave_open(tmp_path):
    given = {"data": "label-maps", "recipe": "ade20k-semantic-swin-t", "accumulate": 4, "queries": 50}
    settings, recipe = complete(TrainingSettings(output=tmp_path, **given))
    assert (settings.steps, settings.batch_size, settings.queries) == (160000, 4, 50)
    assert settings.classes == "ade20k-semantic" and settings.task == "semantic" and settings.crop is None
    assert (settings.learning_rate, settings.weight_decay, settings.clip) == (1e-4, 0.05, 0.01)
    assert recipe.backbone["embed_dim"] == 96


@needs_data
@pytest.mark.parametrize("kind", ["coco-panoptic", "coco-instances", "label-maps", "instance-maps"])
def test_every_kind_of_files_trains_on_real_images(kind, tmp_path, capsys):
    nuclei, camvid = DATA / "nuclei_dsb2018", DATA / "camvid"
    paths, metric = [], {"coco-panoptic": "pq", "label-maps": "miou"}.get(kind, "ap")
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"classes": [[1, "nucleus", True]]}))
    for split in ("train", "val"):
        if kind == "coco-panoptic":
            paths += panoptic_paths(f"{split}-")
        elif kind == "coco-instances":
            annotations = nuclei / "annotations" / f"instances_{split}.json"
            paths += [f"--{split}-images", nuclei / "images", f"--{split}-annotations", annotations]
        elif kind == "instance-maps":
            paths += [f"--{split}-images", nuclei / "images", f"--{split}-maps", nuclei / "instance_labels"]
        else:
            paths += [f"--{split}-images", camvid / "images" / split, f"--{split}-maps", camvid / "labels" / split]
        paths += [f"--{split}-limit", 2]
    if kind == "label-maps":
        paths += ["--classes", camvid / "classes.json"]
    if kind == "instance-maps":
        paths += ["--classes", classes]
    run = ["--backbone", "tiny", *SMALL, "--steps", 1, "--queries", 400, "--output", tmp_path]
    assert command("train", "--data", kind, *paths, *run) == 0
    assert metric in json.loads((tmp_path / "results.json").read_text())["metrics"]
    assert "2 images to train on" in capsys.readouterr().out


@needs_data
@pytest.mark.parametrize(
    "folder, kind, images",
    [("camvid", "label-maps", 367), ("nuclei_dsb2018", "coco-instances", 81), ("coco_panoptic", "coco-panoptic", 66)],
)
def test_a_folder_is_enough(folder, kind, images, tmp_path, capsys):
    """Kind, splits and classes are recognised and printed; what a flag says counts."""
    limits = ["--train-limit", 2, "--val-limit", 1, "--queries", 400, "--backbone", "tiny", *SMALL]
    assert command("train", DATA / folder, *limits, "--steps", 1, "--output", tmp_path) == 0
    said = capsys.readouterr().out
    assert f"recognised data: {kind}\n" in said and f"recognised train images: {DATA / folder}" in said
    assert "2 images to train on" in said and "held out" not in said
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["data"] == kind and len(list(settings["train_images"])) > 0


@needs_data
def test_without_a_validation_split_whole_sequences_are_held_out(tmp_path, capsys):
    camvid = DATA / "camvid"
    data = [
        "--data",
        "label-maps",
        "--classes",
        camvid / "classes.json",
        "--train-images",
        camvid / "images" / "train",
    ]
    data += ["--train-maps", camvid / "labels" / "train", "--train-limit", 4, "--val-limit", 1]
    run = [*data, "--backbone", "tiny", *SMALL[:2], "--batch-size", 2, "--epochs", 0.5, "--cpu"]
    assert command("train", *run, "--output", tmp_path) == 0
    said = capsys.readouterr().out
    assert "held out are 62 of 367 images: the sequences 0001TP of 3" in said
    assert "1 steps of 2 images" in said and json.loads((tmp_path / "results.json").read_text())["steps"] == 1


def test_epochs_are_whole_passes_over_the_data_and_not_given_beside_steps(tmp_path, capsys):
    run = [*SCENES, "--backbone", "tiny", "--crop", 64, "--batch-size", 2, "--accumulate", 2, "--cpu"]
    assert command("train", *run, "--epochs", 2, "--output", tmp_path / "run") == 0
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == 2 and state["global_step"] == 4  # six images: a step of four and one of two
    said = refused(capsys, *run, "--epochs", 2, "--steps", 4, "--output", tmp_path / "other")
    assert "--steps and --epochs: choose one" in said


def test_all_missing_packages_are_named_at_once_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(setting_checks, "find_spec", lambda name: None)
    data = ["--data", "coco-instances", "--train-images", "none", "--train-annotations", "none.json"]
    run = [*data, "--backbone", "tiny", *SMALL, "--report-to", "tensorboard", "--output", tmp_path / "run"]
    said = refused(capsys, *run)
    assert "pip install accelerate pycocotools tensorboard faster-coco-eval" in said
    assert "accelerate (training), pycocotools (polygons)" in said and "none.json" not in said


@needs_data
def test_the_class_table_of_a_checkpoint_has_the_original_ids_and_pixel_counts(tmp_path):
    run = ["--backbone", "tiny", *SMALL, "--steps", 1, "--queries", 60, "--output", tmp_path]
    limits = ["--train-limit", 3, "--val-limit", 1]
    assert (
        command("train", "--data", "coco-panoptic", *panoptic_paths("train-"), *panoptic_paths("val-"), *run, *limits)
        == 0
    )
    table = json.loads((tmp_path / "config.json").read_text())["class_table"]
    content = json.loads((PANOPTIC / "annotations" / "panoptic_val.json").read_text())
    ids = sorted(category["id"] for category in content["categories"])
    assert table["ids"] == ids
    areas = dict.fromkeys(ids, 0)
    reader = CocoPanoptic(
        PANOPTIC / "val", PANOPTIC / "annotations" / "panoptic_val.json", PANOPTIC / "panoptic_val", None
    )
    wanted = {reader[index].image_id for index in range(3)}
    for annotation in content["annotations"]:
        if annotation["image_id"] in wanted:
            for segment in annotation["segments_info"]:
                areas[segment["category_id"]] += 0 if segment["iscrowd"] else segment["area"]
    assert table["pixels"] == [areas[original] for original in ids]


def test_the_command_runs_unchanged_under_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = [*SCENES, "--backbone", "tiny", *SMALL, "--steps", 2, "--output", tmp_path]
    arguments += ["--crop", 128, "--memory-budget", 0.04]  # of each process, of 0.037 to 0.043 GB
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(mask2former_hf.__file__))
    done = subprocess.run(
        [*launcher, "-m", "mask2former_hf", "train", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Grad strides" not in done.stderr
    assert "blocks computed again in the backward pass are" in done.stdout
    assert "on cpu:0 x 2" in done.stdout and done.stdout.count("images to train on") == 1
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    "options", [["--refine", "otsu"], ["--tta"], ["--refine", "otsu", "--tta"], ["--tile", "96", "--overlap", "0.3"]]
)
def test_evaluate_measures_refined_results(trained, tmp_path, options):
    """The figures are those of a Segmenter's results, counted one by one."""
    pytest.importorskip("skimage", reason="scikit-image is an extra")
    path = tmp_path / "summary.json"
    given = ["--data", "scenes", "--limit", 2, "--threshold", 0.1, "--metrics", "pq", "ap", "--json", path]
    assert command("evaluate", "--model", trained, *given, *options, "--device", "cpu") == 0
    model = Mask2FormerForUniversalSegmentation.from_pretrained(trained).eval()
    processor = Mask2FormerImageProcessor.from_pretrained(trained)
    how = {"refine": "otsu" if "otsu" in options else None, "tta": "--tta" in options}
    how |= {"tile": 96, "overlap": 0.3} if "--tile" in options else {}
    evaluator = SegmentationEvaluator(model.config, processor, ["pq", "ap"], threshold=0.1)
    scenes = Scenes("val")
    for index in range(2):
        results = {}
        for task, threshold in {"panoptic": 0.1, "instance": 0.0}.items():
            segmenter = Segmenter.of(model, processor, task=task, **how)
            results[task] = segmenter(scenes[index].image, threshold=threshold)
        evaluator.count(results, scenes[index], index)
    expected, found = evaluator.compute(), json.loads(path.read_text())
    assert found["pq"]["all"]["pq"] == pytest.approx(expected["pq"]["all"]["pq"], abs=1e-6)
    assert found["ap"]["AP"] == pytest.approx(expected["ap"]["AP"], abs=1e-6)


def test_evaluate_refuses_refinement_that_has_no_meaning(trained, capsys):
    pytest.importorskip("skimage", reason="scikit-image is an extra")
    given = ["--data", "scenes", "--limit", 1, "--metrics", "miou", "--refine", "otsu", "--device", "cpu"]
    assert command("evaluate", "--model", trained, *given) == 2
    assert "semantic results have no threshold" in capsys.readouterr().err


def test_a_data_set_of_the_hub_trains(tmp_path):
    """A folder of parquet files, which `load_dataset` reads like a repository."""
    datasets = pytest.importorskip("datasets", reason="datasets is an extra")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        pictures = [Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)) for _ in range(3)]
        maps = [Image.fromarray(rng.integers(1, 3, (50, 70), dtype=np.uint8)) for _ in range(3)]
        features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": pictures, "annotation": maps}, features=features)
        table.to_parquet(tmp_path / "data" / f"{split}.parquet")
    path = tmp_path / "run.yaml"
    content = {
        "data": "hub",
        "dataset": str(tmp_path / "data"),
        "label_column": "annotation",
        "val_split": "validation",
    }
    path.write_text(yaml.safe_dump(content | {"classes": {0: None, 1: "grass", 2: "sand"}}))
    assert command("train", path, "--backbone", "tiny", *SMALL, "--steps", 1, "--output", tmp_path / "run") == 0
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "grass", 1: "sand"} and model.config.task == "semantic"


def test_a_file_of_settings_names_the_device_of_evaluate(trained, tmp_path, capsys):
    file = tmp_path / "evaluate.yaml"
    file.write_text(f"model: {trained}\ndata: scenes\nlimit: 1\ndevice: abacus\n")
    assert command("evaluate", file) == 2
    assert "--device abacus" in capsys.readouterr().err
