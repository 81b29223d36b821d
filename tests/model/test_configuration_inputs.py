"""A config.json as it may arrive: every field with every wrong value makes a model or is refused by name."""

import dataclasses
import json

import pytest
import torch
from helpers import BACKBONES, tiny_fields
from huggingface_hub.errors import StrictDataclassError
from wrong_values import assert_names, every_wrong_value

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

FIELDS = [
    *(name for name in Mask2FormerConfig.__annotations__ if name in Mask2FormerConfig.__dataclass_fields__),
    *("num_labels", "id2label", "label2id", "hidden_size", "num_hidden_layers", "return_dict", "output_hidden_states"),
]
NAMES = {"hidden_size": "hidden_dim", "num_hidden_layers": "decoder_layers", "num_labels": "id2label"}
LONGEST = 4000  # transformers' own check of types repeats the value three times


def make(fields):
    """The config, and with what it says a model without memory."""
    small = tiny_fields(encoder_layers=1, decoder_layers=2)
    config = Mask2FormerConfig(**{"backbone_config": BACKBONES["resnet"]()} | small | fields)
    with torch.device("meta"):
        return config, Mask2FormerForUniversalSegmentation(config)


@every_wrong_value
@pytest.mark.parametrize("field", FIELDS)
def test_every_field_with_every_wrong_value_makes_a_model_or_is_refused_by_name(field, value):
    if field == "backbone_config" and value is None:
        pytest.skip("the default, a large model")
    try:
        config, model = make({field: value})
    except (ValueError, StrictDataclassError) as error:
        assert_names(error, field, NAMES.get(field, field), most=LONGEST)
        return
    assert sum(parameter.numel() for parameter in model.parameters()) < 10**7
    assert model.criterion.settings.num_uncertain <= model.criterion.settings.num_candidates
    json.loads(config.to_json_string(), parse_constant=lambda name: pytest.fail(f"{name} is no json"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_dim": 0}, "hidden_dim=0: must be a whole number from 1 to 65536"),
        ({"mask_feature_size": -1}, "mask_feature_size=-1: must be a whole number from 1"),
        ({"feature_size": 0}, "feature_size=0: must be a multiple of 32"),
        ({"dropout": float("nan")}, "dropout=nan: must be between 0 and 1"),
        ({"oversample_ratio": float("inf")}, "oversample_ratio=inf: must be between 1 and 1000"),
        ({"importance_sample_ratio": float("nan")}, "importance_sample_ratio=nan: must be between 0 and 1"),
        ({"no_object_weight": float("inf")}, "no_object_weight=inf: must be 0 or more, and at most 1e9"),
        ({"num_labels": 10**8}, "num_labels=100000000: must be a whole number from 1 to 65536"),
        ({"id2label": {}}, "id2label={}: must be a map of 1 to 65536 labels to names"),
        ({"encoder_layers": 10**6}, "encoder_layers=1000000: must be a whole number from 0 to 1000"),
        ({"decoder_layers": 10**6}, "decoder_layers=1000000: must be a whole number from 1 to 1000"),
        ({"num_queries": True}, "num_queries"),
        ({"feature_strides": []}, r"feature_strides=\[\]: must be four whole numbers"),
        ({"stuff_label_ids": [True]}, "stuff_label_ids"),
        ({"sliding_window": {"side": 64}}, "sliding_window={'side': 64}: must be {'side': pixels, 'stride'"),
        ({"sliding_window": {"side": 64, "stride": 65}}, "stride': 65}: must be .* at most the side"),
        ({"weights_license": "../x"}, "weights_license='../x': must be a name of letters"),
        ({"label2id": "x"}, "label2id='x': must be a map of names to labels"),
    ],
)
def test_the_message_names_field_value_and_rule(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make(fields)


def test_a_field_that_is_changed_later_is_checked_as_in_the_constructor():
    config, _ = make({})
    with pytest.raises(ValueError, match="num_labels=100000000"):
        config.num_labels = 10**8
    with pytest.raises(ValueError, match="dropout=nan"):
        config.dropout = float("nan")
    config.num_labels = 7
    assert config.num_labels == 7 and dataclasses.is_dataclass(config)
