"""Backbones of timm by name and from a folder: their maps, their weights, their normalisation."""

import json

import pytest
import torch
from helpers import tiny_fields

from mask2former_hf import Mask2FormerForUniversalSegmentation, Segmenter, new_model
from mask2former_hf.cli.main import main
from mask2former_hf.data.scenes import Scenes
from mask2former_hf.training.backbones import normalisation_of
from mask2former_hf.training.timm_backbones import timm_config

SMALL = {name: value for name, value in tiny_fields().items() if name not in ("num_labels", "num_queries")}


def test_without_timm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("mask2former_hf.training.timm_backbones.is_timm_available", lambda: False)
    with pytest.raises(ImportError, match="backbone=timm/resnet18: timm is missing; pip install timm"):
        new_model("timm/resnet18", Scenes.classes, "panoptic", random_weights=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier as timm saves it, of images that were normalised in its own way."""
    timm = pytest.importorskip("timm", reason="timm (extra [timm]) is not there")
    torch.manual_seed(3)
    model = timm.create_model("test_efficientnet", num_classes=7)
    model.pretrained_cfg |= {"mean": (0.4, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    path = tmp_path_factory.mktemp("timm")
    timm.models.save_for_hf(model, path, model_config={"num_classes": 7}, safe_serialization=True)
    return path, model.state_dict()


def test_a_name_gives_the_last_map_at_each_stride_or_a_vit_s_last():
    pytest.importorskip("timm", reason="timm (extra [timm]) is not there")
    assert timm_config("timm/test_efficientnet.r160_in1k", None).out_indices == [1, 2, 3, 4]
    assert timm_config("timm/test_convnext", None).out_indices == [0, 1, 2, 3]
    assert timm_config("timm/vit_tiny_patch16_224", None).out_indices == [11]
    assert timm_config("timm/vit_tiny_patch16_224", "adapter").out_indices == [2, 5, 8, 11]
    with pytest.raises(ValueError, match="levit_128s has no map at stride 4, but at"):
        timm_config("timm/levit_128s", None)
    with pytest.raises(ValueError, match="has no model resnet_18; timm.list_models"):
        timm_config("timm/resnet_18", None)


def test_a_folder_of_timm_gives_its_weights_and_normalisation(folder, tmp_path):
    path, weights = folder
    model = new_model(str(path), Scenes.classes, "panoptic", **SMALL)
    model.save_pretrained(tmp_path)
    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    own = loaded.model.pixel_level_module.encoder._backbone.state_dict()
    assert len(own) > 50 and all(torch.equal(x, weights[name]) for name, x in own.items())
    assert normalisation_of(str(path)) == {"image_mean": [0.4, 0.4, 0.3], "image_std": [0.2] * 3}
    other = new_model(str(path), Scenes.classes, "panoptic", random_weights=True, **SMALL)
    assert not torch.equal(other.model.pixel_level_module.encoder._backbone.conv_stem.weight, own["conv_stem.weight"])


def test_a_folder_that_lacks_tensors_is_refused(folder, tmp_path):
    from safetensors.torch import save_file

    path, weights = folder
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file({name: x for name, x in weights.items() if "blocks.3" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="its weights, .* cannot be loaded"):
        new_model(str(tmp_path), Scenes.classes, "panoptic", **SMALL)


def test_a_run_over_a_folder_of_timm_freezes_its_first_stages_and_goes_on(folder, tmp_path):
    path, weights = folder
    run = ["train", "--data", "scenes", "--train-limit", 4, "--val-limit", 2, "--crop", 64, "--batch-size", 2, "--cpu"]
    run += ["--backbone", path, "--freeze-backbone", 2, "--eval-every", 1, "--output", tmp_path / "run"]
    for more in (["--steps", 1], ["--steps", 2, "--resume"]):
        assert main([str(word) for word in [*run, *more]]) == 0
    trained = Segmenter(tmp_path / "run").model.model.pixel_level_module.encoder._backbone.state_dict()
    same = {name for name, x in trained.items() if "num_batches" not in name and torch.equal(x, weights[name])}
    assert {"conv_stem.weight", "blocks.1.0.conv_pwl.weight"} <= same
    assert "blocks.2.0.conv_pwl.weight" not in same
    fields = json.loads((tmp_path / "run" / "config.json").read_text())["backbone_config"]
    assert fields["backbone"] == "test_efficientnet" and fields["out_indices"] == [1, 2, 3, 4]
