"""Average precision against the COCO packages' own figures for official results, and its state across processes."""

import itertools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from helpers import SHARED
from scipy.ndimage import binary_erosion

pytest.importorskip("pycocotools", reason="average precision needs a COCO package")

from mask2former_hf.data.rle import coco_tools, to_rle
from mask2former_hf.evaluation.average_precision import AveragePrecision

DATA = SHARED / "data"
FIXTURES = DATA / "eval_fixtures"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="annotated images (../shared) not found")
CASES = {
    "coco segm": (
        FIXTURES / "coco_fakesegm100" / "instances_val2014_100.json",
        FIXTURES / "coco_fakesegm100" / "instances_val2014_fakesegm100_results.json",
    ),
    "coco bbox": (
        FIXTURES / "coco_fakesegm100" / "instances_val2014_100.json",
        FIXTURES / "coco_fakesegm100" / "instances_val2014_fakebbox100_results.json",
    ),
    "nuclei segm": (
        DATA / "nuclei_dsb2018" / "annotations" / "instances_val.json",
        FIXTURES / "nuclei_val_perturbed" / "results.json",
    ),
    "nuclei bbox": (
        DATA / "nuclei_dsb2018" / "annotations" / "instances_val.json",
        FIXTURES / "nuclei_val_perturbed" / "results.json",
    ),
}


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def package(request, monkeypatch):
    """Run with either COCO package; pycocotools is the one used when the other cannot be imported."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    else:
        pytest.importorskip("faster_coco_eval")
    return request.param


def results_by_image(path):
    images = {}
    for result in json.loads(path.read_text()):
        images.setdefault(result["image_id"], []).append(result)
    return images


def arguments(results, iou_type):
    """What `update` takes, from entries of a COCO result file."""
    boxes = np.array([result["bbox"] for result in results]) if "bbox" in results[0] else None
    return {
        "masks": boxes if iou_type == "bbox" else [result["segmentation"] for result in results],
        "scores": [result["score"] for result in results],
        "labels": [result["category_id"] for result in results],
        # COCO's loadRes prefers the box's area, also for masks, where a file has both.
        "areas": None if boxes is None else boxes[:, 2] * boxes[:, 3],
    }


@needs_data
@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_evaluation(case, package):
    truth, results = CASES[case]
    iou_type = case.split()[1]
    expected = json.loads((results.parent / "expected.json").read_text())[iou_type]
    metric = AveragePrecision.from_coco(truth, iou_type)
    for image_id, entries in results_by_image(results).items():
        metric.update(**arguments(entries, iou_type), image_id=image_id)
    ours = metric.compute()
    for name, value in expected["stats"].items():
        wanted = pytest.approx(value, abs=1e-9) if value > -1 else pytest.approx(np.nan, nan_ok=True)
        assert ours[name] == wanted, name
    for category, value in expected["per_class_AP"].items():
        wanted = pytest.approx(np.nan, nan_ok=True) if value is None else pytest.approx(value, abs=1e-9)
        assert ours["per_class"][int(category)]["AP"] == wanted, category


@needs_data
def test_truth_with_each_update_equals_truth_from_the_json():
    path, results = CASES["coco segm"]
    content, by_image = json.loads(path.read_text()), results_by_image(results)
    categories = {c["id"]: c for c in content["categories"]}
    whole = AveragePrecision.from_coco(content)
    single = AveragePrecision(categories)
    for image_id, entries in by_image.items():
        whole.update(**arguments(entries, "segm"), image_id=image_id)
    for image in content["images"]:
        entries = by_image.get(image["id"], [])
        truth = [
            {**record, "category_id": list(categories)[record["category_id"]], "segmentation": record["region"]}
            for record in whole.truth[image["id"]]
        ]
        predicted = arguments(entries, "segm") if entries else {"masks": [], "scores": [], "labels": []}
        single.update(**predicted, segments=truth, image_id=f"{image['id']:012}.jpg")
    assert same(single.compute(), whole.compute())


def random_images(count=12, size=(40, 50), seed=0):
    """Arguments of `update` with rounded scores, so that many are equal."""
    rng = np.random.default_rng(seed)

    def boxes(number):
        masks = np.zeros((number, *size), dtype=bool)
        for mask in masks:
            top, left, height, width = rng.integers(0, 25, 4)
            mask[top : top + height + 4, left : left + width + 4] = True
        return masks

    for image_id in range(count):
        true = boxes(rng.integers(0, 6))
        masks = np.concatenate([np.roll(true, 1, (1, 2)), boxes(rng.integers(0, 5))])
        segments = [
            {"segmentation": m, "category_id": int(rng.integers(1, 4)), "iscrowd": int(rng.random() < 0.1)}
            for m in true
        ]
        scores = rng.random(len(masks)).round(1)
        labels = np.array([s["category_id"] for s in segments] + [1] * (len(masks) - len(true)))
        yield {"masks": masks, "scores": scores, "labels": labels, "segments": segments, "image_id": image_id}


CATEGORIES = {i: {"name": str(i)} for i in (1, 2, 3)}


def same(a, b):
    """Equal to the last bit, nan to nan."""
    return json.dumps(a) == json.dumps(b)


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_shards_merged_in_any_order_equal_one_pass_exactly(iou_type, package):
    images = list(random_images())
    whole = AveragePrecision(CATEGORIES, iou_type)
    for image in images:
        whole.update(**image)
    expected = whole.compute()
    assert 0 < expected["AP"] < 1
    for order in itertools.permutations(range(3)):
        shards = [AveragePrecision(CATEGORIES, iou_type) for _ in order]
        for index, image in enumerate(images):
            shards[order[index % 3]].update(**image)
        first, *others = (pickle.loads(pickle.dumps(shard)) for shard in shards)
        for other in others:
            first.merge(other)
        assert same(first.compute(), expected)
    assert same(whole.compute(), expected)  # computing changes nothing


@needs_data
def test_shards_of_one_json_merge_to_the_whole():
    path, results = CASES["coco segm"]
    whole, *shards = (AveragePrecision.from_coco(path) for _ in range(3))
    for index, (image_id, entries) in enumerate(results_by_image(results).items()):
        for metric in (whole, shards[index % 2]):
            metric.update(**arguments(entries, "segm"), image_id=image_id)
    shards[1].merge(shards[0])
    assert same(shards[1].compute(), whole.compute())


def by_the_package(package, images, iou_type, max_detections):
    """The twelve figures of COCOeval itself."""
    if package == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    sides = [], []
    for image in images:
        true = [{**s, "score": 1.0} for s in image["segments"]]
        rows = zip(image["masks"], image["scores"], image["labels"], strict=True)
        found = [{"segmentation": m, "score": float(s), "category_id": int(label)} for m, s, label in rows]
        for side, objects in zip(sides, (true, found), strict=True):
            for row in objects:
                rle = to_rle(row["segmentation"])
                row = {"area": int(row["segmentation"].sum()), "iscrowd": 0, **row, "segmentation": rle}
                row |= {"id": len(side) + 1, "image_id": image["image_id"] + 1, "ignore": 0}
                box = [float(x) for x in coco_tools().mask.toBbox([rle])[0]]
                if side is sides[1] and iou_type == "bbox":
                    row["area"] = box[2] * box[3]
                side.append(row | {"bbox": box})
    sets = []
    for annotations in sides:
        sets.append(COCO())
        sets[-1].dataset = {
            "images": [{"id": image["image_id"] + 1, "height": 40, "width": 50} for image in images],
            "categories": [{"id": i, "name": str(i)} for i in CATEGORIES],
            "annotations": annotations,
        }
        sets[-1].createIndex()
    evaluation = COCOeval(*sets, iou_type)
    evaluation.params.maxDets = list(max_detections)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = (np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
    figures = [precision[..., area, -1] for area in range(4)] + [precision[0, ..., 0, -1], precision[5, ..., 0, -1]]
    figures += [recall[..., 0, m] for m in range(3)] + [recall[..., area, -1] for area in (1, 2, 3)]
    return [values[values > -1].mean() if (values > -1).any() else np.nan for values in figures]


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("max_detections", [(1, 10, 100), (1, 2, 3)])
def test_crowds_areas_ties_and_limits_are_those_of_the_coco_packages(iou_type, max_detections, package):
    rng = np.random.default_rng(7)
    images = list(random_images(40, seed=7))
    for image in images:  # areas that make objects of all three ranges, and some at a border of two
        for segment in image["segments"]:
            segment["area"] = float(rng.choice([32**2, 96**2, 96**2 + 1, 1e5, segment["segmentation"].sum()]))
            segment["iscrowd"] = int(rng.random() < 0.3)
    metric = AveragePrecision(CATEGORIES, iou_type, max_detections)
    for image in images:
        metric.update(**image)
    ours = metric.compute()
    names = ["AP", "APs", "APm", "APl", "AP50", "AP75", *(f"AR{n}" for n in max_detections), "ARs", "ARm", "ARl"]
    expected = by_the_package(package, images, iou_type, max_detections)
    assert [ours[name] for name in names] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 0 < ours["AP"] < 1 and not np.isnan(expected).any()


def test_state_does_not_depend_on_the_masks_and_is_22_bytes_a_detection():
    sizes = []
    for count in (100, 200):
        metric = AveragePrecision(CATEGORIES, max_detections=(1, 10, 200))
        masks = np.random.default_rng(0).random((count, 48, 64)) < 0.5
        metric.update(masks, np.ones(count), np.ones(count, dtype=int), [], image_id=0)
        sizes.append(len(pickle.dumps(metric)))
    assert sizes[1] - sizes[0] == pytest.approx(22 * 100, abs=20)


def test_state_is_much_smaller_than_the_masks():
    masks = np.zeros((100, 480, 640), dtype=bool)
    for index, mask in enumerate(masks):
        mask[index : index + 200, 2 * index : 2 * index + 300] = True
    metric = AveragePrecision(CATEGORIES)
    metric.update(masks, np.ones(100), np.ones(100, dtype=int), [], image_id=0)
    assert len(pickle.dumps(metric)) < masks.nbytes / 200


def test_only_the_best_of_each_class_are_kept(package):
    masks, scores, labels = np.ones((6, 8, 8), dtype=bool), np.arange(6) / 10, np.array([1, 1, 1, 2, 2, 2])
    metric = AveragePrecision(CATEGORIES, max_detections=(1, 2))
    metric.update(masks, scores, labels, [], image_id=0)
    kept = metric.matches[0]
    assert list(zip(kept.labels, kept.scores, strict=True)) == [(1, 0.5), (1, 0.4), (0, 0.2), (0, 0.1)]
    assert {"AR1", "AR2"} < set(metric.compute())


def spied(metric):
    """The metric, and a list of what it compares: (detections, truth) of every image."""
    records, compare = [], metric._match
    metric._match = lambda *sides: records.append(sides) or compare(*sides)
    return metric, records


def test_all_forms_of_masks_and_tensors_are_the_same(package):
    from pycocotools import mask as coco

    image = next(image for image in random_images() if len(image["masks"]) > 2 and image["segments"])
    masks, segments = image["masks"], image["segments"]

    def uncompressed(mask):
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
        counts = np.diff([0, *edges, flat.size]).tolist()
        return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}

    def text(mask):
        rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {**rle, "counts": rle["counts"].decode()}

    expected = None
    for form in (
        lambda masks: masks,
        lambda masks: torch.from_numpy(masks),
        lambda masks: masks.astype(np.uint8) * 255,
        list,
        lambda masks: [uncompressed(mask) for mask in masks],
        lambda masks: [text(mask) for mask in masks],
        lambda masks: [coco.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks],
    ):
        metric, records = spied(AveragePrecision(CATEGORIES))
        true = form(np.stack([s["segmentation"] for s in segments]))
        metric.update(
            form(masks),
            torch.from_numpy(image["scores"]),
            torch.from_numpy(image["labels"]),
            [{**s, "segmentation": m} for s, m in zip(segments, true, strict=True)],
            image_id=torch.tensor(7),
        )
        expected = expected or records
        assert records == expected and len(records) == 1


def test_boxes_of_masks_equal_boxes_given():
    for image in random_images(4):
        edges = [(np.flatnonzero(m.any(0)), np.flatnonzero(m.any(1))) for m in image["masks"]]
        boxes = [[x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1] for x, y in edges]
        (by_mask, of_masks), (by_box, of_boxes) = (spied(AveragePrecision(CATEGORIES, "bbox")) for _ in range(2))
        by_mask.update(**image)
        by_box.update(**image | {"masks": boxes})
        assert of_masks == of_boxes and len(of_masks) == 1


def test_the_annotated_area_decides_the_size_class(package):
    mask = np.ones((1, 20, 20), dtype=bool)
    segment = {"category_id": 1, "segmentation": mask[0]}
    for area, present in ((None, "APs"), (2000, "APm"), (10000, "APl")):
        metric = AveragePrecision(CATEGORIES)
        metric.update(mask, [0.5], [1], [{**segment, "area": area}], image_id=0)
        figures = metric.compute()
        assert {name for name in ("APs", "APm", "APl") if figures[name] == pytest.approx(1)} == {present}
        assert np.isnan(sum(figures[name] for name in {"APs", "APm", "APl"} - {present}))


def test_predictions_on_images_without_truth_are_false_positives(package):
    mask = np.ones((1, 20, 20), dtype=bool)
    metric = AveragePrecision(CATEGORIES)
    metric.update(mask, [0.5], [1], [{"category_id": 1, "segmentation": mask[0]}], image_id="a")
    assert metric.compute()["AP"] == pytest.approx(1)
    metric.update(mask, [0.4], [1], [], image_id="b")
    assert metric.compute()["AP"] == pytest.approx(1)  # less confident than the hit: no recall level is affected
    metric.update(mask, [0.6], [1], [], image_id=("c", 3))
    assert metric.compute()["AP"] == pytest.approx(1 / 2)
    metric.update(mask, [0.9], [2], [], image_id="d")
    assert metric.compute()["AP"] == pytest.approx(1 / 2)  # no truth of class 2: the class does not count


def test_nothing_to_count_gives_nan(package):
    metric = AveragePrecision(CATEGORIES)
    assert np.isnan(metric.compute()["AP"])
    metric.update([], [], [], [], image_id=0)
    assert np.isnan(metric.compute()["AP"])
    metric.update([], [], [], [{"category_id": 1, "segmentation": np.ones((4, 4), dtype=bool)}], image_id=1)
    assert metric.compute()["AP"] == 0


def test_boundary_ap_compares_the_smaller_of_mask_and_boundary_iou():
    pytest.importorskip("faster_coco_eval")
    truth = np.zeros((1, 200, 200), dtype=bool)
    truth[0, 40:160, 40:160] = True
    prediction = np.zeros_like(truth)
    prediction[0, 43:163, 40:160] = True

    def inner(mask):  # 0.02 of the diagonal is 6 pixels
        return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=6)

    def iou(a, b):
        return (a & b).sum() / (a | b).sum()

    masks, boundaries = iou(truth, prediction), iou(inner(truth[0]), inner(prediction[0]))
    assert 0.91 < masks < 0.99 and 0.56 < boundaries < 0.69
    for iou_type, value in (("segm", masks), ("boundary", boundaries)):
        metric = AveragePrecision(CATEGORIES, iou_type)
        metric.update(prediction, [0.5], [1], [{"category_id": 1, "segmentation": truth[0]}], image_id=0)
        assert metric.compute()["AP"] == pytest.approx(sum(value >= t for t in np.arange(50, 100, 5) / 100) / 10)
