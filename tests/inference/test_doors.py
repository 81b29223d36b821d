"""One checkpoint gives one result, by whichever door of the package it is asked."""

import json

import numpy as np
import pytest
from helpers import teach, tiny_model
from PIL import Image
from transformers import pipeline

from mask2former_hf import Mask2FormerImageProcessor, Segmenter, register, unregister
from mask2former_hf.cli.main import main
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.evaluation.evaluator import evaluate
from mask2former_hf.inference.known_labels import stuff_of, task_of
from mask2former_hf.inference.rules import THRESHOLDS

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


@pytest.fixture(scope="module", params=PUBLISHED, ids=[row[0] for row in PUBLISHED])
def published(request, tmp_path_factory):
    """A look-alike: the name and the labels of a published checkpoint, and nothing of what only we write."""
    name, class_set, task, num_stuff = request.param
    folder = tmp_path_factory.mktemp("hub") / f"mask2former-swin-tiny-{name}"
    names = ClassTable.load(class_set).id2label
    model = tiny_model("resnet", num_labels=len(names), id2label=names, num_queries=12, decoder_layers=1)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    stuff = stuff_of(model.config)
    things = [label for label in names if label not in stuff]
    # Two queries of one class of stuff, which panoptic results have to fuse.
    teach(model, processor(photo(), return_tensors="pt"), [*things[:2], *[(stuff or things)[-1]] * 2])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    for field in ("task", "stuff_label_ids"):
        content.pop(field)
    (folder / "config.json").write_text(json.dumps(content))
    Image.fromarray(photo()).save(folder / "photo.png")
    return folder, task, num_stuff


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
    seen = {}
    evaluate(
        segmenter.model,
        segmenter.processor,
        Photo(),
        on_result=lambda example, found: seen.update(found),
        progress=False,
    )
    # Average precision is over all scores: the other doors show those from the threshold on.
    measured = rows(seen[task])
    same([row for row in measured if row[1] is None or row[1] >= THRESHOLDS[task]], expected)


def test_the_name_counts_also_in_the_cache_of_the_hub(published):
    folder, task, _ = published
    config = Segmenter(folder, device="cpu").model.config
    snapshot = f"/cache/models--facebook--{folder.name}/snapshots/0123abc"
    config._name_or_path = snapshot
    assert task_of(config) == task
