"""Image files that turn out to be broken end a command with one line that names them, wherever they are met."""

import numpy as np
import pytest
from helpers import tiny_model
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.cli.main import main

CLASSES = ["grass", "sand"]


@pytest.fixture
def maps(tmp_path):
    """A folder of two images with maps of labels, twice: to train on and to measure on."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(2):
            for kind, most, shape in (("images", 255, (64, 64, 3)), ("maps", 2, (64, 64))):
                path = tmp_path / "data" / kind / split / f"{index}.{'jpg' if kind == 'images' else 'png'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, most, shape, dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    tiny_model("resnet", task="semantic", num_labels=2, stuff_label_ids=[0, 1], **labels).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return folder


def truncate(path):
    """Keep the header, which a quick check reads, and half of the pixels."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def train(maps, output, *options):
    small = ["--backbone", "tiny", "--crop", 64, "--steps", 2, "--batch-size", 2, "--eval-every", 1, "--cpu"]
    given = [maps, "--classes", ",".join(CLASSES), *small, "--output", output, *options]
    return main(["train", *map(str, given)])


def evaluate(maps, checkpoint, *options):
    paths = ["--images", maps / "images" / "val", "--maps", maps / "maps" / "val", "--classes", ",".join(CLASSES)]
    given = ["--model", checkpoint, "--data", "label-maps", *paths, "--batch-size", 1, "--device", "cpu", *options]
    return main(["evaluate", *map(str, given)])


def only_line(capfd):
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("mask2former-hf"))
    return line


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_image_met_while_training_is_one_line(maps, tmp_path, capfd, split, workers):
    path = truncate(maps / "images" / split / "1.jpg")
    assert train(maps, tmp_path / "run", "--num-workers", workers) == 2
    line = only_line(capfd)
    assert f"{path}: not a readable image (" in line and "replace the file" in line
    if split == "val":  # training images are drawn before the first step
        assert line.endswith("No checkpoint was complete yet: the same command starts anew.")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_met_while_measuring_is_one_line(maps, checkpoint, capfd, workers):
    path = truncate(maps / "images" / "val" / "1.jpg")
    assert evaluate(maps, checkpoint, "--num-workers", workers) == 2
    assert f"{path}: not a readable image (" in only_line(capfd)


def test_headers_are_checked_before_anything_is_measured_unless_told_not_to(maps, checkpoint, capfd):
    path = maps / "images" / "val" / "1.jpg"
    Image.open(path).resize((64, 32)).save(path)
    assert evaluate(maps, checkpoint) == 2
    said = capfd.readouterr().err
    assert "1 of 2 examples cannot be used:" in said and f"{path}: the image is 32 x 64" in said
    assert "evaluating" not in said
    assert evaluate(maps, checkpoint, "--no-check") == 2
    said = capfd.readouterr().err
    assert "evaluating" in said and f"mask2former-hf evaluate: {path}: the image is 32 x 64" in said
