"""Identity switches: by hand, against motmetrics, and a segmenter measured on generated videos."""

import numpy as np
import pytest
from helpers import randomise, tiny_config

pytest.importorskip("pycocotools", reason="masks are compared with a COCO package")

from mask2former_hf import Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor, MovingScenes, VideoSegmenter
from mask2former_hf.data.rle import encode_masks
from mask2former_hf.evaluation.identity_switches import IdentitySwitches
from mask2former_hf.evaluation.videos import evaluate_videos, objects_of


def track(number, places):
    masks = [None if left is None else np.zeros((10, 60), bool) for left in places]
    for mask, left in zip(masks, places, strict=True):
        if left is not None:
            mask[:, left : left + 10] = True
    return {"id": number, "segmentations": masks}


def test_an_object_that_is_found_by_another_id_is_a_switch():
    metric = IdentitySwitches()
    metric.update([track(1, [0, 0, None, None]), track(2, [None, None, 0, 0])], [track(0, [0] * 4)])
    assert metric.compute() == {"switches": 1, "found": 1.0}


def test_an_id_that_comes_back_after_a_gap_is_no_switch_and_missed_frames_are_not_found():
    metric = IdentitySwitches()
    metric.update([track(5, [0, None, None, 0])], [track(0, [0] * 4)])
    assert metric.compute() == {"switches": 0, "found": 0.5}
    other = IdentitySwitches()
    other.update([], [track(0, [0] * 4) | {"iscrowd": 1}, track(0, [0, None])])
    metric.merge(other)
    assert metric.compute()["found"] == 2 / 5


def test_an_object_keeps_its_id_although_another_lies_better():
    metric = IdentitySwitches()
    metric.update([track(1, [0, 2]), track(2, [None, 0])], [track(0, [0, 0])])
    assert metric.switches == 0


@pytest.mark.parametrize("seed", range(3))
def test_equals_motmetrics(seed):
    motmetrics = pytest.importorskip("motmetrics")
    from pycocotools import mask as tools

    rng, metric = np.random.default_rng(seed), IdentitySwitches()
    objects, tracks = [], []
    for number in range(4):
        places = (number * 14 + rng.integers(0, 4, 12).cumsum() // 6).tolist()
        objects.append(track(number, [None if rng.random() < 0.1 else p for p in places]))
        tracks.append([None if rng.random() < 0.15 else max(0, p + int(rng.integers(-2, 3))) for p in places])
    for frame in range(12):  # some exchange their ids
        if rng.random() < 0.4:
            a, b = rng.choice(4, 2, replace=False)
            tracks[a][frame:], tracks[b][frame:] = tracks[b][frame:], tracks[a][frame:]
    tracks = [track(10 + n, places) for n, places in enumerate(tracks)]
    metric.update(tracks, objects)
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for frame in range(12):
        sides = [[e for e in side if e["segmentations"][frame] is not None] for side in (objects, tracks)]
        codes = [encode_masks(np.stack([e["segmentations"][frame] for e in side])) if side else [] for side in sides]
        ids = [[entry["id"] for entry in side] for side in sides]
        distances = 1 - np.asarray(tools.iou(*codes, [0] * len(codes[1])) if all(codes) else []).reshape(
            *map(len, ids)
        )
        accumulator.update(*ids, np.where(distances > 0.5, np.nan, distances))
    summary = motmetrics.metrics.create().compute(accumulator, metrics=["num_switches", "num_detections"])
    assert metric.switches == summary["num_switches"].item() > 0
    assert metric.found == summary["num_detections"].item()


def test_a_segmenter_is_measured_on_videos():
    names = MovingScenes.classes.id2label
    fields = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
    config = tiny_config("resnet", task="instance", num_labels=len(names), **fields)
    model = randomise(Mask2FormerForVideoSegmentation(config))
    processor = Mask2FormerVideoProcessor(size={"shortest_edge": 48, "longest_edge": 48})
    segmenter, videos = VideoSegmenter.of(model.eval(), processor, window=4, overlap=1), MovingScenes(2, 6, size=48)
    figures = evaluate_videos(segmenter, videos)
    assert 0 <= figures["AP"] < 0.2 and figures["switches"] >= 0 and 0 <= figures["found"] <= 1
    model.config.id2label = {0: "triangle", 1: "disc", 2: "box"}
    assert evaluate_videos(segmenter, videos)["found"] == figures["found"], "classes are known by name, in any order"
    model.config.id2label = {0: "ring", 1: "disc", 2: "box"}
    with pytest.raises(ValueError, match="only in the data: 'triangle'; only in the model: 'ring'"):
        evaluate_videos(segmenter, videos)


def test_the_truth_itself_is_perfect():
    metric = IdentitySwitches()
    for video in MovingScenes(4, 6, size=48):
        objects = objects_of(video)
        metric.update([thing | {"id": n} for n, thing in enumerate(objects)], objects)
    assert metric.compute() == {"switches": 0, "found": 1.0}
