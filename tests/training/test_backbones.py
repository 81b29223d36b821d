"""A new model's backbone has the weights that it is said to have: published ones, or random ones on request."""

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, SwinConfig, SwinForImageClassification

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
