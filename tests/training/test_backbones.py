"""A new model's backbone has the weights that it is said to have: published ones, or random ones on request."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
)

from mask2former_hf import new_model
from mask2former_hf.data.scenes import Scenes
from mask2former_hf.training import backbones
from mask2former_hf.training.recipes import load_recipe, recipe_names
from mask2former_hf.training.settings import TrainingSettings, complete

SMALL = {  # name -> what replaces the architecture, so that the test is quick, and a classifier that has it
    "swin-t": (
        lambda: SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], out_features=backbones.STAGES),
        SwinForImageClassification,
        "swin.",
    ),
    "r50": (
        lambda: ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=backbones.STAGES
        ),
        ResNetForImageClassification,
        "resnet.",
    ),
}


@pytest.fixture(params=SMALL)
def published(request, tmp_path, monkeypatch):
    """A classifier saved where the published one would be: its name, its tensors."""
    make, classifier, prefix = SMALL[request.param]
    entry = backbones.Backbone(make, str(tmp_path / "weights"))
    monkeypatch.setitem(backbones.BACKBONES, request.param, entry)
    model = classifier(make())
    model.save_pretrained(tmp_path / "weights")
    return request.param, {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}


def shared(name, weights, **options):
    """How many of the backbone's tensors a classifier has, and how many of these are equal to its."""
    encoder = new_model(name, Scenes.classes, "panoptic", hidden_dim=32, num_attention_heads=4, **options)
    tensors = encoder.model.pixel_level_module.encoder.state_dict()
    tensors = {key.removeprefix("swin."): tensor for key, tensor in tensors.items()}
    both = [key for key in tensors if key in weights and tensors[key].is_floating_point() and tensors[key].ndim > 1]
    return len(both), sum(torch.equal(tensors[key], weights[key]) for key in both)


def test_a_short_name_loads_the_published_weights_and_random_ones_only_if_asked(published):
    name, weights = published
    present, equal = shared(name, weights)
    assert present == equal > 5
    assert shared(name, weights, random_weights=True)[1] == 0


def test_a_folder_of_a_classifier_is_a_backbone(published, tmp_path):
    present, equal = shared(str(tmp_path / "weights"), published[1])
    assert present == equal > 5


def test_weights_of_another_architecture_are_refused(published, tmp_path):
    name = published[0]
    other = "r50" if name == "swin-t" else "swin-t"
    SMALL[other][1](SMALL[other][0]()).save_pretrained(tmp_path / "weights")
    with pytest.raises(ValueError, match=f"backbone={name}: .* lacks .* of its tensors|cannot be loaded"):
        new_model(name, Scenes.classes, "panoptic")


@pytest.mark.parametrize("start", ["swin-t", load_recipe("coco-panoptic-r50"), "some/backbone"], ids=str)
def test_without_the_hub_the_error_names_random_weights_and_comes_at_once(start, monkeypatch):
    monkeypatch.setattr(backbones, "_hub_answers", lambda: False)
    if start == "some/backbone":
        monkeypatch.setattr(backbones.AutoConfig, "from_pretrained", lambda *a, **k: ResNetConfig())
    with pytest.raises(ValueError, match="the Hub cannot be reached, .* or random_weights=True"):
        new_model(start, Scenes.classes, "panoptic")


def test_every_backbone_of_a_recipe_has_published_weights():
    weights = {name: entry.weights for name, entry in backbones.BACKBONES.items()}
    assert all(weights[load_recipe(name).backbone_name] for name in recipe_names())
    assert [name for name, source in weights.items() if source is None] == ["tiny"]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("coco-p", "ade20k-s"))])
def test_a_short_name_is_the_backbone_of_its_recipe(name):
    recipe = load_recipe(name)
    config, described = backbones.BACKBONES[recipe.backbone_name].config(), recipe.backbone_fields()
    described.pop("image_size", None)  # of the pretraining; no tensor depends on it
    assert {field: getattr(config, field) for field in described} == described


@pytest.mark.parametrize(
    "start, expected",
    [
        ({"backbone": "tiny"}, (1e-3, 1.0, 1.0)),
        ({"backbone": "swin-t"}, (1e-4, 0.01, 0.1)),
        ({"backbone": "swin-t", "random_weights": True}, (1e-3, 1.0, 1.0)),
        ({"model": "a/checkpoint"}, (1e-4, 0.01, 0.1)),
        ({"recipe": "coco-panoptic-r50"}, (1e-4, 0.01, 0.1)),
        ({"recipe": "coco-panoptic-r50", "random_weights": True, "clip": 0.5}, (1e-3, 0.5, 1.0)),
    ],
)
def test_learning_rate_clip_and_multiplier_follow_from_what_is_trained(start, expected):
    settings, _ = complete(TrainingSettings(output="run", steps=1, **start))
    assert (settings.learning_rate, settings.clip, settings.backbone_multiplier) == expected


VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
SMALL_VITS = {
    "dinov2": (Dinov2Model, Dinov2Config(**VIT, image_size=56)),
    "dinov3_vit": (DINOv3ViTModel, DINOv3ViTConfig(**VIT, image_size=64, num_register_tokens=4)),
    "beit": (BeitModel, BeitConfig(**VIT, image_size=64)),
}


@pytest.fixture(params=SMALL_VITS)
def vit_folder(request, tmp_path):
    """A pretrained ViT as the Hub has it, whose images were normalised in its own way."""
    kind, config = SMALL_VITS[request.param]
    kind(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "BitImageProcessor", "image_mean": [0.4] * 3, "image_std": [0.2] * 3})
    )
    return tmp_path / "vit"


@pytest.mark.parametrize("neck", [None, "adapter"])
def test_a_folder_of_a_plain_vit_keeps_its_names_and_weights_through_saving(vit_folder, neck, tmp_path):
    fields = {"vit_neck": neck, "hidden_dim": 32, "num_attention_heads": 4}
    model = new_model(str(vit_folder), Scenes.classes, "panoptic", **fields)
    assert len(model.config.backbone_config.out_features) == (4 if neck else 1)
    model.save_pretrained(tmp_path / "model")
    published = load_file(vit_folder / "model.safetensors")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    prefix = "model.pixel_level_module.encoder."
    own = {name.removeprefix(prefix).removeprefix("beit."): x for name, x in saved.items() if name.startswith(prefix)}
    assert len(set(own) & set(published)) >= len(published) - 4  # but a pooler and a last norm, which no map passes
    assert all(torch.equal(own[name], published[name]) for name in set(own) & set(published))
    resumed = new_model(
        str(vit_folder), Scenes.classes, "panoptic", True, vit_neck=neck, hidden_dim=32, num_attention_heads=4
    )
    licence = {"dinov3_vit": "dinov3-license"}.get(model.config.backbone_config.model_type)
    assert model.config.weights_license == licence and resumed.config.weights_license is None
    assert not resumed.load_state_dict(saved).missing_keys  # as Trainer does, with the names in the file
    assert all(torch.equal(x, resumed.state_dict()[name]) for name, x in model.state_dict().items())


def test_images_are_normalised_as_the_backbone_s_own_processor_says(vit_folder):
    assert backbones.normalisation_of(str(vit_folder)) == {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    assert backbones.normalisation_of("tiny") == {}


def test_a_model_without_a_backbone_class_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vit has no backbone class in transformers.*dinov2"):
        new_model(str(tmp_path), Scenes.classes, "panoptic", random_weights=True)
