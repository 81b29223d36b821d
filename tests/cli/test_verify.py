"""mask2former-hf verify: equal networks are found equal, others are not, and mistakes are explained."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_model
from PIL import Image
from transformers.utils import ModelOutput

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.cli import verify
from mask2former_hf.cli.main import main
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("resnet", task="panoptic", id2label=ID2LABEL, stuff_label_ids=list(STUFF_LABEL_IDS))
    model.class_predictor.weight.data *= 4
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 100, "longest_edge": 128}).save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_is_equal_to_itself_in_stock(checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for n, size in enumerate([(60, 90), (100, 70)]):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
            photos / f"{n}.png"
        )
    path = tmp_path / "deep" / "report.json"
    assert main(["verify", checkpoint, "--images", str(photos), "--repeats", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["equal"] is True and report["images"] == 2
    assert report["class_logits_difference"] < 1e-4 and report["mask_logits_difference"] < 1e-4
    assert report["speed_ratio"] == pytest.approx(report["seconds_stock"] / report["seconds_ours"])
    assert "equal within" in capsys.readouterr().out


def test_the_difference_is_that_of_the_logits(checkpoint):
    """Stock's network with one weight changed by hand, measured by hand."""
    model, processor = verify.load(checkpoint, "cpu")
    stock = verify.load_stock(checkpoint, "cpu")
    assert type(stock) is transformers.Mask2FormerForUniversalSegmentation
    stock.class_predictor.bias.data[2] += 3.0
    image = verify.read_images(None)[0]
    report = verify.compare(model, stock, processor, [image], repeats=1)
    with torch.no_grad():
        logits = stock(**processor(image, return_tensors="pt")).class_queries_logits
    assert report["class_logits_difference"] == pytest.approx(3.0 / logits.abs().max().item(), rel=1e-3)
    assert report["mask_logits_difference"] < 1e-4


def test_another_network_is_not_equal(checkpoint, monkeypatch, capsys):
    def spoiled(*arguments):
        model = load_stock(*arguments)
        model.class_predictor.bias.data += 1
        return model

    load_stock = verify.load_stock
    monkeypatch.setattr(verify, "load_stock", spoiled)
    assert main(["verify", checkpoint, "--repeats", "1"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_nan_is_not_equal(checkpoint, monkeypatch):
    def spoiled(*arguments):
        model = load_stock(*arguments)
        model.class_predictor.bias.data[0] = float("nan")
        return model

    load_stock = verify.load_stock
    monkeypatch.setattr(verify, "load_stock", spoiled)
    assert main(["verify", checkpoint, "--repeats", "1"]) == 1


def test_metrics_of_both_are_measured_on_a_data_set(checkpoint, tmp_path, capsys):
    path = tmp_path / "report.json"
    command = ["verify", checkpoint, "--repeats", "1", "--data", "scenes", "--data-limit", "4", "--json", str(path)]
    assert main(command) == 0
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["ours"].keys() == metrics["stock"].keys() >= {"pq", "pq_things", "pq_stuff"}
    assert metrics["ours"] == pytest.approx(metrics["stock"], abs=1e-3)
    assert "pq" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tolerance", "-1"], "--tolerance -1.0: must be 0 or more"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--images", "nowhere.png"], "--images nowhere.png: no such file"),
        (["--data", "coco-instances"], "needs --data-images, --data-annotations"),
    ],
)
def test_mistakes_are_explained(checkpoint, capsys, arguments, message):
    assert main(["verify", checkpoint, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_checkpoint_is_explained(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_outputs_of_any_runtime_say_what_is_padding():
    """An export gives a plain `ModelOutput`, stock's model a dataclass."""

    class Runtime(torch.nn.Module):
        config = None

        def forward(self, pixel_values):
            return ModelOutput(class_queries_logits=pixel_values[:, 0], masks_queries_logits=pixel_values)

    mask = torch.zeros(1, 32, 64, dtype=torch.long)
    mask[:, :20, :50] = 1
    outputs = verify.StockWithSizes(Runtime())(pixel_values=torch.zeros(1, 3, 32, 64), pixel_mask=mask)
    assert outputs.image_sizes.tolist() == [[20, 50]] and outputs.masks_queries_logits.shape == (1, 3, 32, 64)


def test_an_export_and_videos_are_refused_by_name(tmp_path, capsys):
    (tmp_path / "export.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert main(["evaluate", "--model", str(tmp_path), "--data", "scenes"]) == 2
    assert "is an export, which `predict` takes for images; give its checkpoint" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(tmp_path), "--data", "moving-scenes"]) == 2
    assert "not give what objects of a video are linked by" in capsys.readouterr().err
