"""What the average precision needs and refuses."""

import pickle
import sys

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="average precision needs a COCO package")

from mask2former_hf.evaluation.average_precision import AveragePrecision

CATEGORIES = {i: {"name": str(i)} for i in (1, 2, 3)}


def test_boundary_ap_without_its_package_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        AveragePrecision(CATEGORIES, "boundary")


def test_without_any_coco_package_the_error_names_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        AveragePrecision(CATEGORIES).update(np.ones((1, 2, 2), dtype=bool), [0.5], [1], [], image_id=0)


def test_errors_name_what_does_not_fit():
    mask, other = np.ones((1, 4, 4), dtype=bool), np.ones((1, 4, 5), dtype=bool)
    truth = [{"category_id": 1, "segmentation": mask[0]}]
    with pytest.raises(ValueError, match="iou_type='keypoints'"):
        AveragePrecision(CATEGORIES, "keypoints")
    with pytest.raises(ValueError, match="rising numbers"):
        AveragePrecision(CATEGORIES, max_detections=(100, 10))
    metric = AveragePrecision(CATEGORIES)
    wrong = {
        "resize the predictions": ((other, [0.5], [1], truth), {}),
        r"labels has the classes \[9\]": ((mask, [0.5], [9], truth), {}),
        "category_id 9": ((mask, [0.5], [1], [{**truth[0], "category_id": 9}]), {}),
        "each mask needs one score": ((mask, [0.5, 0.6], [1], truth), {}),
        "must be finite": ((mask, [np.nan], [1], truth), {}),
        "threshold probabilities": ((mask * 0.5, [0.5], [1], truth), {}),
        "segments=None": ((mask, [0.5], [1]), {}),
        "no segmentation": ((mask, [0.5], [1], [{"category_id": 1}]), {}),
        "polygons need": ((mask, [0.5], [1], [{"category_id": 1, "segmentation": [[0, 0, 1, 1, 0, 1]]}]), {}),
        "areas has 2 values": ((mask, [0.5], [1], truth), {"areas": [1, 2]}),
    }
    for image_id, (message, (positional, named)) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=message):
            metric.update(*positional, **named, image_id=image_id)
    assert metric.matches == metric.truth == metric.sizes == {}
    metric.update(mask, [0.5], [1], truth, image_id=0)
    with pytest.raises(ValueError, match="counted before"):
        metric.update(mask, [0.5], [1], truth, image_id=np.int64(0))
    with pytest.raises(ValueError, match="counted in both metrics, for example 0"):
        metric.merge(pickle.loads(pickle.dumps(metric)))
    with pytest.raises(ValueError, match="another max_detections"):
        metric.merge(AveragePrecision(CATEGORIES, max_detections=(1,)))
    content = {"categories": [{"id": 1, "name": "a"}], "images": [{"id": 3, "height": 4, "width": 4}]}
    metric = AveragePrecision.from_coco({**content, "annotations": []})
    with pytest.raises(ValueError, match="not in the COCO json's images"):
        metric.update(mask, [0.5], [1], image_id=0)
    with pytest.raises(ValueError, match="pass segments=None"):
        metric.update(mask, [0.5], [1], truth, image_id=3)
    with pytest.raises(ValueError, match="which images lacks"):
        AveragePrecision.from_coco({**content, "annotations": [{"id": 1, "image_id": 4, "category_id": 1}]})


@pytest.mark.parametrize("counts", [[10, 5], b"zzzz", [3, 4]])
def test_run_lengths_that_do_not_fill_the_mask_are_refused(counts):
    metric = AveragePrecision({1: {"name": "a"}})
    truth = [{"category_id": 1, "segmentation": np.ones((8, 8), bool)}]
    broken = {"size": [8, 8], "counts": counts}
    with pytest.raises(ValueError, match="not to H|stops inside a number"):
        metric.update([broken], np.array([0.9]), np.array([1]), truth, image_id=1)
    with pytest.raises(ValueError, match="not to H|stops inside a number"):
        wrong = [{"category_id": 1, "segmentation": {"size": [4, 4], "counts": counts}}]
        metric.update(np.ones((1, 4, 4), bool), np.array([0.9]), np.array([1]), wrong, image_id=1)
    metric.update(np.ones((1, 8, 8), bool), np.array([0.9]), np.array([1]), truth, image_id=1)  # nothing was kept
    assert metric.compute()["AP"] == pytest.approx(1.0)
