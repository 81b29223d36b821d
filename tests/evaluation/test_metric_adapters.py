"""The adapters to `evaluate`: the metrics' own figures, in one process and in two, without a network."""

import json
import os

import numpy as np
import pytest
from processes import Python, python

pytest.importorskip("evaluate", reason="evaluate is optional: pip install evaluate")
pytest.importorskip("pycocotools", reason="average precision needs a COCO package")

from mask2former_hf.evaluation.adapters import AveragePrecisionMetric, MeanIoUMetric, PanopticQualityMetric
from mask2former_hf.evaluation.average_precision import AveragePrecision
from mask2former_hf.evaluation.mean_iou import MeanIoU
from mask2former_hf.evaluation.panoptic_quality import PanopticQuality

CATEGORIES = {i: {"name": f"class {i}", "isthing": i < 2} for i in range(3)}
KINDS = {
    "panoptic": (PanopticQualityMetric, PanopticQuality),
    "instance": (AveragePrecisionMetric, AveragePrecision),
    "semantic": (MeanIoUMetric, MeanIoU),
}


def make_images(kind, count=5):
    """Predictions and references of one kind."""
    rng = np.random.default_rng(0)
    predictions, references = [], []
    for image_id in range(count):
        truth = rng.integers(0, 3, (4, 5)).repeat(8, 0).repeat(8, 1)
        prediction = np.roll(truth, 1, (0, 1))
        if kind == "semantic":
            predictions.append(prediction)
            references.append(truth)
        elif kind == "instance":
            present = np.unique(truth).tolist()
            masks, scores = np.stack([prediction == i for i in present]), rng.random(len(present)).round(1)
            predictions.append({"masks": masks, "scores": scores, "labels": present})
            segments = [{"category_id": i, "segmentation": truth == i} for i in present]
            references.append({"image_id": image_id, "segments_info": segments})
        else:
            present = np.unique(truth).tolist()
            predictions.append(
                {"segmentation": prediction + 1, "segments_info": [{"id": i + 1, "label_id": i} for i in present]}
            )
            segments = [{"id": i + 1, "category_id": i} for i in present]
            references.append({"segmentation": truth + 1, "segments_info": segments})
    return predictions, references


def direct_figures(kind, images):
    """The same without evaluate."""
    metric = KINDS[kind][1](CATEGORIES)
    for prediction, reference in zip(*images, strict=True):
        if kind == "semantic":
            metric.update(prediction, reference)
        elif kind == "instance":
            metric.update(**prediction, segments=reference["segments_info"], image_id=reference["image_id"])
        else:
            predicted = [{"id": s["id"], "category_id": s["label_id"]} for s in prediction["segments_info"]]
            metric.update(prediction["segmentation"], predicted, reference["segmentation"], reference["segments_info"])
    return metric.compute()


@pytest.mark.parametrize("kind", KINDS)
def test_add_add_batch_and_compute_give_the_metrics_figures(kind, tmp_path):
    adapter, metric = KINDS[kind]
    predictions, references = make_images(kind)
    expected = json.dumps(direct_figures(kind, (predictions, references)))
    front = adapter(metric(CATEGORIES), cache_dir=str(tmp_path))
    assert json.dumps(front.compute(predictions=predictions, references=references)) == expected
    front.add(prediction=predictions[0], reference=references[0])
    front.add_batch(predictions=predictions[1:], references=references[1:])
    assert json.dumps(front.compute()) == expected
    in_memory = adapter(metric(CATEGORIES), cache_dir=str(tmp_path), keep_in_memory=True)
    assert json.dumps(in_memory.compute(predictions=predictions, references=references)) == expected


def test_unequal_lists_are_refused(tmp_path):
    front = MeanIoUMetric(MeanIoU(CATEGORIES), cache_dir=str(tmp_path))
    predictions, references = make_images("semantic")
    with pytest.raises(ValueError, match="5 predictions for 4 references"):
        front.add_batch(predictions=predictions, references=references[1:])
    with pytest.raises(ValueError, match="5 predictions for no references"):
        front.compute(predictions=predictions)


PROCESS = """
import json, sys
from test_metric_adapters import CATEGORIES, KINDS, make_images

rank, folder = int(sys.argv[1]), sys.argv[2]
for kind, (adapter, metric) in KINDS.items():
    front = adapter(metric(CATEGORIES), num_process=2, process_id=rank, experiment_id="test", cache_dir=folder)
    predictions, references = make_images(kind)
    for repetition in range(2):  # without a barrier in between
        for start in range(rank, 5, 2):  # three images here, two there
            front.add(prediction=predictions[start], reference=references[start])
        print(json.dumps(front.compute()))
if rank == 1:
    front.add_batch(predictions=predictions, references=references)
print(json.dumps(front.compute()))  # process 0 had no image
"""


def test_two_processes_give_the_figures_of_one_time_after_time(tmp_path):
    begin = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    processes = [Python("-c", begin + PROCESS, rank, tmp_path) for rank in range(2)]
    first, second = (process.wait() for process in processes)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-3000:] + second.stderr[-3000:]
    expected = [json.dumps(direct_figures(kind, make_images(kind))) for kind in KINDS for _ in range(2)]
    expected.append(expected[-1])
    assert first.stdout.splitlines() == expected
    assert second.stdout.splitlines() == ["null"] * len(expected)


def test_without_evaluate_the_error_names_the_package():
    code = "import sys; sys.modules['evaluate'] = None\nimport mask2former_hf.evaluation.adapters"
    done = python("-c", code)
    assert done.returncode != 0 and "pip install evaluate" in done.stderr
