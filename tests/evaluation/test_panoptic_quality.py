"""Panoptic quality against published figures, panopticapi's output, and a literal implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED
from PIL import Image

from mask2former_hf.evaluation.panoptic_quality import PanopticQuality

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="annotated images (../shared) not found")


def read_ids(path: Path) -> np.ndarray:
    rgb = np.asarray(Image.open(path).convert("RGB")).astype(np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


@needs_data
def test_equals_panopticapi_on_perturbed_coco_panoptic():
    fixture = DATA / "eval_fixtures" / "panoptic_val_perturbed"
    truth = json.loads((DATA / "coco_panoptic" / "annotations" / "panoptic_val.json").read_text())
    predictions = {a["image_id"]: a for a in json.loads((fixture / "pred.json").read_text())["annotations"]}
    metric = PanopticQuality({c["id"]: c for c in truth["categories"]})
    for annotation in truth["annotations"]:
        predicted = predictions[annotation["image_id"]]
        metric.update(
            read_ids(fixture / "pred_png" / predicted["file_name"]),
            predicted["segments_info"],
            read_ids(DATA / "coco_panoptic" / "panoptic_val" / annotation["file_name"]),
            annotation["segments_info"],
        )
    expected = json.loads((fixture / "expected.json").read_text())
    ours = metric.compute()
    for name in ("All", "Things", "Stuff"):
        row = ours[name.lower()]
        for key in ("pq", "sq", "rq"):
            assert row[key] == pytest.approx(expected[name][key], abs=1e-9), (name, key)
        assert row["n"] == expected[name]["n"]


def deeplab_image(stem, classes):
    """Maps and segments of a case of google-research/deeplab2's unit test, class 0 is void."""
    folder = DATA / "eval_fixtures" / "deeplab2_pq"
    true_instance = np.asarray(Image.open(next(folder.glob(f"{stem}_gt*.png"))).convert("L")).astype(np.int64)
    default = classes.get("others")
    true_class = np.full(true_instance.shape, 0 if default is None else default)
    for value, label in classes.items():
        if value != "others":
            true_class[true_instance == value] = label
    palette = {(0, 0, 0): 0, (0, 0, 255): 1, (255, 0, 0): 2, (0, 255, 0): 3}
    palette |= {(255, 0, 255): 4, (0, 255, 255): 5, (255, 255, 0): 6}
    rgb = np.asarray(Image.open(folder / f"{stem}_pred_class.png").convert("RGB"))
    predicted_class = np.zeros(rgb.shape[:2], dtype=np.int64)
    for colour, label in palette.items():
        predicted_class[(rgb == colour).all(-1)] = label
    predicted_instance = np.asarray(Image.open(folder / f"{stem}_pred_instance.png").convert("L")).astype(np.int64)
    maps = []
    for label, instance in ((predicted_class, predicted_instance), (true_class, true_instance)):
        ids = np.where(label == 0, 0, label * 1000 + instance)
        segments = [{"id": i, "category_id": i // 1000} for i in np.unique(ids).tolist() if i]
        maps += [ids, segments]
    return maps


@needs_data
@pytest.mark.parametrize(
    "stems, pq, sq, rq",
    [(["team"], 0.62156284, 0.64664984, 0.9666667), (["bird", "cat", "team"], 0.76855499, 0.7769174, 0.98888892)],
    ids=["team", "bird cat team"],
)
def test_equals_the_figures_of_deeplab2(stems, pq, sq, rq):
    classes = {
        "team": {0: 0, 198: 2, "others": 1},
        "bird": {92: 5, 176: 3, 255: 4},
        "cat": {0: 0, 255: 6},
    }
    metric = PanopticQuality({i: {"name": str(i), "isthing": 1} for i in range(1, 7)})
    for stem in stems:
        metric.update(*deeplab_image(stem, classes[stem]))
    result = metric.compute()["all"]
    assert (result["pq"], result["sq"], result["rq"]) == pytest.approx((pq, sq, rq), abs=1e-6)


def literal_counts(prediction, predicted, truth, true):
    """The rules of the paper segment by segment: (iou, tp, fp, fn) per class."""
    counts = {}

    def add(label, position, value):
        counts.setdefault(label, [0.0, 0, 0, 0])[position] += value

    matched = set()
    for t in true:
        best = None
        for p in predicted:
            if t.get("iscrowd") or t["category_id"] != p["category_id"]:
                continue
            a, b = truth == t["id"], prediction == p["id"]
            union = (a | b).sum() - (b & (truth == 0)).sum()
            if (a & b).sum() / union > 0.5:
                best = (p["id"], (a & b).sum() / union)
        if best:
            matched.add(best[0])
            add(t["category_id"], 0, best[1])
            add(t["category_id"], 1, 1)
        elif not t.get("iscrowd"):
            add(t["category_id"], 3, 1)
    for p in predicted:
        if p["id"] in matched:
            continue
        b = prediction == p["id"]
        excused = (b & (truth == 0)).sum()
        for t in true:
            if t.get("iscrowd") and t["category_id"] == p["category_id"]:
                excused += (b & (truth == t["id"])).sum()
        if excused / b.sum() <= 0.5:
            add(p["category_id"], 2, 1)
    return counts


def random_image(rng):
    """Truth of coarse blocks and a prediction that differs from it in places; 0 is void."""
    truth = rng.integers(0, 7, (6, 6)).repeat(5, 0).repeat(5, 1)
    prediction = np.where(rng.random((30, 30)) < 0.25, rng.integers(0, 7, (30, 30)), truth)
    labels = rng.integers(1, 4, 7)
    true = [
        {"id": i, "category_id": int(labels[i]), "iscrowd": int(rng.random() < 0.2)}
        for i in np.unique(truth).tolist()
        if i
    ]
    predicted = [
        {"id": i, "category_id": int(labels[i] if rng.random() < 0.8 else rng.integers(1, 4))}
        for i in np.unique(prediction).tolist()
        if i
    ]
    return prediction, predicted, truth, true


def test_equals_a_literal_implementation_and_merging_equals_one_pass():
    rng = np.random.default_rng(0)
    categories = {i: {"name": str(i), "isthing": i < 3} for i in (1, 2, 3)}
    whole, parts = PanopticQuality(categories), [PanopticQuality(categories) for _ in range(2)]
    expected = {i: np.zeros(4) for i in categories}
    for index in range(40):
        image = random_image(rng)
        whole.update(*image)
        parts[index % 2].update(*image)
        for label, values in literal_counts(*image).items():
            expected[label] += values
    for row, label in enumerate(categories):
        found = [whole.iou[row], whole.tp[row], whole.fp[row], whole.fn[row]]
        assert found == pytest.approx(list(expected[label])), label
    parts[0].merge(parts[1])
    assert parts[0].compute()["all"] == pytest.approx(whole.compute()["all"])


def test_errors_name_what_does_not_fit():
    metric = PanopticQuality({1: {"name": "a", "isthing": 1}})
    ids, segments = np.array([[0, 1]]), [{"id": 1, "category_id": 1}]
    with pytest.raises(ValueError, match="resize the prediction"):
        metric.update(ids.T, segments, ids, segments)
    with pytest.raises(ValueError, match=r"prediction has the ids \[1\]"):
        metric.update(ids, [], ids, segments)
    with pytest.raises(ValueError, match=r"predicted_segments describes the ids \[2\]"):
        metric.update(ids, [*segments, {"id": 2, "category_id": 1}], ids, segments)
    with pytest.raises(ValueError, match="category_id 9"):
        metric.update(ids, [{"id": 1, "category_id": 9}], ids, segments)
    with pytest.raises(ValueError, match="merge metrics"):
        metric.merge(PanopticQuality({2: {"name": "b", "isthing": 1}}))


def test_ids_that_occur_twice_and_void_as_a_segment_are_refused():
    metric = PanopticQuality({0: {"name": "a", "isthing": 1}, 1: {"name": "b", "isthing": 0}})
    ids = np.array([[1, 1], [2, 2]])
    segments = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 1}]
    with pytest.raises(ValueError, match="segments has the id 1, which stands there twice"):
        metric.update(ids, segments, ids, [*segments, {"id": 1, "category_id": 1}])
    with pytest.raises(ValueError, match="predicted_segments has the id 0, which is void"):
        metric.update(ids, [*segments, {"id": 0, "category_id": 1}], ids, segments)
    metric.update(ids, segments, ids, segments)
    assert metric.compute()["all"]["pq"] == 1.0
