"""Results from logits, against a literal NumPy reading of the original's rules; test_golden_results has its own."""

import numpy as np
import pytest
import torch

from mask2former_hf.model import mask_resizing, panoptic_rules, postprocessing
from mask2former_hf.model.mask_resizing import resize_mask_logits
from mask2former_hf.model.mask_windows import MaskWindows
from mask2former_hf.model.postprocessing import (
    instance_segmentation,
    masks_to_boxes,
    panoptic_segmentation,
    semantic_map,
    semantic_scores,
)

# --- a literal NumPy reading of the rules ----------------------------------------------------------------------------


def random_logits(seed, queries=9, classes=5, size=(7, 9)):
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(queries, classes + 1, generator=generator) * 4
    coarse = torch.randn(1, queries, 4, 5, generator=generator) * 6
    masks = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
    return class_logits, masks, (28, 36), (25, 33), (31, 29)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def literal_panoptic(class_logits, masks, object_threshold, overlap, mask_threshold, stuff):
    """The original's loop, pixel by pixel and query by query; masks are probabilities at the target size."""
    probabilities = softmax(class_logits)
    kept = []
    for query, row in enumerate(probabilities):
        label = int(row.argmax())
        if label != len(row) - 1 and row[label] > object_threshold:
            kept.append((query, label, row[label]))
    height, width = masks.shape[1:]
    result, segments, stuff_ids = np.zeros((height, width), int), [], {}
    if not kept:
        return result, segments
    owner = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            owner[y, x] = int(np.argmax([score * masks[query, y, x] for query, _, score in kept]))
    for k, (query, label, _) in enumerate(kept):
        mine, mask = owner == k, masks[query] >= mask_threshold
        final = mine & mask
        if mine.sum() == 0 or mask.sum() == 0 or final.sum() == 0 or mine.sum() / mask.sum() < overlap:
            continue
        if label in stuff_ids:
            result[final] = stuff_ids[label]
            continue
        segments.append((len(segments) + 1, label))
        if label in stuff:
            stuff_ids[label] = len(segments)
        result[final] = len(segments)
    return result, segments


@pytest.mark.parametrize("seed", range(12))
def test_panoptic_equals_a_literal_reading_of_the_rules(seed):
    logits = random_logits(seed)
    masks = resize_mask_logits(*logits[1:]).sigmoid().numpy()
    for object_threshold, overlap, mask_threshold in (
        (0.0, 0.0, 0.5),
        (0.4, 0.6, 0.5),
        (0.5, 0.8, 0.3),
        (0.99, 0.8, 0.5),
    ):
        settings = {"object_mask_threshold": object_threshold, "overlap_threshold": overlap}
        expected, entries = literal_panoptic(
            logits[0].numpy(), masks, object_threshold, overlap, mask_threshold, {3, 4}
        )
        result, segments = panoptic_segmentation(
            *logits, **settings, mask_threshold=mask_threshold, stuff_label_ids={3, 4}
        )
        np.testing.assert_array_equal(result.numpy(), expected)
        assert [(s["id"], s["label_id"]) for s in segments] == entries
        assert [s["area"] for s in segments] == [(expected == s["id"]).sum() for s in segments]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mask_threshold", [0.5, 0.2])
def test_instances_equal_a_literal_reading_of_the_rules(seed, mask_threshold):
    logits = random_logits(seed)
    masks = resize_mask_logits(*logits[1:]).double().numpy()
    pairs = softmax(logits[0].double().numpy())[:, :-1]
    best = sorted(((p, q, c) for q, row in enumerate(pairs) for c, p in enumerate(row)), reverse=True)[:20]
    expected = []
    for probability, query, label in best:
        mask = masks[query] > np.log(mask_threshold / (1 - mask_threshold))
        inside = (1 / (1 + np.exp(-masks[query])))[mask]
        expected.append((probability * inside.sum() / (mask.sum() + 1e-6), label, mask))
    expected = sorted(expected, key=lambda entry: -entry[0])
    result = instance_segmentation(*logits, top_k=20, mask_threshold=mask_threshold)
    np.testing.assert_allclose(result["scores"].numpy(), [entry[0] for entry in expected], rtol=1e-4, atol=1e-6)
    found = [entry for entry in expected if entry[0] > 1e-3]  # below, ties of empty masks have no order
    assert result["labels"][: len(found)].tolist() == [entry[1] for entry in found]
    np.testing.assert_array_equal(result["masks"][: len(found)].numpy(), [entry[2] for entry in found])
    high = instance_segmentation(*logits, top_k=20, mask_threshold=mask_threshold, score_threshold=0.3)
    assert high["scores"].tolist() == pytest.approx([score for score in result["scores"].tolist() if score >= 0.3])


# --- the rules one by one --------------------------------------------------------------------------------------------


def painted(labels, areas, size=(8, 8), classes=4, certainty=9.0, strength=9.0):
    """Queries with a certain class each and a mask that is one block of rows (start, stop)."""
    class_logits = torch.zeros(len(labels), classes + 1)
    class_logits[torch.arange(len(labels)), torch.tensor(labels)] = certainty
    masks = torch.full((len(labels), *size), -strength)
    for mask, (start, stop) in zip(masks, areas, strict=True):
        mask[start:stop] = strength
    return class_logits, masks, size  # the canvas has the masks' size, so nothing is resized


def test_segment_ids_are_unique_after_a_fused_class_returns():
    logits = painted([0, 1, 0, 2], [(0, 2), (2, 4), (4, 6), (6, 8)])
    result, segments = panoptic_segmentation(*logits, stuff_label_ids={0})
    assert [(s["id"], s["label_id"]) for s in segments] == [(1, 0), (2, 1), (3, 2)]
    assert result[:, 0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3]


def test_fused_stuff_has_one_entry():
    logits = painted([0, 0, 0], [(0, 2), (3, 5), (6, 8)])
    _, segments = panoptic_segmentation(*logits, stuff_label_ids={0})
    assert len(segments) == 1
    assert segments[0]["was_fused"] and segments[0]["area"] == 6 * 8
    assert len(panoptic_segmentation(*logits)[1]) == 3


def test_pixels_without_a_mask_above_one_half_are_void():
    result, segments = panoptic_segmentation(*painted([0, 1], [(0, 2), (2, 4)]))
    assert len(segments) == 2
    assert (result[4:] == 0).all() and (result[:4] > 0).all()


def test_the_overlap_area_is_of_the_unweighted_mask():
    # Class probability .65 × mask probability .7 is below .5: a weighted area would be empty and drop the segment.
    class_logits = torch.tensor([[0.65, 0.35]]).log()
    mask_logits = torch.full((1, 4, 4), 0.7).logit()
    _, segments = panoptic_segmentation(class_logits, mask_logits, (4, 4), object_mask_threshold=0.5)
    assert [s["area"] for s in segments] == [16]


def test_a_segment_survives_at_exactly_the_overlap_threshold():
    class_logits, masks, size = painted([0, 1], [(0, 5), (3, 7)])
    class_logits[0, 0] = 20.0  # the first owns the two rows of overlap: the second keeps 2 of its 4, and two below .5
    masks[:, 7:] = -60.0
    masks[1, 7:] = -80.0
    for threshold, count in ((0.5, 2), (0.51, 1)):
        assert len(panoptic_segmentation(class_logits, masks, size, overlap_threshold=threshold)[1]) == count


def limit_chunks(monkeypatch, limit):
    """Work on so many float32 at a time."""
    for module in (mask_resizing, postprocessing):
        monkeypatch.setattr(module, "chunk_length", lambda elements, device: max(1, limit // elements))


def test_a_score_of_exactly_the_threshold_is_dropped():
    class_logits = torch.tensor([[0.0, 0.0, -1e4]])  # probability one half, exactly
    masks = torch.ones(1, 4, 4)
    assert panoptic_segmentation(class_logits, masks, (4, 4), object_mask_threshold=0.5)[1] == []
    assert len(panoptic_segmentation(class_logits, masks, (4, 4), object_mask_threshold=0.499)[1]) == 1


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_the_first_of_equal_queries_owns_the_pixel(chunk, monkeypatch):
    limit_chunks(monkeypatch, chunk)
    result, segments = panoptic_segmentation(*painted([2, 1, 0], [(0, 8)] * 3))
    assert [s["label_id"] for s in segments] == [2]
    assert (result == 1).all()


def test_nothing_found_is_all_void_and_no_entries():
    class_logits = torch.tensor([[0.0, 9.0]])
    result, segments = panoptic_segmentation(class_logits, torch.ones(1, 2, 2), (8, 8), (5, 6), (7, 3))
    assert segments == [] and result.shape == (7, 3) and result.dtype == torch.int32 and not result.any()
    found = instance_segmentation(class_logits, torch.ones(1, 2, 2), (8, 8), score_threshold=0.5)
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "masks": (0, 8, 8),
        "scores": (0,),
        "labels": (0,),
        "boxes": (0, 4),
        "queries": (0,),
    }


def test_an_object_keeps_its_size_when_the_canvas_is_padded():
    mask = torch.full((1, 16, 64), -9.0)
    mask[:, 4:12, 4:12] = 9.0  # 32 px of a 64 × 64 image inside a 64 × 256 canvas
    found = instance_segmentation(torch.tensor([[9.0, 0.0]]), mask, (64, 256), (64, 64), (64, 64))
    assert found["boxes"].tolist() == [[16.0, 16.0, 48.0, 48.0]]


def test_thin_structures_survive_because_logits_are_resized_before_the_threshold():
    # A diagonal line of one cell at stride 4 of a 1024 canvas: a detour over 384 × 384 and nearest would break it up.
    mask = torch.full((256, 256), -4.0).fill_diagonal_(4.0)
    found = instance_segmentation(torch.tensor([[9.0, 0.0]]), mask[None], (1024, 1024), None, (1000, 1000))
    exact = torch.nn.functional.interpolate(mask[None, None], size=(1024, 1024), mode="bilinear")
    exact = torch.nn.functional.interpolate(exact, size=(1000, 1000), mode="bilinear")[0] > 0
    assert torch.equal(found["masks"], exact)
    assert found["masks"][0].diagonal().float().mean() > 0.99


def test_the_mask_threshold_acts():
    mask = torch.linspace(-4, 4, 64).view(1, 1, 64).repeat(1, 8, 1)
    areas = [
        int(instance_segmentation(torch.tensor([[9.0, 0.0]]), mask, (8, 64), mask_threshold=t)["masks"].sum())
        for t in (0.0, 0.1, 0.5, 0.9, 1.0)
    ]
    assert areas == sorted(areas, reverse=True) and areas[0] == 512 and areas[2] == 256 and areas[-1] == 0


def test_instances_overlap_and_a_query_may_have_several_classes():
    class_logits, masks, size = painted([0, 1], [(0, 6), (2, 8)], classes=2)
    found = instance_segmentation(class_logits, masks, size)  # top_k is cut to the 4 pairs there are
    assert len(found["scores"]) == 4
    assert found["masks"].sum(0).max() == 4
    assert sorted(found["labels"].tolist()) == [0, 0, 1, 1]


def test_every_query_is_resized_once(monkeypatch):
    rows = []
    original = mask_resizing.resize_mask_logits
    monkeypatch.setattr(
        mask_resizing, "resize_mask_logits", lambda masks, *a: (rows.append(len(masks)), original(masks, *a))[1]
    )
    in_windows = MaskWindows.of
    monkeypatch.setattr(MaskWindows, "of", lambda self, logits: (rows.append(1), in_windows(self, logits))[1])
    for decide in (None, lambda masks: masks > 0.5):
        rows.clear()
        instance_segmentation(*random_logits(0), top_k=45, decide=decide)
        assert sum(rows) == 9


@pytest.mark.parametrize("threshold", [0.5, 0.1, 0.999])
def test_instances_are_the_same_whether_every_pixel_is_looked_at_or_those_that_a_mask_can_reach(threshold):
    """Empty masks, masks beyond the image, padded canvases, enlarged, reduced and equal sizes are among them."""
    generator = torch.Generator().manual_seed(0)
    sizes = [((60, 80), (48, 80), (300, 201)), ((60, 80), (59, 33), (20, 7)), ((60, 80), (60, 70), None), ((15, 20),)]
    for canvas, *others in sizes:
        masks = 4 * torch.randn(12, 15, 20, generator=generator) - torch.arange(12).view(-1, 1, 1)
        masks[3], masks[4, :-1], masks[5] = -50, -50, 50
        logits = torch.randn(12, 3, generator=generator)
        plain = instance_segmentation(logits, masks, canvas, *others, mask_threshold=threshold)
        point = torch.tensor(threshold, dtype=torch.float64).logit().item()
        resized = resize_mask_logits(masks, canvas, *others)[plain["queries"]]
        expected = resized > point
        assert torch.equal(plain["masks"], expected) and torch.equal(plain["boxes"], masks_to_boxes(expected))
        mean = (resized.sigmoid() * expected).sum((1, 2), dtype=torch.float64) / (expected.sum((1, 2)) + 1e-6)
        classes = logits.softmax(-1)[plain["queries"], plain["labels"]]
        torch.testing.assert_close(plain["scores"], (classes * mean).float(), rtol=1e-5, atol=1e-7)


def test_half_precision_logits_are_read_as_float32():
    class_logits, masks, *sizes = random_logits(3)
    for dtype in (torch.float16, torch.bfloat16):
        half = (class_logits.to(dtype), masks.to(dtype))
        expected = panoptic_segmentation(half[0].float(), half[1].float(), *sizes, object_mask_threshold=0.2)
        result = panoptic_segmentation(*half, *sizes, object_mask_threshold=0.2)
        assert torch.equal(result[0], expected[0]) and result[1] == expected[1]
        assert semantic_scores(*half, *sizes).dtype == torch.float32


def test_the_inputs_are_left_untouched():
    class_logits, masks, *_ = random_logits(1)
    before = class_logits.clone(), masks.clone()
    for function in (semantic_map, panoptic_segmentation, instance_segmentation):
        function(class_logits, masks, masks.shape[1:])
    assert torch.equal(before[0], class_logits) and torch.equal(before[1], masks)


@pytest.mark.parametrize("target", [(61, 47), (17, 90), (25, 33)])
@pytest.mark.parametrize("first", [True, False])
def test_chunks_do_not_change_results(target, first, monkeypatch):
    logits = (*random_logits(5)[:4], target)
    whole = [function(*logits) for function in (panoptic_segmentation, instance_segmentation)]
    scores = semantic_scores(*logits, resize_masks_first=first)
    for chunk in (1, 10_000):
        limit_chunks(monkeypatch, chunk)
        panoptic, instances = (function(*logits) for function in (panoptic_segmentation, instance_segmentation))
        assert torch.equal(panoptic[0], whole[0][0]) and panoptic[1] == whole[0][1]
        assert torch.equal(instances["masks"], whole[1]["masks"])
        torch.testing.assert_close(instances["scores"], whole[1]["scores"])
        torch.testing.assert_close(semantic_scores(*logits, resize_masks_first=first), scores, rtol=1e-6, atol=1e-6)
        assert (semantic_map(*logits, resize_masks_first=first) == scores.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"canvas_size": (0, 8)}, "canvas_size"),
        ({"target_size": 8}, "target_size=8 must be two"),
        ({"score_threshold": -1}, "score_threshold=-1"),
        ({"image_size": (9, 8)}, "must fit into canvas_size"),
        ({"mask_threshold": 1.5}, "mask_threshold=1.5"),
        ({"mask_logits": torch.zeros(1, 3, 2, 2)}, "index the batch first"),
        ({"top_k": 0}, "top_k=0"),
        ({"class_logits": torch.full((3, 4), float("nan"))}, "class_logits has values that are not numbers"),
        ({"mask_logits": torch.full((3, 2, 2), float("nan"))}, "mask_logits has values that are not numbers"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    arguments = {"class_logits": torch.zeros(3, 4), "mask_logits": torch.zeros(3, 2, 2), "canvas_size": (8, 8)}
    with pytest.raises(ValueError, match=words):
        instance_segmentation(**(arguments | change))


# --- work on CPUs ----------------------------------------------------------------------------------------------------


def test_queries_heard_in_turn_share_the_pixels_as_queries_heard_at_once(monkeypatch):
    """What CPUs do in place, and what other devices and exported graphs do; ties and several blocks included."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.9, 0.8, 0.9, 0.81, 0.9])
    logits = torch.randint(-3, 4, (5, 40, 50), generator=generator).float()
    logits[2, :20] = logits[0, :20]
    monkeypatch.setattr(panoptic_rules, "CACHED", 300)

    def found():
        chunks = [(0, logits[:2]), (2, logits[2:])]
        return panoptic_rules.contest(scores, chunks, (40, 50), lambda masks: masks >= 0.5)

    in_turn = found()
    monkeypatch.setattr(panoptic_rules, "_on_cpu", lambda x: False)
    for one, other in zip(in_turn, found(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
