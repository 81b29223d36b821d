"""Other labels, another number of queries: what stays gives the outputs that it gave."""

import pytest
import torch
from helpers import random_targets, tiny_model

from mask2former_hf import Mask2FormerForUniversalSegmentation, resize_queries, set_labels

NAMES = ["sky", "road", "car", "bus", "person"]


def named_model(**changes):
    fields = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = tiny_model("resnet", **fields, stuff_label_ids=[0, 1], **changes)
    model.class_predictor.weight.data *= 10
    return model


def logits(model):
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(pixels)
    return output.class_queries_logits[0], output.masks_queries_logits[0]


def test_kept_classes_keep_their_logits_wherever_they_go():
    model = named_model()
    classes, masks = logits(model)
    change = set_labels(model, ["person", "tree", "road"], stuff=["road", "tree"])
    found, same = logits(model)
    assert torch.equal(same, masks) and found.shape == (10, 4)
    torch.testing.assert_close(found[:, [0, 2, 3]], classes[:, [4, 1, 5]])
    assert change.kept == ["person", "road"] and change.added == ["tree"] and change.merged == []
    assert change.dropped == ["sky", "car", "bus"]
    assert model.config.id2label == {0: "person", 1: "tree", 2: "road"} and model.config.stuff_label_ids == [1, 2]
    assert model.config.label2id == {"person": 0, "tree": 1, "road": 2} and model.config.num_labels == 3


def test_a_merged_class_is_the_tangent_of_the_exact_logit():
    """log(e^a + e^b) where a = b; below it elsewhere."""
    model = named_model()
    classes, _ = logits(model)
    change = set_labels(model, ["vehicle", "rest"], {"car": "vehicle", "bus": "vehicle", "sky": "rest", "road": None,
                                                     "person": "rest"})  # fmt: skip
    found, _ = logits(model)
    exact = classes[:, [2, 3]].logsumexp(1)
    torch.testing.assert_close(found[:, 0], classes[:, [2, 3]].mean(1) + torch.tensor(2.0).log())
    assert (found[:, 0] <= exact + 1e-5).all()
    assert change.merged == ["vehicle", "rest"] and change.dropped == ["road"]
    model.class_predictor.weight.data.zero_()
    model.class_predictor.bias.data.zero_()
    set_labels(model, ["all"], {"vehicle": "all", "rest": "all"})
    assert logits(model)[0][0].tolist() == pytest.approx([torch.tensor(2.0).log().item(), 0.0])


def test_after_surgery_a_model_trains_saves_and_loads(tmp_path):
    model = named_model()
    set_labels(model, ["road", "moss", "car"])
    resize_queries(model, 14)
    masks, labels = random_targets([3, 2], (64, 64), num_labels=3)
    model.train()
    loss = model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels).loss
    loss.backward()
    assert model.class_predictor.weight.grad.shape == (4, 32)
    assert model.model.transformer_module.queries_features.weight.grad.shape == (14, 32)
    model.eval().save_pretrained(tmp_path)
    loaded = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    for ours, theirs in zip(logits(model), logits(loaded), strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.config.num_queries == 14 and loaded.config.num_labels == 3


def test_more_queries_keep_the_first_ones_and_fewer_are_the_first_ones():
    model = named_model()
    module = model.model.transformer_module
    before = [getattr(module, name).weight.clone() for name in ("queries_features", "queries_embedder")]
    resize_queries(model, 200, torch.Generator().manual_seed(0))
    for name, rows in zip(("queries_features", "queries_embedder"), before, strict=True):
        weight = getattr(module, name).weight
        assert torch.equal(weight[:10], rows) and weight.requires_grad and len(weight) == 200
        # 190 draws per channel: the mean has a standard error of 0.07 deviations.
        assert ((weight[10:].mean(0) - rows.mean(0)).abs() < 0.35 * rows.std(0)).all()
    classes, masks = logits(model)
    assert classes.shape == (200, 6) and masks.shape[0] == 200
    resize_queries(model, 3)
    assert torch.equal(module.queries_features.weight, before[0][:3]) and logits(model)[0].shape == (3, 6)


@pytest.mark.parametrize(
    "labels, mapping, message",
    [
        ([], {}, "labels is empty"),
        (["a", "a"], {}, "a"),
        (["road"], {"lorry": "road"}, "lorry"),
        (["road"], {"car": "vehicle"}, "vehicle"),
    ],
)
def test_names_that_are_double_or_unknown_are_refused(labels, mapping, message):
    model = named_model()
    with pytest.raises(ValueError, match=message):
        set_labels(model, labels, mapping)
    assert model.config.num_labels == 5
    with pytest.raises(ValueError, match="num_queries=0: must be at least 1"):
        resize_queries(model, 0)
