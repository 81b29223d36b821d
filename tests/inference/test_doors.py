"""One checkpoint gives one result, by whichever door of the package it is asked."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers import teach, tiny_config, tiny_model
from PIL import Image
from transformers import pipeline

from mask2former_hf import Mask2FormerImageProcessor, Segmenter, VideoSegmenter, register, unregister
from mask2former_hf.cli.main import main
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.evaluation.evaluator import evaluate
from mask2former_hf.inference.known_labels import stuff_of, task_of
from mask2former_hf.inference.rules import THRESHOLDS, rules_of
from mask2former_hf.training.recipes import load_recipe

# The end of a published name, its class set, its task, and how many of its labels are stuff.
PUBLISHED = [
    ("coco-panoptic", "coco-panoptic", "panoptic", 53),
    ("coco-instance", "coco-instance", "instance", 0),
    ("ade-semantic", "ade20k-semantic", "semantic", 50),
    ("ade-panoptic", "ade20k-panoptic", "panoptic", 50),
    ("cityscapes-semantic", "cityscapes-semantic", "semantic", 11),
    ("cityscapes-instance", "cityscapes-instance", "instance", 0),
    ("cityscapes-panoptic", "cityscapes-panoptic", "panoptic", 11),
    ("mapillary-vistas-semantic", "mapillary-semantic", "semantic", 28),
    ("mapillary-vistas-panoptic", "mapillary-panoptic", "panoptic", 28),
]


def photo():
    """Broad patches, so that different queries of a random network win in different places."""
    small = np.random.default_rng(3).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "task, options",
    [
        *(("semantic", options) for options in ({}, {"tta": True}, {"tile": 64})),
        *(("panoptic", options) for options in ({}, {"tta": True}, {"tile": 64}, {"refine": "otsu"})),
    ],
)
def test_a_network_that_has_overflown_gives_an_error_and_no_empty_result(task, options):
    model = tiny_model("resnet", decoder_layers=1)
    model.class_predictor.bias.data[2] = torch.inf
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    with pytest.raises(ValueError, match="class_logits has values that are not numbers, or are infinite"):
        Segmenter.of(model, processor, task=task, **options)(photo())
    if not options:
        with pytest.raises(ValueError, match="class_logits has values that are not numbers, or are infinite"):
            VideoSegmenter.of(model, processor, task=task).stream().push(photo())


@pytest.fixture(scope="module", params=PUBLISHED, ids=[row[0] for row in PUBLISHED])
def published(request, tmp_path_factory):
    """A look-alike: the name and the labels of a published checkpoint, and nothing of what only we write."""
    name, class_set, task, num_stuff = request.param
    folder = tmp_path_factory.mktemp("hub") / f"mask2former-swin-tiny-{name}"
    save_look_alike(folder, class_set)
    return folder, task, num_stuff


def save_look_alike(folder, class_set, certainty=1.0, **fields):
    """A checkpoint that knows its labels and its size of images, and `fields` of the processor."""
    names = ClassTable.load(class_set).id2label
    model = tiny_model("resnet", num_labels=len(names), id2label=names, num_queries=12, decoder_layers=1)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, **fields)
    stuff = stuff_of(model.config)
    things = [label for label in names if label not in stuff]
    # Two queries of one class of stuff, which panoptic results have to fuse.
    teach(model, processor(photo(), return_tensors="pt"), [*things[:2], *[(stuff or things)[-1]] * 2])
    with torch.no_grad():
        for parameter in model.class_predictor.parameters():
            parameter *= certainty
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    for field in ("task", "stuff_label_ids"):
        content.pop(field)
    (folder / "config.json").write_text(json.dumps(content))
    Image.fromarray(photo()).save(folder / "photo.png")


class Photo:
    """The photo as a data set, whose annotation states nothing."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if index:
            raise IndexError(index)
        ids = np.zeros((60, 90), dtype=np.int32)
        return {"image": photo(), "segmentation": ids, "segments_info": [], "image_id": 1, "file_name": "photo.png"}


def by_predict(folder, task, tmp_path):
    """Sorted (label, score, mask) of what `predict` wrote."""
    assert main(["predict", str(folder / "photo.png"), "--model", str(folder), "--output", str(tmp_path)]) == 0
    if task == "instance":
        decode = pytest.importorskip("pycocotools.mask").decode
        results = json.loads((tmp_path / "instances.json").read_text())
        return [(r["category_id"], r["score"], decode(r["segmentation"]).astype(bool)) for r in results]
    if task == "semantic":
        labels = np.asarray(Image.open(tmp_path / "semantic" / "photo.png"))
        return [(label, None, labels == label) for label in np.unique(labels).tolist()]
    content = json.loads((tmp_path / "panoptic.json").read_text())
    ids = np.asarray(Image.open(tmp_path / "panoptic" / "photo.png")).astype(int) @ [1, 256, 65536]
    return [(s["category_id"], s["score"], ids == s["id"]) for s in content["annotations"][0]["segments_info"]]


def by_pipeline(folder, config):
    register()
    try:
        found = pipeline("image-segmentation", model=str(folder), device="cpu")(Image.fromarray(photo()))
    finally:
        unregister()
    label2id = {name: label for label, name in config.id2label.items()}
    return [(label2id[s["label"]], s["score"], np.asarray(s["mask"]) == 255) for s in found]


def rows(result):
    return [(s.label_id, s.score, mask) for s, mask in zip(result.segments, result.masks, strict=True)]


def same(ours, theirs):
    assert [row[0] for row in ours] == [row[0] for row in theirs]
    for (_, score, mask), (_, other_score, other_mask) in zip(ours, theirs, strict=True):
        assert score is None and other_score is None or score == pytest.approx(other_score, abs=1e-5)
        assert (mask == other_mask).all()


def test_every_door_gives_the_same_result_and_it_is_what_the_labels_say(published, tmp_path):
    folder, task, num_stuff = published
    segmenter = Segmenter(folder, device="cpu")
    result = segmenter(folder / "photo.png")
    assert segmenter.task == result.task == task and len(result.stuff_label_ids) == num_stuff
    labels = [segment.label_id for segment in result.segments]
    found = {"panoptic": 3, "semantic": 3, "instance": 4}  # two things and stuff, or four things
    assert len(labels) == found[task] and bool(num_stuff) == bool(set(labels) & set(result.stuff_label_ids))
    expected = rows(result)
    same(by_predict(folder, task, tmp_path / "out"), expected)
    same(by_pipeline(folder, segmenter.model.config), expected)
    # Average precision is over all scores: the other doors show those from the threshold on.
    measured = by_evaluate(segmenter, task)
    same([row for row in measured if row[1] is None or row[1] >= THRESHOLDS[task]], expected)


def by_evaluate(segmenter, task):
    seen = {}
    keep = lambda example, found: seen.update(found)  # noqa: E731
    evaluate(segmenter.model, segmenter.processor, Photo(), on_result=keep, progress=False)
    return rows(seen[task])


def test_thresholds_of_a_recipe_travel_with_the_checkpoint_to_every_door(tmp_path):
    """The original tests its panoptic models of Mapillary Vistas without a lowest score."""
    folder = tmp_path / "mask2former-swin-tiny-mapillary-vistas-panoptic"
    fields = load_recipe("mapillary-panoptic-r50").processor_fields()
    save_look_alike(folder, "mapillary-panoptic", certainty=0.2, **fields)
    assert json.loads((folder / "preprocessor_config.json").read_text())["object_mask_threshold"] == 0
    segmenter = Segmenter(folder, device="cpu")
    expected = rows(segmenter(photo()))
    assert len(expected) == 3 and all(score < THRESHOLDS["panoptic"] for _, score, _ in expected)
    assert not segmenter(photo(), threshold=THRESHOLDS["panoptic"]).segments
    same(by_predict(folder, "panoptic", tmp_path / "out"), expected)
    same(by_pipeline(folder, segmenter.model.config), expected)
    same(by_evaluate(segmenter, "panoptic"), expected)
    with torch.no_grad():
        outputs = segmenter.model(**segmenter.processor(photo(), return_tensors="pt"))
    stuff = stuff_of(segmenter.model.config)
    for processor in (segmenter.processor, transformers.Mask2FormerImageProcessor.from_pretrained(folder)):
        assert rules_of(segmenter.model.config, processor=processor).threshold == 0
    found = segmenter.processor.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=stuff)[0]
    assert [info["label_id"] for info in found["segments_info"]] == [label for label, _, _ in expected]


@pytest.mark.parametrize(
    "task, numbers, words",
    [
        (
            "semantic",
            {"threshold": 0.3},
            "threshold=0.3: semantic results .* ask for instance or panoptic",
        ),
        ("semantic", {"mask_threshold": 0.3}, "mask_threshold=0.3: semantic results"),
        ("semantic", {"top_k": 5}, "top_k=5: semantic results have no such number; leave it out, or ask for instance"),
        ("panoptic", {"top_k": 5}, "top_k=5: panoptic results have no such number"),
        ("panoptic", {"refine": "otsu", "mask_threshold": 0.4}, "mask_threshold=0.4: refine='otsu' finds a threshold"),
        ("panoptic", {"threshold": "high"}, "threshold='high' must lie between 0 and 1"),
        ("instance", {"top_k": 1.5}, "top_k=1.5 must be at least 1"),
    ],
)
def test_a_number_that_the_results_are_not_made_by_is_refused(task, numbers, words):
    if numbers.get("refine"):
        pytest.importorskip("skimage")
    with pytest.raises(ValueError, match=words):
        rules_of(tiny_config(task="panoptic"), task, **numbers)


def test_every_door_refuses_a_threshold_of_semantic_results(tmp_path, capsys):
    folder = tmp_path / "mask2former-swin-tiny-ade-semantic"
    save_look_alike(folder, "ade20k-semantic")
    segmenter = Segmenter(folder, device="cpu")
    with pytest.raises(ValueError, match="threshold=0.3: semantic results"):
        segmenter(photo(), threshold=0.3)
    with pytest.raises(ValueError, match=r"threshold=0.3: metrics=\['miou'\] are not measured on panoptic results"):
        evaluate(segmenter.model, segmenter.processor, Photo(), threshold=0.3)
    given = [str(folder / "photo.png"), "--model", str(folder), "--output", str(tmp_path / "out")]
    assert main(["predict", *given, "--threshold", "0.3"]) == 2
    assert "--threshold 0.3: semantic results" in capsys.readouterr().err
    register()
    try:
        pipe = pipeline("image-segmentation", model=str(folder), device="cpu")
        with pytest.raises(ValueError, match="overlap_mask_area_threshold=0.3: semantic results"):
            pipe(Image.fromarray(photo()), overlap_mask_area_threshold=0.3)
    finally:
        unregister()


def test_the_name_counts_also_in_the_cache_of_the_hub(published):
    folder, task, _ = published
    config = Segmenter(folder, device="cpu").model.config
    snapshot = f"/cache/models--facebook--{folder.name}/snapshots/0123abc"
    config._name_or_path = snapshot
    assert task_of(config) == task
