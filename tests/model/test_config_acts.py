"""Every field of the config acts, whenever it is set, or is refused: none is shadowed by a copy or a buffer."""

import copy
import dataclasses
import json
import logging

import pytest
import torch
import transformers
from helpers import BACKBONES, random_targets, tiny_config, tiny_fields, tiny_model
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerModel
from mask2former_hf.model.configuration_mask2former import BUILT_IN_FIELDS
from mask2former_hf.model.criterion import loss_normalizers
from mask2former_hf.training.distillation import Distillation
from mask2former_hf.training.label_surgery import resize_queries, set_labels

LOSS_FIELDS = {  # another value than the tiny model's, which changes the loss
    "no_object_weight": 1.0,
    "class_weight": 3.0,
    "mask_weight": 20.0,
    "dice_weight": 1.0,
    "train_num_points": 80,
    "oversample_ratio": 2.0,
    "importance_sample_ratio": 0.25,
    "use_auxiliary_loss": False,
    "mask_loss": "focal",
    "focal_alpha": 0.9,
    "focal_gamma": 0.5,
    "matching_on": "masks",
    "loss_on": "masks",
}
BUILT_IN = {
    "feature_size": 64,
    "mask_feature_size": 32,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 64,
    "activation_function": "gelu",
    "encoder_layers": 3,
    "decoder_layers": 5,
    "num_attention_heads": 2,
    "dropout": 0.5,
    "dim_feedforward": 64,
    "pre_norm": True,
    "enforce_input_projection": True,
    "common_stride": 8,
    "num_queries": 12,
    "num_labels": 7,
    "feature_strides": [8, 16, 32, 64],
    "freeze_batch_norm": True,
    "vit_neck": "pyramid",
    "pixel_decoder_type": "fpn",
    "decoder_type": "standard",
    "head_type": "per_pixel",
    "transformer_in_feature": "res4",
    "memory_encoder_layers": 1,
    "masked_attention": False,
    "attended_stride": 16,
    "self_attention_first": True,
    "learned_query_features": False,
    "backbone_config.depths": [2, 1, 1, 1],
    "backbone_config.out_features": ["stage1", "stage2"],
}
OTHERS = {  # read by others than a forward: data pipelines, initialisation, inference
    "ignore_value": 0,
    "init_std": 1.0,
    "init_xavier_std": 3.0,
    "task": "instance",
    "stuff_label_ids": [1],
    "sliding_window": {"side": 64, "stride": 40},
    "weights_license": "dinov3-license",
}
RETURNS = {"output_auxiliary_logits"}  # tested with the outputs
OF_STEPS = {"encoder_exits"}  # in tests/model/test_encoder_exits.py


def loss_of(model, **options):
    masks, labels = random_targets([3, 2], (64, 64))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return model(pixels, mask_labels=masks, class_labels=labels, generator=generator, **options).loss.item()


def base_fields(field):
    return {"mask_loss": "focal"} if field.startswith("focal") else {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("resnet").save_pretrained(folder)
    return folder


def test_every_field_is_tested_here():
    general = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(Mask2FormerConfig)} - general
    built_in = {name.split(".")[0] for name in BUILT_IN}
    assert own | {"num_labels"} == set(LOSS_FIELDS) | built_in | set(OTHERS) | RETURNS | OF_STEPS
    assert set(BUILT_IN_FIELDS) | {"num_labels", "backbone_config"} == built_in


@pytest.mark.parametrize("field, value", LOSS_FIELDS.items(), ids=LOSS_FIELDS)
def test_a_field_of_the_loss_acts_whenever_it_is_set(field, value, saved):
    base = base_fields(field)
    made = tiny_model("resnet", **base, **{field: value})
    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(saved, **base, **{field: value})
    changed = tiny_model("resnet", **base)
    before = loss_of(changed)
    setattr(changed.config, field, value)
    after = loss_of(changed)
    assert loss_of(made) == loss_of(loaded) == after != before
    setattr(changed.config, field, getattr(tiny_config("resnet", **base), field))
    assert loss_of(changed) == before


@pytest.mark.parametrize("field, value", OTHERS.items(), ids=OTHERS)
def test_a_field_for_others_does_not_change_the_forward(field, value):
    model = tiny_model("resnet")
    before = loss_of(model)
    setattr(model.config, field, value)
    assert loss_of(model) == before


@pytest.mark.parametrize("path, value", BUILT_IN.items(), ids=BUILT_IN)
def test_a_field_that_became_modules_is_refused_once_the_model_is_made(path, value, tmp_path):
    model, pixels = tiny_model("resnet"), torch.randn(1, 3, 64, 64)
    owner, _, field = path.rpartition(".")
    owner = model.config.backbone_config if owner else model.config
    old = getattr(owner, field)
    setattr(owner, field, value)
    message = f"config.{path.replace('.out', '._out')} was changed from .* after the model was made"
    with pytest.raises(ValueError, match=message):
        model(pixels)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    setattr(owner, field, old)
    with torch.no_grad():
        model(pixels)


@pytest.mark.parametrize("field", ["activation_function", "pre_norm", "dropout", "freeze_batch_norm"])
def test_a_field_that_became_modules_acts_on_loading(field, saved):
    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(saved, **{field: BUILT_IN[field]}).train()
    made = Mask2FormerForUniversalSegmentation(tiny_config("resnet", **{field: BUILT_IN[field]})).train()
    made.load_state_dict(tiny_model("resnet").state_dict())
    losses = []
    for model in (made, loaded, tiny_model("resnet").train()):
        torch.manual_seed(0)
        losses.append(loss_of(model))
    assert losses[0] == losses[1] != losses[2]


def test_surgery_changes_config_and_model_together(tmp_path):
    model = copy.deepcopy(tiny_model("resnet"))
    resize_queries(model, 12)
    set_labels(model, ["LABEL_0", "new", "LABEL_3"])
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).class_queries_logits.shape == (1, 12, 4)
    model.save_pretrained(tmp_path)
    again = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert again.config.num_queries == 12 and again.config.num_labels == 3


def test_a_model_without_heads_does_not_mind_the_labels():
    model = Mask2FormerModel(tiny_config("resnet")).eval()
    model.config.num_labels = 7
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("field, value", {"mask_weight": -1, "mask_loss": "dice", "train_num_points": 0}.items())
def test_a_bad_value_is_refused_where_it_is_set(field, value, saved):
    config = tiny_config("resnet")
    old = getattr(config, field)
    with pytest.raises(ValueError, match=f"{field}={value!r}: must be"):
        setattr(config, field, value)
    assert getattr(config, field) == old
    with pytest.raises(ValueError, match=f"{field}={value!r}: must be"):
        Mask2FormerForUniversalSegmentation.from_pretrained(saved, **{field: value})
    with pytest.raises(Exception, match="num_attention_heads=3: must be a divisor of feature_size=32"):
        Mask2FormerForUniversalSegmentation.from_pretrained(saved, num_attention_heads=3, hidden_dim=36)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_loss_agrees_with_the_normaliser_of_gradient_accumulation(weight, saved):
    """Also of a checkpoint that weighs its classes differently."""
    model = Mask2FormerForUniversalSegmentation.from_pretrained(saved, no_object_weight=weight)
    with torch.no_grad():
        model.criterion.empty_weight[:5] = torch.tensor([1.0, 0.2, 3.0, 0.5, 2.0])
    labels = random_targets([3, 2], (64, 64))[1]
    normalizers = loss_normalizers(labels, model.config.num_queries, model.criterion.class_weights())
    assert loss_of(model, normalizers=normalizers) == pytest.approx(loss_of(model), rel=1e-6)


def test_the_saved_buffer_is_what_the_config_says(tmp_path):
    model = tiny_model("resnet")
    model.config.no_object_weight = 0.4
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["criterion.empty_weight"].tolist() == pytest.approx(
        [1] * 5 + [0.4]
    )
    stock = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert stock.criterion.empty_weight[-1].item() == pytest.approx(0.4)
    assert model.state_dict()["criterion.empty_weight"][-1].item() == pytest.approx(0.4)


def warnings_of(caplog, load):
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.get_logger("").warning_once.__func__.cache_clear()
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING):
            return load(), [record.message for record in caplog.records if "empty_weight" in record.message]
    finally:
        transformers.utils.logging.disable_propagation()


def test_a_checkpoint_that_contradicts_itself_follows_its_config_with_a_warning(tmp_path, caplog):
    source = tiny_model("resnet")
    source.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"no_object_weight": 1.0}))
    load = lambda **options: Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, **options)  # noqa: E731
    for options in ({}, {"dtype": torch.bfloat16}):
        model, warned = warnings_of(caplog, lambda options=options: load(**options))
        assert len(warned) == 1 and "weighs 0.1" in warned[0] and "of the config 1:" in warned[0]
        assert model.criterion.empty_weight.tolist() == [1.0] * 6
    assert loss_of(load()) == loss_of(tiny_model("resnet", no_object_weight=1.0))
    other = tiny_model("resnet", no_object_weight=0.7)
    _, warned = warnings_of(caplog, lambda: other.load_state_dict(source.state_dict()))
    assert len(warned) == 1 and "of the config 0.7:" in warned[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_override_and_a_plain_checkpoint_give_no_warning(saved, caplog, dtype):
    for options in ({}, {"no_object_weight": 0.7}):
        load = lambda: Mask2FormerForUniversalSegmentation.from_pretrained(saved, dtype=dtype, **options)  # noqa: B023, E731
        model, warned = warnings_of(caplog, load)
        assert warned == []
        assert model.criterion.empty_weight[-1].item() == pytest.approx(model.config.no_object_weight, rel=0.01)


def test_weights_that_a_checkpoint_gives_its_classes_stay(tmp_path):
    model = tiny_model("resnet")
    model.criterion.empty_weight[:5] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    model.save_pretrained(tmp_path)
    again = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, no_object_weight=0.5)
    assert again.criterion.empty_weight.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 0.5]
    assert loss_of(model) != loss_of(tiny_model("resnet"))


def test_distillation_follows_the_student_s_config():
    teacher, student = tiny_model("resnet"), tiny_model("convnext").train()
    distillation, pixels = Distillation(teacher, student, confidence=0.0), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = student(pixels, output_auxiliary_logits=True)

    def terms():
        return distillation(output, {"pixel_values": pixels}, generator=torch.Generator().manual_seed(0))

    before = terms()
    student.config.mask_weight *= 2
    after = terms()
    assert after["distillation_dice"].item() == pytest.approx(before["distillation_dice"].item(), rel=0.5)
    assert after["distillation_mask"].item() > 1.2 * before["distillation_mask"].item()


LABELS = {"0": "sky", "1": "road", "2": "tree"}


@pytest.mark.parametrize("entry", ["constructor", "override", "attribute", "json", "config file"])
def test_labels_have_integer_keys_wherever_they_come_from(entry, saved, tmp_path):
    if entry == "constructor":
        config = Mask2FormerConfig(
            backbone_config=BACKBONES["resnet"](), **tiny_fields(num_labels=3) | {"id2label": LABELS}
        )
    elif entry == "override":
        model = Mask2FormerForUniversalSegmentation.from_pretrained(
            saved, id2label=LABELS, ignore_mismatched_sizes=True
        )
        config = model.config
        assert model.class_predictor.out_features == 4
    elif entry == "attribute":
        config = tiny_config("resnet")
        config.id2label = LABELS
    elif entry == "json":
        config = tiny_config("resnet")
        config.id2label = LABELS
        config.save_pretrained(tmp_path)
        config = Mask2FormerConfig.from_pretrained(tmp_path)
    else:
        config = Mask2FormerConfig.from_pretrained(saved, id2label=LABELS)
    assert config.id2label == {0: "sky", 1: "road", 2: "tree"} and config.num_labels == 3


def test_labels_whose_keys_are_no_ids_are_refused():
    with pytest.raises(ValueError, match=r"id2label has the keys \['sky'\].*label ids"):
        tiny_config("resnet").id2label = {"sky": 0}
