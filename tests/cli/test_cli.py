"""The commands as a user runs them: what they write, and what they say when something is wrong."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import transformers
from helpers import BACKBONES, SHARED, sure_checkpoint, tiny_fields
from PIL import Image
from processes import Python, python
from safetensors.torch import load_file, save_file

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.cli.main import COMMANDS, main

PHOTOS = SHARED / "data" / "coco_panoptic_samples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = sure_checkpoint(tmp_path_factory, task="panoptic", stuff_label_ids=[3, 4], num_queries=20)
    return folder


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name, size in (("a.png", (60, 90)), ("b.jpg", (100, 70))):
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        paths.append(tmp_path / name)
    return paths


def predict(*arguments):
    return main(["predict", *map(str, arguments)])


def check_panoptic(folder, names):
    content = json.loads((folder / "panoptic.json").read_text())
    assert [image["file_name"] for image in content["images"]] == names
    categories = {category["id"] for category in content["categories"]}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        png = np.asarray(Image.open(folder / "panoptic" / annotation["file_name"])).astype(int)
        assert png.shape == (image["height"], image["width"], 3)
        ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in annotation["segments_info"]}
        for segment in annotation["segments_info"]:
            assert segment["area"] == (ids == segment["id"]).sum() and segment["category_id"] in categories
            left, top, width, height = segment["bbox"]
            box = ids[top : top + height, left : left + width] == segment["id"]
            assert box.sum() == segment["area"] and box[0].any() and box[:, -1].any()
    return content


def test_predict_panoptic_writes_coco_files(checkpoint, photos, tmp_path):
    output = tmp_path / "out"
    assert predict(*photos, "--model", checkpoint, "--output", output, "--threshold", 0.1) == 0
    content = check_panoptic(output, ["a.png", "b.jpg"])
    assert any(annotation["segments_info"] for annotation in content["annotations"])
    assert {category["id"] for category in content["categories"] if not category["isthing"]} == {3, 4}
    assert {path.name for path in (output / "overlays").iterdir()} == {"a.png", "b.png"}


def test_predict_instances_writes_results_that_pycocotools_reads(checkpoint, photos, tmp_path):
    mask_utils = pytest.importorskip("pycocotools.mask")
    arguments = ("--model", checkpoint, "--output", tmp_path / "out", "--task", "instance", "--threshold", 0)
    assert predict(*photos, *arguments) == 0
    results = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert results and {result["image_id"] for result in results} == {1, 2}
    for result in results:
        mask = mask_utils.decode(result["segmentation"])
        assert mask.shape == ((60, 90) if result["image_id"] == 1 else (100, 70))
        np.testing.assert_allclose(mask_utils.toBbox(result["segmentation"]), result["bbox"])
        assert result["category_id"] in (0, 1, 2) and 0 <= result["score"] <= 1


def test_predict_semantic_writes_label_maps(checkpoint, photos, tmp_path):
    assert predict(photos[0], "--model", checkpoint, "--output", tmp_path / "out", "--task", "semantic") == 0
    labels = np.asarray(Image.open(tmp_path / "out" / "semantic" / "a.png"))
    assert labels.shape == (60, 90) and labels.max() < 5


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="real photos (../shared) not found")
@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_predict_works_on_photos_with_a_checkpoint_of_stock(task, tmp_path):
    config = transformers.Mask2FormerConfig(backbone_config=BACKBONES["swin"](), **tiny_fields())
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "stock")
    Mask2FormerImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(tmp_path / "stock")
    paths = sorted(path for path in PHOTOS.rglob("*.jpg"))
    assert len(paths) >= 2
    assert predict(*paths, "--model", tmp_path / "stock", "--output", tmp_path / "out", "--task", task) == 0
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == len(paths)
    if task == "panoptic":
        check_panoptic(tmp_path / "out", [path.name for path in paths])


def test_an_unreadable_image_is_one_line_and_the_others_are_done(checkpoint, photos, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    output = tmp_path / "out"
    code = predict(photos[0], broken, tmp_path / "none.png", photos[1], "--model", checkpoint, "--output", output)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mask2former-hf predict:")]
    assert code == 2 and len(errors) == 2
    assert any("broken.jpg: not a readable image" in line for line in errors)
    assert any("none.png: no such file" in line for line in errors)
    check_panoptic(output, ["a.png", "b.jpg"])


def test_16_bits_are_read_and_fractions_are_a_problem_and_not_white(checkpoint, photos, tmp_path, capsys):
    Image.fromarray(np.full((30, 40), 20000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((30, 40), 0.5, np.float32)).save(tmp_path / "fraction.tif")
    images = photos[0], tmp_path / "deep.png", tmp_path / "fraction.tif"
    assert predict(*images, "--model", checkpoint, "--output", tmp_path / "out") == 2
    assert "fraction.tif: image is float32 from 0.5 to 0.5" in capsys.readouterr().err
    check_panoptic(tmp_path / "out", ["a.png", "deep.png"])


def test_nothing_is_written_when_no_image_is_there(checkpoint, tmp_path, capsys):
    assert predict(tmp_path / "none.png", "--model", checkpoint, "--output", tmp_path / "out") == 2
    assert "none.png: no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def without_decoder(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "transformer_module" not in k}, file, metadata={"format": "pt"})


def edited_config(**fields):
    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | fields))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_decoder, r"\d+ tensors of the model are not in the checkpoint \(.*transformer_module"),
        (lambda folder: (folder / "config.json").write_text("{"), r"cannot be read \(OSError: .*config.json"),
        (lambda folder: (folder / "config.json").unlink(), "the folder has no config.json"),
        (edited_config(hidden_dim="wide"), r"cannot be read \("),
        (edited_config(hidden_dim=48), r"cannot be read \(RuntimeError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), r"cannot be read \(SafetensorError"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "preprocessor_config.json: "),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate", "verify", "convert", "train"])
def test_a_damaged_checkpoint_is_one_line(command, damage, message, checkpoint, photos, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    lines = {
        "predict": [photos[0], "--model", folder, "--output", tmp_path / "out"],
        "evaluate": ["--model", folder, "--data", "scenes"],
        "verify": [folder],
        "convert": [folder, "--to", "original", "--output", tmp_path / "out.pth"],
        "train": ["--model", folder, "--data", "scenes", "--steps", 1, "--output", tmp_path / "out"],
    }
    if command in ("convert", "train") and "preprocessor" in message:
        pytest.skip("reads no preprocessor_config.json")
    assert main([command, *map(str, lines[command])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mask2former-hf")]
    assert len(lines) == 1 and str(folder) in lines[0] and re.search(message, lines[0]), lines
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "detection"], "--task detection: must be one of semantic, instance, panoptic"),
        (["--threshold", "3"], "--threshold 3.0: must be between 0 and 1"),
        (["--stuff", "77"], r"--stuff [77]: the checkpoint has labels 0 to 4"),
        (["--model", "no/such-model"], "--model no/such-model: no checkpoint found"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, checkpoint, photos, tmp_path, capsys):
    given = ["--model", checkpoint] if "--model" not in arguments else []
    assert predict(photos[0], "--output", tmp_path / "out", *given, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_images_of_one_name_from_two_folders_are_both_kept(checkpoint, photos, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.open(photos[0]).save(tmp_path / folder / "same.png")
    assert predict(tmp_path / "one", tmp_path / "two", "--model", checkpoint, "--output", tmp_path / "out") == 0
    names = [(tmp_path / folder / "same.png").as_posix() for folder in ("one", "two")]
    content = check_panoptic(tmp_path / "out", names)
    assert [annotation["file_name"] for annotation in content["annotations"]] == ["same.png", "same_2.png"]


def test_a_second_run_does_not_mix_with_the_first(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "out"
    given = ("--model", checkpoint, "--output", output, "--threshold", 0.1)
    assert predict(*photos, *given) == 0
    (output / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert predict(photos[0], *given, "--task", "instance") == 2
    assert "has results of another run" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert predict(photos[0], *given, "--task", "instance", "--overwrite") == 0
    left = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    of_the_run = {"run.json", "summary.json"}
    assert left == {"notes.txt", "overlays/a.png", "instances.json", "categories.json"} | of_the_run


def test_overwriting_removes_neither_inputs_nor_what_no_run_has_written(checkpoint, photos, tmp_path, capsys):
    output = tmp_path / "out"
    (output / "overlays").mkdir(parents=True)
    (output / "semantic").mkdir()
    shutil.copy(photos[0], output / "overlays" / "mine.png")
    given = ("--model", checkpoint, "--output", output, "--overwrite")
    assert predict(output / "overlays", *given) == 2
    assert "--overwrite would remove" in capsys.readouterr().err and (output / "overlays" / "mine.png").exists()
    shutil.rmtree(output / "overlays")
    assert predict(photos[0], *given) == 2
    assert "are not of an earlier run" in capsys.readouterr().err and (output / "semantic").is_dir()
    (output / "overlays").mkdir()
    assert predict(photos[0], "--model", tmp_path / "no such", *given[2:]) == 2
    assert (output / "semantic").is_dir(), "nothing is removed before the model is there"


def test_nothing_above_the_threshold_is_said_with_the_best_score(checkpoint, photos, tmp_path, capsys):
    assert predict(*photos, "--model", checkpoint, "--output", tmp_path / "out", "--threshold", 1) == 0
    said = capsys.readouterr().out
    assert "2 of 2 images, 0 segments" in said
    score = float(re.search(r"best score (0\.\d+); try --threshold", said)[1])
    shutil.rmtree(tmp_path / "out")
    assert predict(*photos, "--model", checkpoint, "--output", tmp_path / "out", "--threshold", score - 0.02) == 0
    assert "0 segments" not in capsys.readouterr().out


def test_demo_trains_saves_and_draws(tmp_path, capsys):
    arguments = ["--steps", "3", "--batch-size", "2", "--eval-images", "3", "--pictures", "2"]
    assert main(["demo", "--output", str(tmp_path / "demo"), "--device", "cpu", *arguments]) == 0
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "demo")
    assert model.config.task == "panoptic" and model.config.stuff_label_ids == [3, 4]
    assert 1.3e6 < sum(p.numel() for p in model.parameters()) < 1.8e6
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["steps"] == 3 and 0 <= results["panoptic_quality"]["all"]["pq"] <= 1
    assert sorted(path.name for path in (tmp_path / "demo" / "pictures").iterdir()) == ["000.png", "001.png"]
    assert predict(
        tmp_path / "demo" / "pictures" / "000.png", "--model", tmp_path / "demo", "--output", tmp_path / "out"
    ) == 0  # fmt: skip


def test_demo_refuses_senseless_numbers(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--steps", "0"]) == 2
    assert "--steps 0: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_demo_finds_out_before_training_that_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    shown = capsys.readouterr()
    assert "Not a directory" in shown.err and "Training" not in shown.out


def test_ctrl_c_keeps_what_the_demo_learned(tmp_path):
    arguments = ["--steps", "5000", "--batch-size", "2", "--eval-images", "2", "--pictures", "1", "--device", "cpu"]
    demo = Python("-m", "mask2former_hf", "demo", "--output", tmp_path / "demo", *arguments)
    assert demo.wait_until(lambda process: re.search(r"[1-9]\d*/5000", process.stderr))
    demo.kill(signal.SIGINT)
    done = demo.wait()
    assert done.returncode == 0, done.stderr
    assert "Interrupted after" in done.stdout
    assert 0 < json.loads((tmp_path / "demo" / "results.json").read_text())["steps"] < 5000
    Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "demo")


def test_env_names_versions_and_a_kernel_for_every_dtype(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"transformers {transformers.__version__}" in text
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert re.search(rf"cpu +{dtype} +(cpp|reference)", text)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "demo" in text and "predict" in text


EVERY_HELP = """
import contextlib
from mask2former_hf.cli.main import COMMANDS, main
for name in COMMANDS:
    with contextlib.suppress(SystemExit):
        main([name, "--help"])
"""


def test_the_help_of_every_command_is_all_that_it_prints():
    done = python("-c", EVERY_HELP)
    assert done.stdout.count("usage: mask2former-hf") == len(COMMANDS)
    assert done.stderr == ""
