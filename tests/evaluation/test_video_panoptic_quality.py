"""Panoptic quality of videos, against its definition written out: every pixel of every tube of every window."""

import pickle

import numpy as np
import pytest

from mask2former_hf.evaluation.panoptic_quality import PanopticQuality
from mask2former_hf.evaluation.video_panoptic_quality import VideoPanopticQuality

CATEGORIES = {0: {"name": "a", "isthing": 1}, 1: {"name": "b", "isthing": 1}, 2: {"name": "s", "isthing": 0}}
SIZE = (6, 8)


def random_video(rng, length):
    """Frames of blocks whose ids wander; predicted are the same with ids that change and pixels that are wrong."""
    label_of = {number: int(rng.integers(3)) for number in range(1, 9)}
    crowd = int(rng.integers(1, 9))
    frames = []
    for _ in range(length):
        truth = np.kron(rng.integers(0, 5, (3, 4)), np.ones((2, 2), int))
        prediction = np.where(rng.random(SIZE) < 0.1, rng.integers(0, 5, SIZE), truth)
        if rng.random() < 0.4:
            prediction = np.where(prediction == 2, 7, prediction)  # the id changes
        sides = []
        for ids, crowds in ((prediction, False), (truth, True)):
            present = [int(n) for n in np.unique(ids) if n]
            sides += [ids, [{"id": n, "category_id": label_of[n], "iscrowd": crowds and n == crowd} for n in present]]
        frames.append(tuple(sides))
    return frames


def by_definition(videos, length):
    """VPQ^k of all windows of `length` frames: sum of IoU over TP + (FP + FN) / 2 of each class, then the mean."""
    iou, tp, fp, fn = (dict.fromkeys(CATEGORIES, 0.0) for _ in range(4))
    for frames in videos:
        for start in range(len(frames) - length + 1):
            window = frames[start : start + length]
            predicted, true = (np.stack([frame[side] for frame in window]) for side in (0, 2))
            classes = [{s["id"]: s for frame in window for s in frame[side]} for side in (1, 3)]
            tubes = [{n: volume == n for n in known} for volume, known in zip((predicted, true), classes, strict=True)]
            matched = set()
            for t, tube in tubes[1].items():
                if classes[1][t]["iscrowd"]:
                    continue
                found = False
                for p, other in tubes[0].items():
                    union = (tube | other) & ~((true == 0) & other)
                    overlap = (tube & other).sum() / union.sum()
                    if classes[0][p]["category_id"] == classes[1][t]["category_id"] and overlap > 0.5:
                        iou[classes[1][t]["category_id"]] += overlap
                        tp[classes[1][t]["category_id"]] += 1
                        matched.add(p)
                        found = True
                if not found:
                    fn[classes[1][t]["category_id"]] += 1
            for p, tube in tubes[0].items():
                label = classes[0][p]["category_id"]
                excused = true == 0
                for t, other in tubes[1].items():
                    if classes[1][t]["iscrowd"] and classes[1][t]["category_id"] == label:
                        excused = excused | other
                if p not in matched and (tube & excused).sum() / tube.sum() <= 0.5:
                    fp[label] += 1
    return {n: iou[n] / (tp[n] + (fp[n] + fn[n]) / 2) for n in CATEGORIES if tp[n] + fp[n] + fn[n]}


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(4)
    return [random_video(rng, length) for length in (5, 1, 3, 7)]


def test_every_window_counts_as_its_definition_says(videos):
    metric = VideoPanopticQuality(CATEGORIES)
    for frames in videos:
        metric.update(frames)
    figures, expected = metric.compute(), {length: by_definition(videos, length) for length in (1, 2, 3, 4)}
    for length, classes in expected.items():
        rows = figures["windows"][length]["per_class"]
        assert {n: rows[n]["pq"] for n in classes} == pytest.approx(classes, abs=1e-12)
    assert figures["vpq"] == pytest.approx(np.mean([np.mean([*classes.values()]) for classes in expected.values()]))
    things = [np.mean([value for n, value in classes.items() if n < 2]) for classes in expected.values()]
    assert figures["vpq_things"] == pytest.approx(np.mean(things)) and 0.1 < figures["vpq"] < 0.9


def test_windows_of_one_frame_are_panoptic_quality(videos):
    metric, images = VideoPanopticQuality(CATEGORIES, windows=(1,)), PanopticQuality(CATEGORIES)
    for frames in videos:
        metric.update(frames)
        for frame in frames:
            images.update(*frame)
    assert metric.compute()["windows"][1] == images.compute()


def test_states_of_processes_add_up_to_the_whole(videos):
    whole, parts = VideoPanopticQuality(CATEGORIES), [VideoPanopticQuality(CATEGORIES) for _ in range(2)]
    for number, frames in enumerate(videos):
        whole.update(frames)
        parts[number % 2].update(iter(frames))
    parts[0].merge(pickle.loads(pickle.dumps(parts[1])))
    assert parts[0].compute() == whole.compute()


def test_an_id_that_changes_costs_in_windows_and_not_in_frames():
    ids = np.ones(SIZE, int)
    segments = [{"id": 1, "category_id": 0}, {"id": 2, "category_id": 0}]
    frames = [(ids * n, segments[n - 1 : n], ids, segments[:1]) for n in (1, 2)]
    metric = VideoPanopticQuality(CATEGORIES, windows=(1, 2))
    metric.update(frames)
    windows = metric.compute()["windows"]
    assert windows[1]["all"]["pq"] == 1 and windows[2]["all"]["pq"] == 0


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"windows=\(2, 1\): must be rising numbers"):
        VideoPanopticQuality(CATEGORIES, windows=(2, 1))
    ids, segments = np.ones(SIZE, int), [{"id": 1, "category_id": 0}]
    with pytest.raises(ValueError, match="the first frame"):
        VideoPanopticQuality(CATEGORIES).update(
            [(ids, segments, ids, segments), (ids[1:], segments, ids[1:], segments)]
        )
    with pytest.raises(ValueError, match="other windows"):
        VideoPanopticQuality(CATEGORIES).merge(VideoPanopticQuality(CATEGORIES, windows=(1,)))
