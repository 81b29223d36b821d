"""Evaluation: right for known answers, equal however the images are spread over batches and processes."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_model
from processes import two_pythons

import mask2former_hf.inference.results
from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.cli.main import main
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS, Scenes
from mask2former_hf.evaluation.evaluator import SegmentationEvaluator, evaluate, headline
from mask2former_hf.evaluation.matching_classes import with_classes_of
from mask2former_hf.inference.segmentation import instance_result, panoptic_result, semantic_result

METRICS = ["pq", "ap", "box_ap", "miou"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(
        "resnet", id2label=ID2LABEL, label2id={name: index for index, name in ID2LABEL.items()}, task="panoptic",
        stuff_label_ids=list(STUFF_LABEL_IDS), num_queries=20,
    )  # fmt: skip
    model.class_predictor.bias.data[:5] += 6  # a random network that is sure of something
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def load(folder):
    model = mask2former_hf.Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    return model, Mask2FormerImageProcessor.from_pretrained(folder)


def truth(example, shift=0):
    """The annotations as results, by task; every class a number of classes further."""
    ids, names = example.segmentation, {label: str(label) for label in range(5)}
    rows = [
        {"id": s["id"], "label_id": (s["category_id"] + shift) % 5, "score": 1.0, "area": s["area"]}
        for s in example.segments
    ]
    masks, labels = np.stack([ids == row["id"] for row in rows]), [row["label_id"] for row in rows]
    semantic = np.zeros_like(ids)
    for mask, label in zip(masks, labels, strict=True):
        semantic[mask] = label
    return {
        "panoptic": panoptic_result(ids, rows, names),
        "instance": instance_result(masks, [1.0] * len(rows), labels, names),
        "semantic": semantic_result(semantic, names),
    }


def test_the_annotations_as_results_are_perfect_and_wrong_classes_are_not(checkpoint):
    model, processor = load(checkpoint)
    right, wrong = (SegmentationEvaluator(model.config, processor, METRICS) for _ in range(2))
    for index in range(4):
        example = Scenes("val")[index]
        right.count(truth(example), example, index)
        wrong.count(truth(example, shift=1), example, index)
    assert all(headline(right.compute())[name] == pytest.approx(1.0) for name in ("pq", "ap", "box_ap", "miou"))
    assert all(headline(wrong.compute())[name] < 0.1 for name in ("pq", "ap", "box_ap", "miou"))


def test_the_batch_size_does_not_change_the_figures(checkpoint):
    model, processor = load(checkpoint)
    figures = [
        headline(evaluate(model, processor, Subset(5), METRICS, batch_size=size, threshold=0.1, progress=False))
        for size in (1, 2, 5)
    ]
    assert figures[0]["ap50"] > 0 or figures[0]["miou"] > 0
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], abs=1e-3, nan_ok=True)


class Subset:
    """The first held-out scenes."""

    def __init__(self, length):
        self.scenes, self.length = Scenes("val"), length
        self.classes = self.scenes.classes

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.scenes[index]


def test_evaluators_of_shares_merge_to_the_whole(checkpoint):
    model, processor = load(checkpoint)

    def counted(indices):
        evaluator = SegmentationEvaluator(model.config, processor, METRICS, threshold=0.1)
        for index in indices:
            example = Scenes("val")[index]
            inputs = processor([example.image], return_tensors="pt")
            with torch.inference_mode():
                evaluator.update(model(**inputs), [example], [index])
        return evaluator

    parts = counted([0, 2, 4])
    parts.merge(counted([1, 3]))
    assert headline(parts.compute()) == pytest.approx(headline(counted(range(5)).compute()), abs=0, nan_ok=True)


def test_two_processes_give_the_figures_of_one_with_an_uneven_last_batch(checkpoint, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    given = ["--model", str(checkpoint), "--data", "scenes", "--limit", "5", "--batch-size", "1", "--threshold", "0.1"]
    given += ["--metrics", *METRICS, "--device", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the two processes: rounding is the same
    try:
        assert main(["evaluate", *given, "--json", str(one), "--report", str(tmp_path / "by one")]) == 0
    finally:
        torch.set_num_threads(threads)
    command = ["-m", "mask2former_hf", "evaluate", *given, "--json", two, "--report", tmp_path / "by two"]
    processes = two_pythons(*command)
    for done in processes:
        assert done.returncode == 0, done.stderr[-3000:]
    assert [done.stdout.count("pq per class") for done in processes] == [1, 0]
    assert one.read_text() == two.read_text()
    reports = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("by one", "by two")]
    assert all(report.pop("settings") for report in reports) and reports[0] == reports[1]
    pages = [(tmp_path / name / "report.html").read_text() for name in ("by one", "by two")]
    pictures = [re.findall('data:image/jpeg[^"]*', page) for page in pages]
    assert len(pictures[0]) == 5 * 3 and pictures[0] == pictures[1]


@pytest.mark.parametrize("tta", [False, True], ids=["once", "augmented"])
def test_half_precision_is_of_the_forward_pass_alone(checkpoint, monkeypatch, tta):
    model, processor = load(checkpoint)
    processor.size = {"shortest_edge": 96, "longest_edge": 128}
    seen = {"forward": set(), "results": set()}
    module = mask2former_hf.inference.results if tta else mask2former_hf.evaluation.evaluator
    name = "segment_logits" if tta else "segment_outputs"
    segment = getattr(module, name)

    def segment_outputs(*arguments):
        seen["results"].add(torch.is_autocast_enabled("cpu"))
        return segment(*arguments)

    monkeypatch.setattr(module, name, segment_outputs)
    inside = model.model.register_forward_hook(lambda *_: seen["forward"].add(torch.is_autocast_enabled("cpu")))
    for half, expected in ((torch.bfloat16, {True}), (None, {False})):
        seen["forward"].clear()
        evaluate(model, processor, Subset(1), ["pq"], autocast=half, tta=tta, progress=False)
        assert seen == {"forward": expected, "results": {False}}
    inside.remove()
    assert "forward" not in vars(model)


def test_classes_that_the_model_lacks_are_refused_with_the_difference(checkpoint):
    model, _ = load(checkpoint)
    model.config.id2label = model.config.id2label | {3: "moss"}
    with pytest.raises(ValueError, match="only in the data: 'sky'; only in the model: 'moss'"):
        with_classes_of(model.config, Subset(1))


class Renamed(Subset):
    """Some scenes whose classes have other names and places."""

    def __init__(self, names):
        super().__init__(3)
        self.names = names
        self.classes = ClassTable.from_labels(dict(enumerate(names.values())))

    def __getitem__(self, index):
        example, numbers = super().__getitem__(index), list(self.names)
        segments = [{**s, "category_id": numbers.index(ID2LABEL[s["category_id"]])} for s in example.segments]
        return replace(example, segments=segments)


def test_classes_are_found_in_the_model_by_name_whatever_their_order_and_number(checkpoint):
    """Sky is the last class there and the first one here; the model has a sixth class that the data lack."""
    model, processor = load(checkpoint)
    names = {"sky": "Sky-other-merged", "ground": "ground", "box": "box", "triangle": "TRIANGLE", "disc": "disc"}
    found = evaluate(model, processor, Renamed(names), metrics=METRICS, progress=False)
    assert found == evaluate(model, processor, Subset(3), metrics=METRICS, progress=False)
    model.config.id2label = {**model.config.id2label, 5: "moss"}
    assert with_classes_of(model.config, Subset(1))[0].segments == Subset(1)[0].segments


def test_a_name_that_could_be_two_classes_is_refused(checkpoint):
    model, _ = load(checkpoint)
    names = {"sky": "Sky", "ground": "SKY", "box": "box", "triangle": "triangle", "disc": "disc"}
    with pytest.raises(ValueError, match="only in the data: 'Sky', 'SKY'; only in the model: 'sky', 'ground'"):
        with_classes_of(model.config, Renamed(names))
