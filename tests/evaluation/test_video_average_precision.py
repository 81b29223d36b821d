"""Average precision of tracks: against YouTube-VIS' rules written out in loops, and against COCO's package."""

import contextlib
import io
import math
import pickle

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="average precision needs a COCO package")

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask2former_hf.data.rle import encode_masks
from mask2former_hf.evaluation.video_average_precision import AREAS, VideoAveragePrecision

CATEGORIES = {3: {"name": "cat"}, 7: {"name": "dog"}, 8: {"name": "never"}}
T, H, W = 4, 300, 400


def boxes_to_masks(boxes):
    masks = []
    for box in boxes:
        mask = None if box is None else np.zeros((H, W), bool)
        if box is not None:
            left, top, width, height = box
            mask[top : top + height, left : left + width] = True
        masks.append(mask)
    return masks


def random_video(rng, crowds):
    """Objects of all sizes, absent in some frames, and tracks near them, with ties of scores."""
    objects, tracks = [], []
    for _ in range(rng.integers(0, 5)):
        side = rng.integers(10, 290)
        box = np.array([rng.integers(0, W - 290), rng.integers(0, H - side + 1), side, side])
        boxes = [None if rng.random() < 0.25 else box + [5 * frame, 0, 0, 0] for frame in range(T)]
        category = int(rng.choice([3, 7]))
        entry = {"category_id": category, "segmentations": boxes_to_masks(boxes), "iscrowd": 0}
        objects.append(entry | {"iscrowd": int(crowds and rng.random() < 0.3)})
        for _ in range(rng.integers(0, 3)):
            jitter = [rng.integers(-side // 6, side // 6 + 1), rng.integers(-side // 6, 1), 0, 0]
            near = [None if b is None or rng.random() < 0.15 else np.maximum(b + jitter, 0) for b in boxes]
            category = category if rng.random() < 0.8 else 10 - category
            score = float(rng.choice([0.2, 0.4, 0.6, 0.8]))
            tracks.append({"category_id": category, "segmentations": boxes_to_masks(near), "score": score})
    return tracks, objects


def random_videos(count, crowds, seed=0):
    rng = np.random.default_rng(seed)
    return [random_video(rng, crowds) for _ in range(count)]


def computed(videos):
    metric = VideoAveragePrecision(CATEGORIES)
    for number, (tracks, objects) in enumerate(videos):
        metric.update(tracks, objects, video_id=number)
    return metric.compute()


# --- the rules written out -------------------------------------------------------------------------------------------


def naive_overlap(track, thing):
    shared = union = 0
    for a, b in zip(track["segmentations"], thing["segmentations"], strict=True):
        a, b = (np.zeros((H, W), bool) if x is None else x for x in (a, b))
        shared, union = shared + (a & b).sum(), union + (a | b).sum()
    return shared / union if union else 0.0


def mean_area(entry):
    areas = [mask.sum() for mask in entry["segmentations"] if mask is not None and mask.any()]
    return np.mean(areas) if areas else 0


def naive_average_precision(videos, category, threshold, area_range, limit):
    """(mean precision over 101 recalls, final recall) of one class; None without an object."""
    low, high = area_range
    rows, count = [], 0
    for tracks, objects in videos:
        tracks = [track for track in tracks if track["category_id"] == category]
        tracks = sorted(tracks, key=lambda track: -track["score"])
        objects = [thing for thing in objects if thing["category_id"] == category]
        out = [bool(thing["iscrowd"]) or not low <= mean_area(thing) <= high for thing in objects]
        order = sorted(range(len(objects)), key=lambda g: out[g])
        count += out.count(False)
        taken = set()
        for place, track in enumerate(tracks[:100]):
            best, match = min(threshold, 1 - 1e-10), None
            for g in order:
                if g in taken and not objects[g]["iscrowd"]:
                    continue
                if match is not None and not out[match] and out[g]:
                    break
                overlap = naive_overlap(track, objects[g])
                if overlap >= best:
                    best, match = overlap, g
            if match is not None:
                taken.add(match)
            ignored = out[match] if match is not None else not low <= mean_area(track) <= high
            rows.append((track["score"], match is not None, ignored, place))
    if not count:
        return None
    rows = sorted((row for row in rows if row[3] < limit), key=lambda row: -row[0])
    right = wrong = 0
    curve = []
    for _, matched, ignored, _ in rows:
        right, wrong = right + (matched and not ignored), wrong + (not matched and not ignored)
        curve.append((right / count, right / (right + wrong) if right + wrong else 0.0))
    points = [max((p for r, p in curve if r >= level), default=0.0) for level in np.linspace(0, 1, 101)]
    return np.mean(points), curve[-1][0] if curve else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_rules_written_out(seed):
    videos = random_videos(6, crowds=True, seed=seed)
    ours = computed(videos)

    def mean(part, thresholds, area, limit=100):
        found = [naive_average_precision(videos, c, t, AREAS[area], limit) for c in CATEGORIES for t in thresholds]
        found = [pair[part] for pair in found if pair is not None]
        return np.mean(found) if found else math.nan

    every = np.linspace(0.5, 0.95, 10)
    expected = {"AP": mean(0, every, "all"), "AP50": mean(0, [0.5], "all"), "AP75": mean(0, [0.75], "all")}
    expected |= {"APs": mean(0, every, "small"), "APl": mean(0, every, "large")}
    expected |= {"AR1": mean(1, every, "all", 1), "AR10": mean(1, every, "all", 10), "ARm": mean(1, every, "medium")}
    assert {name: ours[name] for name in expected} == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert 0.05 < ours["AP"] < 0.95


# --- a COCO package, for which the frames of a video are one tall picture --------------------------------------------


def test_equals_coco_s_package_where_frames_stand_above_each_other():
    """But for crowds, with whose masks COCO measures overlap by another rule."""
    videos = random_videos(12, crowds=False, seed=7)
    images, sides = [{"id": n + 1, "height": T * H, "width": W} for n in range(len(videos))], []
    for side in (1, 0):
        annotations = []
        for number, video in enumerate(videos):
            for entry in video[side]:
                masks = [np.zeros((H, W), bool) if m is None else m for m in entry["segmentations"]]
                (code,) = encode_masks(np.concatenate(masks)[None])
                fields = {"image_id": number + 1, "category_id": entry["category_id"], "iscrowd": 0}
                fields |= {"id": len(annotations) + 1, "segmentation": code, "area": mean_area(entry)}
                annotations.append(fields | {"score": entry.get("score", 0)})
        coco = COCO()
        categories = [{"id": number} | row for number, row in CATEGORIES.items()]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        sides.append(coco)
    evaluation = COCOeval(*sides, "segm")
    evaluation.params.areaRng = [list(limits) for limits in AREAS.values()]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    expected = dict(zip(names, evaluation.stats.tolist(), strict=True))
    ours = computed(videos)
    assert {name: ours[name] for name in names} == pytest.approx(expected, abs=1e-9)


# --- what the figure means, and its state ----------------------------------------------------------------------------


def square(*places, **fields):
    boxes = [None if left is None else (left, 0, 10, 10) for left in places]
    return {"category_id": 3, "segmentations": boxes_to_masks(boxes)} | fields


def test_a_track_that_is_right_in_half_of_the_frames_is_half_right():
    thing = square(0, 0, 0, 0)
    half = square(0, 0, None, None, score=0.9)
    assert computed([([half], [thing])])["AP"] == pytest.approx(0.1), "IoU 0.5 reaches the first of ten thresholds"
    swapped = square(0, 0, 50, 50, score=0.9)
    assert computed([([swapped], [thing])])["AP"] == 0, "wrong frames count as well: IoU 1 / 3"


def test_empty_tracks_are_wrong_and_videos_without_anything_change_nothing():
    thing, right, empty = square(0, 0, 0, 0), square(0, 0, 0, 0, score=0.5), square(None, None, None, None, score=0.9)
    assert computed([([right], [thing]), ([], [])])["AP"] == pytest.approx(1)
    assert computed([([right, empty], [thing])])["AP"] == pytest.approx(0.5)
    assert math.isnan(computed([([right], [])])["AP"])
    assert computed([([right], [thing])])["per_class"][7]["name"] == "dog"


def test_processes_together_give_the_figures_of_one():
    videos = random_videos(8, crowds=True, seed=3)
    metrics = [VideoAveragePrecision(CATEGORIES) for _ in range(2)]
    for number in reversed(range(8)):
        metrics[number % 2].update(*videos[number], video_id=number)
    one, other = (pickle.loads(pickle.dumps(metric)) for metric in metrics)
    one.merge(other)
    assert str(one.compute()) == str(computed(videos)), "to the last digit"
    with pytest.raises(ValueError, match="4 videos were counted in both metrics"):
        one.merge(other)


def test_what_does_not_fit_is_named():
    metric = VideoAveragePrecision(CATEGORIES)
    with pytest.raises(ValueError, match=r"tracks or objects of \[3, 4\] frames"):
        metric.update([square(0, 0, 0, score=1.0)], [square(0, 0, 0, 0)], video_id=1)
    with pytest.raises(ValueError, match=r"the classes \[4\]"):
        metric.update([square(0, category_id=4, score=1.0)], [], video_id=1)
    with pytest.raises(ValueError, match="scores of video 1 are nan"):
        metric.update([square(0, score=math.nan)], [], video_id=1)
    metric.update([], [], video_id=1)
    with pytest.raises(ValueError, match="video_id=1 was counted before"):
        metric.update([], [], video_id=1)
    with pytest.raises(ValueError, match="must be rising numbers"):
        VideoAveragePrecision(CATEGORIES, (10, 1))
