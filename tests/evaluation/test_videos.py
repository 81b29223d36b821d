"""Videos are measured as a whole: by results that are the truth, and by results that are known to be wrong."""

from types import SimpleNamespace

import numpy as np
import pytest

from mask2former_hf.cli.main import main
from mask2former_hf.data.moving_scenes import MovingScenes
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS
from mask2former_hf.evaluation.videos import VideoEvaluator, evaluate_videos
from mask2former_hf.inference.rules import rules_of
from mask2former_hf.inference.segmentation import instance_result, panoptic_result
from mask2former_hf.inference.video_segmenter import Seen, with_ids

PANOPTIC = MovingScenes(2, 4, size=48, seed=5, stuff=True)
INSTANCES = MovingScenes(2, 4, size=48, seed=5)


class Oracle:
    """Says what is annotated; with ids that change in frame `change`, and labels moved by `wrong`."""

    def __init__(self, videos, change=None, wrong=0):
        names = dict(videos.classes.id2label)
        self.videos, self.change, self.wrong, self.task = videos, change, wrong, videos.task
        stuff = list(STUFF_LABEL_IDS) if len(names) == len(ID2LABEL) else []
        self.model = SimpleNamespace(config=SimpleNamespace(id2label=names, task=self.task, stuff_label_ids=stuff))
        self.queue = iter(list(videos))

    def rules(self, **numbers):
        return rules_of(self.model.config, self.task, **numbers)

    def stream(self, **numbers):
        return OracleStream(self, next(self.queue), self.rules(**numbers))


class OracleStream:
    def __init__(self, oracle, video, rules):
        self.oracle, self.video, self.rules, self.frame, self.seen = oracle, video, rules, 0, {}

    def push(self, image):
        things, names = len(INSTANCES.classes.id2label), self.rules.id2label
        late = self.oracle.change is not None and self.frame >= self.oracle.change
        shown, ids, labels = [], [], []
        for number, thing in enumerate(self.video.objects, start=1):
            mask = thing.mask(self.frame, self.video.size)
            if mask.any():
                shown.append(mask)
                ids.append(number + 100 * (late and thing.label < things))
                labels.append((thing.label + self.oracle.wrong) % things if thing.label < things else thing.label)
        for number, label in zip(ids, labels, strict=True):
            self.seen.setdefault(number, Seen(label, 1.0, 1))
        self.frame += 1
        if self.oracle.task == "instance":
            return [with_ids(instance_result(np.stack(shown), [1.0] * len(ids), labels, names), ids)]
        rows = [{"id": n, "label_id": label, "score": 1.0} for n, label in zip(ids, labels, strict=True)]
        return [panoptic_result(sum(mask * n for mask, n in zip(shown, ids, strict=True)), rows, names)]

    def finish(self):
        return []


def test_the_truth_is_found_whole():
    figures = evaluate_videos(Oracle(INSTANCES), INSTANCES)
    assert figures["AP"] == figures["found"] == 1 and figures["switches"] == 0
    figures = evaluate_videos(Oracle(PANOPTIC), PANOPTIC)
    assert figures["vpq"] == figures["vpq_things"] == figures["vpq_stuff"] == 1 and figures["switches"] == 0
    assert "AP" not in figures


def test_ids_that_change_in_the_middle_cost_tracks_and_windows():
    """Half a track overlaps too little; of three windows of two frames one breaks; stuff is as before."""
    figures = evaluate_videos(Oracle(INSTANCES, change=2), INSTANCES)
    assert figures["AP75"] == 0 and figures["found"] == 1 and figures["switches"] > 0
    figures = evaluate_videos(Oracle(PANOPTIC, change=2), PANOPTIC)
    assert figures["vpq_stuff"] == 1 and figures["windows"][1]["all"]["pq"] == 1
    assert figures["windows"][4]["things"]["pq"] < figures["windows"][2]["things"]["pq"] < 1


def test_wrong_classes_are_right_where_classes_do_not_count():
    assert evaluate_videos(Oracle(INSTANCES, wrong=1), INSTANCES)["AP"] == 0
    assert evaluate_videos(Oracle(INSTANCES, wrong=1), INSTANCES, class_agnostic=True)["AP"] == 1


def test_label_0_may_be_stuff_where_classes_do_not_count():
    oracle = Oracle(INSTANCES)
    oracle.model.config.stuff_label_ids = [0]
    assert all(thing.label != 0 for video in INSTANCES for thing in video.objects)
    assert evaluate_videos(oracle, INSTANCES, class_agnostic=True)["AP"] == 1


def test_what_cannot_be_measured_is_said(capsys):
    with pytest.raises(ValueError, match="with class_agnostic=True: videos are measured"):
        VideoEvaluator(Oracle(PANOPTIC), PANOPTIC.classes, class_agnostic=True)
    with pytest.raises(ValueError, match="only in the data: 'sky', 'ground'"):
        VideoEvaluator(Oracle(INSTANCES), PANOPTIC.classes)
    assert main(["evaluate", "--data", "davis", "--model", "x", "--tta"]) == 2
    assert "--tta: is for images" in capsys.readouterr().err
    assert main(["evaluate", "--data", "scenes", "--model", "x", "--class-agnostic"]) == 2
    assert "--class-agnostic: is for videos" in capsys.readouterr().err
