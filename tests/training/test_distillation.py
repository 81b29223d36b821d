"""Distillation: its terms against plain formulas, what it does in training, and the cache of the teacher's answers."""

import copy

import numpy as np
import pytest
import torch
from helpers import padded_batch, random_targets, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.example import Example
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.training.distillation import Distillation
from mask2former_hf.training.teacher import Teacher, WithImageIds
from mask2former_hf.training.trainer import Mask2FormerTrainer, Mask2FormerTrainingArguments

TERMS = {"distillation_class", "distillation_mask", "distillation_dice"}


def sure_model(backbone="resnet", seed=0, **changes):
    """A random network whose queries name classes, so that there is something to teach."""
    model = tiny_model(backbone, **changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = model.class_predictor.weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def labelled_batch(size=(64, 64)):
    masks, labels = random_targets([3, 2], size)
    return {
        "pixel_values": padded_batch([size, size])[0],
        "pixel_mask": torch.ones(2, *size, dtype=torch.long),
        "mask_labels": masks,
        "class_labels": labels,
    }


def unlabelled_batch(sizes=((64, 64), (50, 60))):
    pixels, mask = padded_batch(list(sizes))
    return {"pixel_values": pixels, "pixel_mask": mask}


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    student = sure_model()
    distillation = Distillation(copy.deepcopy(student), student, feature_weight=1.0)
    batch = unlabelled_batch()
    terms = distillation(student(**batch), batch)
    assert set(terms) == TERMS | {"distillation_features"}
    for name, term in terms.items():
        assert abs(term.item()) < 1e-3, name  # masks are kept in half precision
    other = distillation(sure_model(seed=1)(**batch), batch)
    assert all(other[name] > 100 * terms[name].abs() for name in TERMS - {"distillation_mask"})


def test_all_layers_of_a_copy_are_taught_the_last():
    student = sure_model()
    batch = unlabelled_batch()
    distillation = Distillation(copy.deepcopy(student), student)
    last = distillation(student(**batch), batch)
    every = distillation(student(**batch, output_auxiliary_logits=True), batch)
    assert every["distillation_class"] > last["distillation_class"] + 0.1


def test_class_term_is_torchs_divergence_at_the_temperature():
    """One query each: the pair is given, and without a confident answer only classes count."""
    teacher, student = sure_model(num_queries=1), sure_model(num_queries=1, seed=1)
    batch = {"pixel_values": torch.randn(1, 3, 64, 64)}
    outputs = student(**batch)
    answer = teacher(**batch).class_queries_logits[0, 0]
    terms = Distillation(teacher, student, temperature=3.0, confidence=0.999999, weight=0.5)(outputs, batch)
    ours = outputs.class_queries_logits[0, 0]
    expected = F.kl_div((ours / 3).log_softmax(-1), (answer / 3).softmax(-1), reduction="sum") * 9
    assert terms["distillation_class"].item() == pytest.approx(0.5 * 2.0 * expected.item(), rel=1e-4)
    assert terms["distillation_mask"] == 0 and terms["distillation_dice"] == 0


def test_mask_terms_follow_their_formulas(monkeypatch):
    """With one query each and points given, cross-entropy minus entropy and dice with squares, in float64."""
    teacher, student = sure_model(num_queries=1), sure_model(num_queries=1, seed=1)
    with torch.no_grad():
        student.model.transformer_module.decoder.mask_predictor.mask_embedder[2][0].bias += 0.3
    batch = {"pixel_values": torch.randn(1, 3, 64, 64)}
    outputs = student(**batch)
    distillation = Distillation(teacher, student, confidence=0.0)
    cells = torch.cartesian_prod(torch.arange(16), torch.arange(16))  # centres: sampling returns the map's own values
    points = ((cells.flip(-1) + 0.5) / 16)[None]
    monkeypatch.setattr(distillation, "_draw_points", lambda logits, extent, generator: points)
    terms = distillation(outputs, batch)
    x = outputs.masks_queries_logits.flatten().double()
    t = teacher(**batch).masks_queries_logits.half().double().flatten().sigmoid()
    p = x.sigmoid()
    divergence = (t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log()).mean()
    dice = 1 - (2 * (p * t).sum() + 1) / ((p**2).sum() + (t**2).sum() + 1)
    assert terms["distillation_mask"].item() == pytest.approx(5 * divergence.item(), rel=1e-4)
    in_float32 = pytest.approx(5 * dice.item(), rel=1e-4, abs=2e-6)  # 5 * (1 - x)
    assert terms["distillation_dice"].item() == in_float32


def test_queries_are_matched_whatever_their_order():
    student = sure_model()
    teacher = copy.deepcopy(student)
    order = torch.randperm(10)
    with torch.no_grad():
        for embedding in (
            teacher.model.transformer_module.queries_embedder,
            teacher.model.transformer_module.queries_features,
        ):
            embedding.weight.copy_(embedding.weight[order])
    batch = unlabelled_batch()
    terms = Distillation(teacher, student)(student(**batch), batch)
    assert all(term.abs() < 1e-2 for term in terms.values())


@pytest.mark.parametrize("queries", [4, 25])
def test_a_teacher_of_another_kind_teaches(queries):
    """Another backbone, width, number of queries and of layers; mask features go through a learned layer."""
    torch.manual_seed(0)
    teacher = sure_model("swin", num_queries=queries, mask_feature_size=16, decoder_layers=3)
    student = sure_model("resnet", seed=1).train()
    distillation = Distillation(teacher, student, feature_weight=1.0)
    assert [tuple(parameter.shape) for parameter in distillation.parameters()] == [(16, 24), (16,)]
    batch = unlabelled_batch()
    optimizer = torch.optim.AdamW([*student.parameters(), *distillation.parameters()], lr=2e-3)
    history = []
    for _ in range(30):
        terms = distillation(student(**batch), batch)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: term.item() for name, term in terms.items()})
    for name in history[0]:
        assert history[-1][name] < history[0][name], name
    assert sum(history[-1].values()) < 0.7 * sum(history[0].values())


def test_labelled_training_samples_masks_without_making_them():
    student, teacher = sure_model().train(), sure_model(seed=1)
    batch = labelled_batch()
    outputs = student(**batch)
    assert outputs.masks_queries_logits is None
    generator = torch.Generator().manual_seed(0)
    lazy = Distillation(teacher, student)(outputs, batch, generator)
    sum(lazy.values()).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    dense = Distillation(teacher)(
        student(batch["pixel_values"], pixel_mask=batch["pixel_mask"]), batch, generator.manual_seed(0)
    )
    sum(dense.values()).backward()
    for name in TERMS:
        assert lazy[name].item() == pytest.approx(dense[name].item(), rel=1e-3), name
    compared = 0
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-3:
            difference = (parameter.grad - gradients[name]).norm() / parameter.grad.norm()
            assert difference < 0.02, name
            compared += 1
    assert compared > 50
    with pytest.raises(ValueError, match="no masks_queries_logits.*give Distillation the student"):
        Distillation(teacher)(outputs, batch)


def test_labels_and_teacher_add_up():
    student, teacher = sure_model().train(), sure_model(seed=1)
    batch = labelled_batch()
    outputs = student(**batch, output_hidden_states=True)
    terms = Distillation(teacher, student, weight=0.5)(outputs, batch)
    (outputs.loss + sum(terms.values())).backward()
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_weight_0_is_no_loss():
    student, batch = sure_model().train(), unlabelled_batch()
    terms = Distillation(sure_model(seed=1), student, weight=0.0)(student(**batch), batch)
    assert all(term == 0 for term in terms.values())


def test_teacher_is_frozen_and_in_half_precision_if_wanted():
    teacher, student, batch = sure_model(seed=1), sure_model(), unlabelled_batch()
    full = Distillation(copy.deepcopy(teacher), student)(student(**batch), batch, torch.Generator().manual_seed(0))
    distillation = Distillation(teacher.train(), student, dtype=torch.bfloat16)
    assert not teacher.training and teacher.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert list(distillation.parameters()) == [] and distillation.state_dict() == {}
    half = distillation(student(**batch), batch, torch.Generator().manual_seed(0))
    assert sum(half.values()).item() == pytest.approx(sum(full.values()).item(), rel=0.15)


def test_an_answer_does_not_depend_on_batch_mates():
    teacher = Teacher(sure_model())
    pixels, mask = padded_batch([(64, 64), (50, 60)])
    together = teacher.answers(pixels, mask, None)
    alone = teacher.answers(pixels[1:], mask[1:], None)[0]
    torch.testing.assert_close(together[1].class_logits, alone.class_logits, rtol=1e-4, atol=1e-4)
    assert alone.extent.tolist() == pytest.approx([50 / 64, 60 / 64])
    surest = alone.class_logits.softmax(-1)[:, :-1].amax(-1)
    assert (surest.diff() <= 0).all() and len(alone.mask_logits) == (surest > 0.5).sum()


def test_cached_answers_equal_live_ones(tmp_path, monkeypatch):
    student, batch = sure_model(), unlabelled_batch() | {"image_ids": [17, "a/b.png"]}
    inputs = {name: batch[name] for name in ("pixel_values", "pixel_mask")}

    def terms(distillation, batch):
        return distillation(student(**inputs), batch, torch.Generator().manual_seed(0))

    live = terms(Distillation(sure_model(seed=1), student), batch)
    cached = Distillation(sure_model(seed=1), student, cache=tmp_path)
    first = terms(cached, batch)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 == len(list(tmp_path.iterdir()))
    monkeypatch.setattr(cached.teacher, "forward", None)  # would fail
    second = terms(cached, batch)
    for name in TERMS:
        assert live[name].item() == first[name].item() == second[name].item()
    stored = load_file(tmp_path / "17.safetensors")
    assert stored["mask_logits"].dtype == torch.float16 and len(stored["class_logits"]) == 10


def test_cache_refuses_what_it_cannot_answer(tmp_path):
    student, batch = sure_model(), unlabelled_batch()
    distillation = Distillation(sure_model(seed=1), student, cache=tmp_path)
    outputs = student(**batch)
    with pytest.raises(ValueError, match="needs an id per image"):
        distillation(outputs, batch)
    named = batch | {"image_ids": [1, 2]}
    distillation(outputs, named)
    mirrored = named | {"pixel_values": named["pixel_values"].flip(-1)}
    with pytest.raises(ValueError, match="looks otherwise.*without random augmentation"):
        distillation(outputs, mirrored)
    with pytest.raises(ValueError, match="by another teacher"):
        Distillation(sure_model(seed=2), student, cache=tmp_path)(outputs, named)
    with pytest.raises(ValueError, match="mask features are not cached"):
        Distillation(sure_model(seed=1), student, cache=tmp_path, feature_weight=1.0)


def test_accumulated_micro_batches_teach_like_the_large_batch(tmp_path):
    """Two micro-batches of equal content: each of their terms counts half."""
    losses = []
    for accumulate in (1, 2):
        student = sure_model()
        distillation = Distillation(sure_model(seed=1), student)
        trainer = Mask2FormerTrainer(
            student,
            Mask2FormerTrainingArguments(
                str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=accumulate,
                use_cpu=True,
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
                save_strategy="no",
            ),  # fmt: skip
            processor=Mask2FormerImageProcessor(do_resize=False),
            train_dataset=[ScenesDataset(1, size=64)[0]] * 2,
            distillation=distillation,
            labelled=False,
        )
        trainer.train()
        losses.append(next(row["loss"] for row in trainer.state.log_history if "loss" in row))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # at other random points


def test_labels_are_needed_without_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="labelled=False.*needs distillation"):
        Mask2FormerTrainer(sure_model(), processor=Mask2FormerImageProcessor(), labelled=False)


def test_collator_adds_ids():
    collate = WithImageIds(lambda examples: {"pixel_values": len(examples)})
    void = np.zeros((2, 2), np.int32)
    examples = [Example(None, void, [], image_id=3), {"segmentation": void, "segments_info": [], "image_id": "x"}]
    assert collate(examples) == {"pixel_values": 2, "image_ids": [3, "x"]}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature=0.0.*positive"),
        ({"weight": -1.0}, "weight=-1.0.*0 or more"),
        ({"confidence": 1.0}, "confidence=1.0.*less than 1"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Distillation(sure_model(), **options)


def test_other_classes_are_refused():
    with pytest.raises(ValueError, match="the teacher has 7 classes and the student 5"):
        Distillation(sure_model(num_labels=7), sure_model())
    batch = unlabelled_batch()
    with pytest.raises(ValueError, match="5 classes and the teacher 7"):
        Distillation(sure_model(num_labels=7))(sure_model()(**batch), batch)
