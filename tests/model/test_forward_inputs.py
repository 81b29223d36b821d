"""What the model is given: every argument with every wrong value works or is refused by name."""

import numpy as np
import pytest
import torch
from helpers import random_targets, tiny_model
from wrong_values import assert_names, every_wrong_value

from mask2former_hf import Mask2FormerModel

ARGUMENTS = ["pixel_values", "pixel_mask", "mask_labels", "class_labels", "ignore_masks", "normalizers", "generator"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("resnet").eval()


def inputs(**changes):
    masks, labels = random_targets([2], (64, 64))
    return {"pixel_values": torch.zeros(1, 3, 64, 64), "mask_labels": masks, "class_labels": labels} | changes


@every_wrong_value
@pytest.mark.parametrize("in_list", [False, True], ids=["alone", "in a list"])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_argument_with_every_wrong_value_works_or_is_refused_by_name(model, argument, in_list, value):
    try:
        output = model(**inputs(**{argument: [value] if in_list else value}))
    except (ValueError, TypeError) as error:
        assert_names(error, argument)
        return
    assert output.loss.isfinite()


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"pixel_values": np.zeros((1, 3, 64, 64), np.float32)}, "pixel_values is a ndarray: .*torch.as_tensor"),
        ({"pixel_values": [torch.zeros(3, 64, 64)]}, 'pixel_values is a list: .*return_tensors="pt"'),
        ({"pixel_values": torch.zeros(1, 4, 64, 64)}, r"pixel_values has shape \(1, 4, 64, 64\)"),
        ({"pixel_values": torch.zeros(0, 3, 64, 64)}, "none of them 0"),
        ({"pixel_values": torch.zeros(1, 3, 0, 64)}, "none of them 0"),
        (
            {"pixel_mask": torch.ones(1, 32, 64)},
            r"pixel_mask has shape \(1, 32, 64\): .*, \(1, 64, 64\)",
        ),
        ({"pixel_mask": torch.ones(2, 64, 64)}, r"pixel_mask has shape \(2, 64, 64\)"),
        ({"mask_labels": [np.zeros((2, 64, 64))]}, r"mask_labels\[0\] is a ndarray: it must be a tensor"),
        ({"class_labels": [[0, 1]]}, r"class_labels\[0\] is a list: it must be a tensor"),
        ({"class_labels": [torch.tensor([0, -1])]}, r"class_labels\[0\] contains \[-1\]"),
        ({"class_labels": [torch.tensor([0.0, 1.5])]}, r"class_labels\[0\] is torch.float32"),
        ({"class_labels": [torch.tensor([0])]}, "for the N targets of the image"),
        ({"mask_labels": [], "class_labels": []}, "mask_labels has 0 entries for a batch of 1 images"),
        ({"mask_labels": [torch.full((2, 64, 64), float("nan"))]}, r"mask_labels\[0\] has values from nan"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_the_rule(model, changes, rule):
    with pytest.raises((ValueError, TypeError), match=rule):
        model(**inputs(**changes))


def test_a_mask_of_another_size_is_refused_without_labels_and_without_a_head_too(model):
    for network in (model, Mask2FormerModel(model.config)):
        with pytest.raises(ValueError, match=r"pixel_mask has shape \(1, 32, 64\)"):
            network(torch.zeros(1, 3, 64, 64), pixel_mask=torch.ones(1, 32, 64))
