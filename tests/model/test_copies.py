"""A model goes to other processes, and into files, as an object: Spark, Ray and multiprocessing pickle it."""

import copy
import io
import pickle

import pytest
import torch
from helpers import tiny_fields, tiny_model
from tiny_backbones import backbone_config

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def vit():
    """Its maps are what transformers' hooks have recorded."""
    config = Mask2FormerConfig(backbone_config=backbone_config("dinov2"), vit_neck="pyramid", **tiny_fields())
    return Mask2FormerForUniversalSegmentation(config).eval()


def recorders(model):
    """What transformers has installed, by the module's name."""
    hooks = {name: [*module._forward_hooks.values()] for name, module in model.named_modules()}
    found = {name: [h for h in own if "output_capturing" in h.__module__] for name, own in hooks.items()}
    return {name: own for name, own in found.items() if own}


@pytest.mark.parametrize("make", [lambda: tiny_model("swin"), lambda: tiny_model("resnet"), vit])
@torch.no_grad()
def test_a_model_that_has_run_is_copied_and_both_go_on(make):
    model, pixels = make(), torch.randn(1, 3, 64, 64)
    expected = model(pixels).masks_queries_logits
    recording = recorders(model)
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model), through_a_file(model)]
    assert recorders(model) == recording and not any(map(recorders, copies))  # another thread may need them
    for same in (*copies, model):
        assert torch.equal(same(pixels).masks_queries_logits, expected)
        assert same.config is same.model.config and recorders(same).keys() == recording.keys()
    assert all(pickle.dumps(same) for same in (*copies, model))  # again, after their forwards
