"""The report: its numbers are the metrics' own, its page needs nothing else and says what it is given as text."""

import contextlib
import json
import math
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from mask2former_hf.cli.main import main
from mask2former_hf.data.example import Example
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS, Scenes
from mask2former_hf.evaluation import kept_pictures
from mask2former_hf.evaluation.evaluator import SegmentationEvaluator, headline
from mask2former_hf.evaluation.findings import SURE, Findings
from mask2former_hf.evaluation.kept_pictures import COUNT, Kept
from mask2former_hf.evaluation.object_matching import instance_overlaps, partners
from mask2former_hf.evaluation.report import results, write_evaluation, write_report
from mask2former_hf.evaluation.report_numbers import calibration, class_rows, precision_recall, scored
from mask2former_hf.evaluation.report_page import confusion_table
from mask2former_hf.inference.segmentation import instance_result, panoptic_result, semantic_result

METRICS = ["pq", "ap", "box_ap", "miou"]
EVIL = "<script>alert('disc & $x$')</script>"
CONFIG = SimpleNamespace(
    id2label={**ID2LABEL, 0: EVIL}, num_labels=5, task="panoptic", stuff_label_ids=list(STUFF_LABEL_IDS)
)
CATEGORIES = {label: {"name": name, "isthing": label not in STUFF_LABEL_IDS} for label, name in ID2LABEL.items()}
SMALL = 48  # side of the images, for speed


def made(index: int) -> tuple[Example, dict]:
    """A scene with void and sometimes a crowd, and results that are right, displaced, of another class, or missing."""
    random, scene = np.random.default_rng(index), Scenes("val")[index]
    ids = scene.segmentation[:SMALL, :SMALL].copy()
    ids[: random.integers(1, 12), :9] = 0
    segments = [dict(s) for s in scene.segments if (ids == s["id"]).any()]
    if index % 2:
        segments[0]["iscrowd"] = 1
    for segment in segments:
        segment.pop("area", None)
    example = Example(scene.image[:SMALL, :SMALL].copy(), ids, segments, file_name=f"{index}.jpg")
    found, rows = np.zeros_like(ids), []
    for segment in segments:
        mask = np.roll(ids == segment["id"], random.integers(0, 4, 2), (0, 1)) & (found == 0)
        if not mask.any() or random.random() < 0.2:
            continue
        label = int(random.integers(5)) if random.random() < 0.3 else segment["category_id"]
        found[mask] = segment["id"]
        score = float(random.uniform(0.3, 1))
        rows.append({"id": segment["id"], "label_id": label, "score": score})
    masks = [found == row["id"] for row in rows] + [found[::-1] == row["id"] for row in rows]
    labels = [row["label_id"] for row in rows] * 2
    scores = [row["score"] for row in rows] + [row["score"] * 0.8 for row in rows]
    order = np.argsort(scores)[::-1]
    semantic = np.zeros_like(ids)
    for row in rows:
        semantic[found == row["id"]] = row["label_id"]
    masks = np.array(masks).reshape(-1, *ids.shape)[order]
    scores, labels = ([values[n] for n in order] for values in (scores, labels))
    return example, {
        "panoptic": panoptic_result(found, rows, CONFIG.id2label, STUFF_LABEL_IDS),
        "instance": instance_result(masks, scores, labels, CONFIG.id2label, STUFF_LABEL_IDS),
        "semantic": semantic_result(semantic, CONFIG.id2label, STUFF_LABEL_IDS),
    }


@pytest.fixture(scope="module")
def images():
    return [made(index) for index in range(2 * COUNT + 4)]


@contextlib.contextmanager
def not_drawn():
    """Pictures are the images' names: drawing takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_pictures, "_panels", lambda example, *rest: [example.name.encode()] * 3)
        yield


def measured(images, metrics, numbers=None):
    evaluator = SegmentationEvaluator(CONFIG, None, metrics, findings=True)
    for number in range(len(images)) if numbers is None else numbers:
        example, found = images[number]
        evaluator.count({task: found[task] for task in evaluator.tasks}, example, number)
    return evaluator


@pytest.fixture(scope="module")
def evaluators(images):
    """By task."""
    sets = {"panoptic": ["pq"], "instance": ["ap", "box_ap"], "semantic": ["miou"]}
    with not_drawn():
        return {task: measured(images, metrics) for task, metrics in sets.items()}


def test_confusions_of_panoptic_segments_are_the_counts_of_panoptic_quality(evaluators):
    findings, quality = evaluators["panoptic"].findings, evaluators["panoptic"].metrics["pq"]
    assert (quality.tp > 0).any() and (quality.fp > 0).any() and (quality.fn > 0).any()
    assert findings.confusion.diagonal()[:-1].tolist() == quality.tp.tolist()
    assert findings.confusion[:-1].sum(1).tolist() == (quality.tp + quality.fn).tolist()
    assert findings.confusion[:, :-1].sum(0).tolist() == (quality.tp + quality.fp).tolist()
    assert findings.scores.sum(0).tolist() == [quality.tp.sum(), quality.fp.sum()]


def test_confusions_of_panoptic_segments_are_those_of_every_pair_of_masks(images, evaluators):
    """Pixel by pixel: no true object overlaps two segments by more than half, so no choice is left but void's."""
    expected = np.zeros((6, 6), dtype=int)
    for example, found in images:
        truth, result = example.segmentation, found["panoptic"]
        pairs = {}
        for s in result.segments:
            inside = result.map == s.id
            for t in example.objects:
                mask = truth == t["id"]
                iou = (inside & mask).sum() / ((inside & (truth != 0)) | mask).sum()
                if iou > 0.5:
                    pairs[s.id] = t
        crowds = {t["id"]: t["category_id"] for t in example.crowds}
        for s in result.segments:
            pixels = truth[result.map == s.id]
            excused = np.mean([p == 0 or crowds.get(p) == s.label_id for p in pixels.tolist()]) > 0.5
            if s.id in pairs and (not excused or pairs[s.id]["category_id"] == s.label_id):
                expected[pairs[s.id]["category_id"], s.label_id] += 1
            elif not excused:
                expected[5, s.label_id] += 1
            if excused and s.id in pairs and pairs[s.id]["category_id"] != s.label_id:
                del pairs[s.id]
        for t in example.objects:
            expected[t["category_id"], 5] += t not in pairs.values()
    assert (expected * ~np.eye(6, dtype=bool))[:5, :5].any()
    assert evaluators["panoptic"].findings.confusion.tolist() == expected.tolist()


def test_confusions_of_instances_match_what_average_precision_matches(evaluators):
    findings = evaluators["instance"].findings
    scores, hits = scored(evaluators["instance"])
    assert findings.confusion.trace() == (hits & (scores >= SURE)).sum() > 0
    assert findings.confusion[-1].sum() > 0 and findings.confusion[:-1, -1].sum() > 0


def test_a_segment_of_the_own_class_goes_before_a_surer_one_of_another():
    """Two equal masks: the metric counts the one of the right class, and the other is a false alarm."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    found = [{"category_id": label, "score": score, "segmentation": mask} for label, score in ((1, 0.9), (0, 0.6))]
    truth = [{"category_id": 0, "segmentation": mask, "iscrowd": 0}]
    result = instance_result(np.stack([mask, mask]), [0.9, 0.6], [1, 0], ID2LABEL).to_coco()
    overlaps = instance_overlaps(result, [{**truth[0], "segmentation": result[0]["segmentation"]}])
    assert len(found) == 2 and partners(overlaps).tolist() == [-1, 0]


def test_confusions_of_semantic_results_are_the_pixels_of_mean_iou(evaluators):
    findings = evaluators["semantic"].findings
    assert findings.confusion[:-1, :-1].tolist() == evaluators["semantic"].metrics["miou"].confusion.tolist()
    assert not findings.confusion[-1].any() and not findings.confusion[:, -1].any() and not findings.sizes.any()


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_sizes_count_every_true_object_once(evaluators, task):
    findings = evaluators[task].findings
    assert findings.sizes.sum() == findings.confusion[:-1].sum()
    assert findings.sizes[:, 0].sum() == findings.confusion.trace()


def test_precision_and_recall_of_instances_average_to_average_precision(evaluators):
    summary = evaluators["instance"].compute()["ap"]
    curves = precision_recall(evaluators["instance"])
    for name, figure in (("IoU 0.5", "AP50"), ("IoU 0.75", "AP75"), ("IoU 0.5 to 0.95", "AP")):
        assert curves[name][1].mean() == pytest.approx(summary[figure])


def test_precision_and_recall_of_panoptic_segments_end_at_those_of_the_metric(evaluators):
    quality = evaluators["panoptic"].metrics["pq"]
    recall, precision = precision_recall(evaluators["panoptic"])["panoptic segments"]
    assert recall[-1] == quality.tp.sum() / (quality.tp + quality.fn).sum()
    assert precision[-1] == quality.tp.sum() / (quality.tp + quality.fp).sum()
    assert (np.diff(recall) >= 0).all()


def test_calibration_of_known_scores():
    measured = calibration(np.array([0.92, 0.98, 0.41, 1.0]), np.array([True, False, True, True]))
    counts = [row["count"] for row in measured["bins"]]
    assert counts == [0, 0, 0, 0, 1, 0, 0, 0, 0, 3]
    assert measured["bins"][9]["right"] == pytest.approx(2 / 3) and math.isnan(measured["bins"][0]["right"])
    assert measured["error"] == pytest.approx((abs(0.41 - 1) + 3 * abs(2.9 / 3 - 2 / 3)) / 4)
    assert math.isnan(calibration(np.zeros(0), np.zeros(0, dtype=bool))["error"])


@pytest.mark.parametrize(("task", "metric", "figure"), [("panoptic", "pq", "pq"), ("semantic", "miou", "miou")])
def test_the_quality_of_an_image_is_the_metric_of_it_alone(images, evaluators, task, metric, figure):
    findings = evaluators[task].findings
    for number in (0, 1, 2):
        alone = measured(images, [metric], [number])
        assert findings.qualities[number] == (f"{number}.jpg", headline(alone.compute())[figure])


def test_the_quality_of_an_image_of_instances_is_1_for_its_truth_and_nan_for_nothing():
    example, _ = made(0)
    things = [s for s in example.segments if CATEGORIES[s["category_id"]]["isthing"]]
    right = instance_result(
        example.masks(things), [1.0] * len(things), [s["category_id"] for s in things], ID2LABEL, STUFF_LABEL_IDS
    )
    nothing = instance_result(np.zeros((0, SMALL, SMALL), dtype=bool), [], [], ID2LABEL, STUFF_LABEL_IDS)
    empty = replace(example, segments=[], segmentation=np.zeros_like(example.segmentation))
    findings = Findings(["instance"], CATEGORIES)
    findings.update({"instance": right}, example, 0)
    findings.update({"instance": nothing}, empty, 1)
    findings.update({"instance": nothing}, example, 2)
    assert [findings.qualities[n][1] for n in (0, 2)] == [1.0, 0.0] and math.isnan(findings.qualities[1][1])
    assert [name for name, _ in findings.ranked()] == ["0.jpg", "0.jpg"] and len(findings.kept.worst) == 2


def test_the_worst_and_the_best_images_are_kept_in_order_whatever_order_they_come_in(images):
    example, found = images[0]
    random = np.random.default_rng(0)
    qualities = random.integers(0, 20, 60) / 20  # many are equal
    halves = [Kept(), Kept()]
    with not_drawn():
        for number in random.permutation(60).tolist():
            halves[number % 2].offer(qualities[number], number, str(number), example, found["panoptic"], {3, 4}, 0.0)
    halves[0].merge(halves[1])
    order = np.lexsort((np.arange(60), qualities)).tolist()
    assert [int(picture.name) for picture in halves[0].worst] == order[:COUNT]
    assert [int(picture.name) for picture in halves[0].best] == order[::-1][:COUNT]


@pytest.mark.parametrize("metrics", [["pq"], ["ap"]])
def test_shares_of_two_processes_merge_to_the_whole(images, metrics):
    with not_drawn():
        whole = measured(images, metrics)
        first, second = (measured(images, metrics, range(rank, len(images), 2)) for rank in (0, 1))
    second.merge(first)
    assert json.dumps(results(second)) == json.dumps(results(whole))
    assert second.findings.kept.worst == whole.findings.kept.worst
    assert second.findings.kept.best == whole.findings.kept.best


def test_results_have_the_figures_of_the_metrics_and_the_images_worst_first(evaluators):
    content = results(evaluators["panoptic"], steps=3)
    assert content["metrics"] == headline(evaluators["panoptic"].compute()) and content["steps"] == 3
    qualities = [row["quality"] for row in content["images"]]
    assert qualities == sorted(qualities) and len(qualities) > 2 * COUNT
    assert sum(row["count"] for row in content["confusions"]) == evaluators["panoptic"].findings.confusion.sum()


def test_the_table_of_classes_has_every_metric_beside_the_name(page):
    summaries = page[0].compute()
    headings, rows, absent = class_rows(summaries)
    assert all(len(row) == len(headings) for row in rows) and len(rows) + absent == 5
    table = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    for label, row in summaries["ap"]["per_class"].items():
        own = table[CONFIG.id2label[label]]
        expected = [row["AP"], row["APs"], summaries["pq"]["per_class"][label]["sq"]]
        assert [own["AP"], own["AP small"], own["SQ"]] == pytest.approx(expected, nan_ok=True)
        assert own["IoU"] == pytest.approx(summaries["miou"]["per_class"][label]["iou"], nan_ok=True)
    assert math.isnan(table["sky"]["AP"]) and table["sky"]["IoU"] > 0


def test_average_precision_by_size_and_class_averages_to_that_of_all(evaluators):
    summary = evaluators["instance"].compute()["ap"]
    values = [row["APs"] for row in summary["per_class"].values()]
    assert np.nanmean(values) == pytest.approx(summary["APs"])


class Sources(HTMLParser):
    """What a page loads, its tags and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.loaded, self.tags, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    evaluator = measured(images, METRICS)
    write_evaluation(folder, evaluator, title=EVIL, settings={"model": EVIL})
    return evaluator, folder


def test_the_page_needs_no_other_file_and_no_network(page):
    text = (page[1] / "report.html").read_text()
    found = Sources(text)
    assert len(found.loaded) == 4 + 2 * COUNT * 3 and all(source.startswith("data:image/") for source in found.loaded)
    assert "http" not in text and "@import" not in text and "url(" not in text and len(text) < 20e6
    assert found.tags.count("script") == 1 and not {"link", "iframe", "object"} & set(found.tags)


def test_names_of_classes_are_text_in_the_page(page):
    found = Sources((page[1] / "report.html").read_text())
    assert (
        found.tags.count("script") == 1 and found.text.count(EVIL) >= 4
    )  # title, heading, table, confusions, setting


def test_the_page_shows_the_figures_of_the_metrics(page):
    text = Sources((page[1] / "report.html").read_text()).text
    for name, value in headline(page[0].compute()).items():
        assert value != value or f"{name}{100 * value:.1f}" in text


def test_of_many_classes_the_frequent_ones_are_shown():
    counts = np.diag([*range(1, 41), 0])
    table = Sources(confusion_table(counts, [f"class {n}" for n in range(40)], background=True)).text
    assert "The 30 most frequent of 40" in table and "class 10" in table and "class 9" not in table


def test_a_run_without_images_has_a_page_of_its_curves(tmp_path):
    history = [{"step": 1, "loss": 3.0, "learning_rate": 1e-3}, {"step": 1, "eval_ap": 0.5, "eval_runtime": 1}]
    target = write_report(tmp_path, None, history=history, metric="ap", figures={"ap": 0.5})
    found = Sources(target.read_text())
    assert len(found.loaded) == 1 and "ap50.0" in found.text


def test_without_matplotlib_the_command_says_how_to_install_it_before_it_starts(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["evaluate", "--model", "none", "--data", "scenes", "--report", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    with pytest.raises(ImportError, match="matplotlib"):
        partial(write_report, tmp_path)(None)


def test_a_report_of_videos_is_refused(tmp_path, capsys):
    assert main(["evaluate", "--model", "none", "--data", "moving-scenes", "--report", str(tmp_path)]) == 2
    assert "--report" in capsys.readouterr().err
