"""Mean IoU and boundary IoU against recorded figures and literal implementations."""

import json
import pickle

import numpy as np
import pytest
import torch
from helpers import SHARED
from PIL import Image
from scipy.ndimage import binary_erosion

from mask2former_hf.evaluation.boundary_iou import MeanBoundaryIoU, boundary_iou
from mask2former_hf.evaluation.mean_iou import MeanIoU
from mask2former_hf.evaluation.panoptic_quality import PanopticQuality

DATA = SHARED / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="annotated images (../shared) not found")
CATEGORIES = {i: {"name": f"class {i}"} for i in range(4)}


def camvid_pairs():
    for path in sorted((DATA / "eval_fixtures" / "camvid_val_perturbed" / "pred").glob("*.png")):
        truth = DATA / "camvid" / "labels" / "val" / path.name
        yield np.asarray(Image.open(path)), np.asarray(Image.open(truth))


@needs_data
def test_equals_detectron2s_definition_on_perturbed_camvid():
    expected = json.loads((DATA / "eval_fixtures" / "camvid_val_perturbed" / "expected.json").read_text())
    names = json.loads((DATA / "camvid" / "classes.json").read_text())["classes"]
    metric = MeanIoU({i: {"name": name} for i, name in enumerate(names)}, ignore_index=11)
    for prediction, truth in camvid_pairs():
        metric.update(prediction, truth)
    ours = metric.compute()
    assert metric.confusion.tolist() == expected["confusion_gt_rows_pred_cols"]
    for name in ("mIoU", "fwIoU", "mACC", "pACC"):
        assert ours[name] == pytest.approx(expected[name], abs=1e-12), name
    rows = list(ours["per_class"].values())
    assert [row["iou"] for row in rows] == pytest.approx(expected["per_class_IoU"], abs=1e-12)
    assert [row["accuracy"] for row in rows] == pytest.approx(expected["per_class_ACC"], abs=1e-12)
    assert [row["name"] for row in rows] == names


def test_classes_that_the_truth_lacks_do_not_count():
    metric = MeanIoU(CATEGORIES)
    metric.update(np.array([[0, 0, 1, 2]]), np.array([[0, 0, 0, 1]]))
    figures = metric.compute()
    assert figures["mIoU"] == pytest.approx((2 / 3 + 0) / 2)  # class 2 is predicted only, class 3 is nowhere
    assert figures["mACC"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["pACC"] == pytest.approx(2 / 4)
    assert figures["fwIoU"] == pytest.approx(2 / 3 * 3 / 4)
    assert np.isnan([figures["per_class"][i]["iou"] for i in (2, 3)]).all()


def test_ignored_pixels_do_not_count_and_ids_need_not_be_contiguous():
    metric = MeanIoU({7: {"name": "a"}, 33: {"name": "b"}}, ignore_index=-1)
    truth, prediction = np.array([[7, 33, -1, -1]]), np.array([[7, 7, 33, 7]])
    metric.update(prediction.astype(np.int16), truth.astype(np.int8))
    assert metric.confusion.tolist() == [[1, 0], [1, 0]]
    assert metric.compute()["per_class"][7] == {"name": "a", "iou": 0.5, "accuracy": 1.0, "pixels": 1}


def test_nothing_to_count_gives_nan():
    for metric, name in ((MeanIoU(CATEGORIES), "mIoU"), (MeanBoundaryIoU(CATEGORIES), "mean_boundary_iou")):
        assert np.isnan(metric.compute()[name])
        metric.update(np.zeros((3, 3), dtype=int), np.full((3, 3), 255))
        assert np.isnan(metric.compute()[name])


def random_maps(count=9, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = rng.choice([0, 1, 2, 3, 255], (8, 10)).repeat(8, 0).repeat(8, 1)
        prediction = np.where(truth == 255, 0, np.roll(truth, 2, (0, 1)))
        prediction[prediction == 255] = rng.integers(0, 4)
        yield prediction, truth


def panoptic(labels):
    ids = np.where(labels == 255, 0, labels + 1)
    return ids, [{"id": i, "category_id": i - 1} for i in np.unique(ids).tolist() if i]


def update(metric, prediction, truth):
    if isinstance(metric, PanopticQuality):
        metric.update(*panoptic(prediction), *panoptic(truth))
    else:
        metric.update(prediction, truth)


@pytest.mark.parametrize("kind", [MeanIoU, MeanBoundaryIoU, PanopticQuality])
def test_shards_merged_in_any_order_equal_one_pass_exactly(kind):
    categories = {i: {**c, "isthing": i < 2} for i, c in CATEGORIES.items()}
    whole, maps = kind(categories), list(random_maps())
    for pair in maps:
        update(whole, *pair)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)):
        shards = [kind(categories) for _ in order]
        for index, pair in enumerate(maps):
            update(shards[order[index % 3]], *pair)
        sent = [pickle.dumps(shard) for shard in shards]
        assert max(map(len, sent)) < 2000
        first, *others = map(pickle.loads, sent)
        for other in others:
            first.merge(other)
        assert json.dumps(first.compute()) == json.dumps(whole.compute())


def test_tensors_and_arrays_count_alike():
    for kind in (MeanIoU, MeanBoundaryIoU):
        arrays, tensors = kind(CATEGORIES), kind(CATEGORIES)
        for prediction, truth in random_maps(2):
            arrays.update(prediction, truth)
            tensors.update(torch.from_numpy(prediction), torch.from_numpy(truth))
        assert arrays.compute() == tensors.compute()


def inner_boundary(mask, width):
    return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=width)


def test_boundary_iou_equals_masks_minus_their_erosion():
    rng = np.random.default_rng(0)
    for _ in range(5):
        a = rng.integers(0, 2, (12, 16)).repeat(9, 0).repeat(9, 1).astype(bool)
        b = np.roll(a, 1, (0, 1))
        width = round(0.02 * np.hypot(*a.shape))
        assert width == 4
        inner = inner_boundary(a, width), inner_boundary(b, width)
        expected = (inner[0] & inner[1]).sum() / (inner[0] | inner[1]).sum()
        assert boundary_iou(a, b) == boundary_iou(torch.from_numpy(a), b) == pytest.approx(expected)
    assert boundary_iou(a, a) == 1
    assert np.isnan(boundary_iou(np.zeros((5, 5), dtype=bool), np.zeros((5, 5), dtype=bool)))


def test_inner_boundary_equals_faster_coco_evals():
    coco = pytest.importorskip("faster_coco_eval").mask
    rng = np.random.default_rng(1)
    for size in ((30, 40), (97, 61), (150, 200)):
        mask = rng.random((-(-size[0] // 10), -(-size[1] // 10))) < 0.6
        mask = mask.repeat(10, 0).repeat(10, 1)[: size[0], : size[1]]
        theirs = coco.decode(coco.rleToBoundary(coco.encode(np.asfortranarray(mask, dtype=np.uint8)))).astype(bool)
        other = np.ones(size, dtype=bool)
        border = inner_boundary(other, max(1, round(0.02 * np.hypot(*size))))
        assert boundary_iou(mask, other) == pytest.approx((theirs & border).sum() / (theirs | border).sum())


def test_mean_boundary_iou_equals_a_literal_implementation():
    metric, counts = MeanBoundaryIoU(CATEGORIES), np.zeros((4, 2))
    for prediction, truth in random_maps():
        metric.update(prediction, truth)
        width = round(0.02 * np.hypot(*truth.shape))
        for label in CATEGORIES:
            a, b = inner_boundary(truth == label, width), inner_boundary((prediction == label) & (truth != 255), width)
            counts[label] += (a & b).sum(), (a | b).sum()
    figures = metric.compute()
    assert [row["boundary_iou"] for row in figures["per_class"].values()] == pytest.approx(counts[:, 0] / counts[:, 1])
    assert figures["mean_boundary_iou"] == pytest.approx((counts[:, 0] / counts[:, 1]).mean())


@pytest.mark.parametrize("kind", [MeanIoU, MeanBoundaryIoU])
def test_errors_name_what_does_not_fit(kind):
    metric, labels = kind(CATEGORIES), np.zeros((2, 3), dtype=int)
    with pytest.raises(ValueError, match="resize the prediction"):
        metric.update(labels.T, labels)
    with pytest.raises(ValueError, match=r"truth has the ids \[4, 300\]: known are \[0, 1, 2, 3\] and 255 to ignore"):
        metric.update(labels, np.array([[0, 4, 255], [300, 300, 1]]))
    with pytest.raises(ValueError, match=r"prediction has the ids \[255\]"):
        metric.update(labels + 255, labels)
    with pytest.raises(ValueError, match="float"):
        metric.update(labels, labels * 1.0)
    with pytest.raises(ValueError, match="ignore_index=2 is a class"):
        kind(CATEGORIES, ignore_index=2)
    with pytest.raises(ValueError, match="at least one"):
        kind({})
    with pytest.raises(ValueError, match="merge metrics"):
        metric.merge(kind(CATEGORIES, ignore_index=None))


def test_panoptic_ids_that_do_not_fit_the_key_are_refused():
    metric = PanopticQuality({1: {"name": "a", "isthing": 1}})
    ids, segments = np.array([[0, 2**31 - 1]]), [{"id": 2**31 - 1, "category_id": 1}]
    metric.update(ids, segments, ids, segments)
    assert metric.compute()["all"]["pq"] == 1
    for wrong in (ids + 1, ids - 1):
        with pytest.raises(ValueError, match="they must be from 0 to 2147483647"):
            metric.update(wrong, segments, ids, segments)
