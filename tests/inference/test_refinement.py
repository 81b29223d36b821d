"""Otsu's threshold and the dense CRF: against independent computations, and what they do to results."""

import builtins
import json

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from torch.nn import functional as F

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.cli.main import main
from mask2former_hf.inference.crf import (
    CrfOptions,
    crf_instance_decision,
    crf_panoptic_segmentation,
    crf_semantic_map,
    dense_crf,
    map_of_winners,
)
from mask2former_hf.inference.otsu import otsu_decision, otsu_thresholds
from mask2former_hf.inference.results import segment_outputs
from mask2former_hf.inference.segmenter import Segmenter
from mask2former_hf.model.mask_resizing import resize_mask_logits
from mask2former_hf.model.postprocessing import (
    instance_segmentation,
    panoptic_claims,
    panoptic_segmentation,
    semantic_scores,
)

SIZES = ((96, 128), (90, 120), (135, 180))  # canvas, image, target


@pytest.fixture
def needs_skimage():
    pytest.importorskip("skimage", reason="scikit-image is an extra")


@pytest.fixture
def needs_crf():
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is an extra")


def random_logits(seed=0, queries=12, num_labels=5):
    torch.manual_seed(seed)
    smooth = F.interpolate(torch.randn(1, queries, 6, 8) * 6, size=(24, 32), mode="bilinear")[0]
    return torch.randn(queries, num_labels + 1) * 4, smooth


def two_levels(low, high, share, size=(40, 50), noise=0.02, seed=0):
    """(H, W) probabilities around `low`, and around `high` in the given share of the rows."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.full(size, low)
    mask[: round(size[0] * share)] = high
    return (mask + noise * torch.randn(size, generator=generator)).clamp(0, 1)


def best_threshold(values):
    """Otsu's criterion by brute force: largest w0 w1 (m0 - m1)^2 over all splits of the sorted values."""
    values = np.sort(values.ravel().astype(np.float64))
    count = np.arange(1, len(values))
    sums = np.cumsum(values)[:-1]
    between = count * (len(values) - count) * (sums / count - (values.sum() - sums) / (len(values) - count)) ** 2
    return values[between.argmax()], values[between.argmax() + 1]


@pytest.mark.parametrize("low, high, share", [(0.05, 0.9, 0.3), (0.02, 0.35, 0.1), (0.6, 0.95, 0.5)])
def test_threshold_splits_where_the_variance_between_is_largest(needs_skimage, low, high, share):
    mask = two_levels(low, high, share)
    below, above = best_threshold(mask.numpy())
    found = otsu_thresholds(mask[None])[0].item()
    bin_width = (mask.max() - mask.min()).item() / 256
    assert below - bin_width <= found <= above + bin_width
    assert low < found < high and ((mask > found).float().mean().item()) == pytest.approx(share, abs=0.01)


def test_each_mask_has_its_own_threshold_and_a_flat_one_a_half(needs_skimage):
    from skimage.filters import threshold_otsu

    masks = torch.stack([two_levels(0.1, 0.9, 0.3), two_levels(0.05, 0.3, 0.5), torch.full((40, 50), 0.8)])
    found = otsu_thresholds(masks).tolist()
    assert found[:2] == pytest.approx([threshold_otsu(mask.numpy()) for mask in masks[:2]])
    assert found[2] == 0.5


def logits_of(masks, labels, num_labels=3, confidence=6.0):
    """Queries that are sure of their labels, with masks given as probabilities."""
    class_logits = torch.zeros(len(masks), num_labels + 1)
    class_logits[torch.arange(len(masks)), torch.tensor(labels)] = confidence
    return class_logits, torch.logit(torch.stack(list(masks)), eps=1e-6)


def test_a_hesitant_mask_is_found_by_its_own_threshold(needs_skimage):
    """An object at probability 0.35 on 0.02: nothing above 0.5, all of it above Otsu's threshold."""
    logits = logits_of([two_levels(0.02, 0.35, 0.25, noise=0), two_levels(0.02, 0.9, 0.25, noise=0).flip(0)], [0, 1])
    plain = instance_segmentation(*logits, (40, 50), top_k=2)
    found = instance_segmentation(*logits, (40, 50), top_k=2, decide=otsu_decision())
    areas = dict(zip(found["labels"].tolist(), found["masks"].flatten(1).sum(1).tolist(), strict=True))
    assert areas == {0: 500, 1: 500}
    assert plain["masks"].flatten(1).sum(1).tolist() == [500, 0]
    best = found["labels"].tolist().index(0)
    inside = logits[1][0].sigmoid()[:10].mean() * logits[0].softmax(-1)[0, 0]
    assert found["scores"][best].item() == pytest.approx(inside.item(), rel=1e-3)
    assert found["boxes"][best].tolist() == [0, 0, 50, 10]
    segmentation, segments = panoptic_segmentation(*logits, (40, 50), decide=otsu_decision())
    assert [segment["area"] for segment in segments] == [500, 500] and (segmentation[:10] == 1).all()
    assert len(panoptic_segmentation(*logits, (40, 50))[1]) == 1


def equal_but_for_ties(found, segments, expected, expected_segments, logits) -> bool:
    """Whether two ways of one result have the same segments, and differ in a pixel at most, whose two largest claims
    are equal to 6 digits, so that rounding decides."""

    def without_area(segments):
        return [{name: value for name, value in segment.items() if name != "area"} for segment in segments]

    class_logits, mask_logits = logits
    scores, labels = class_logits.softmax(-1).max(-1)
    is_something = labels < class_logits.shape[1] - 1
    claims = scores[:, None, None] * resize_mask_logits(mask_logits, *SIZES).sigmoid() * is_something[:, None, None]
    differ = found != expected
    first, second = claims[:, differ].topk(2, dim=0).values
    ties = bool((first - second < 1e-6 * first).all())
    return differ.sum() <= 1 and ties and without_area(segments) == without_area(expected_segments)


@pytest.mark.parametrize("seed", range(5))
def test_deciding_by_the_plain_threshold_changes_nothing(seed):
    logits = random_logits(seed)
    options = {"object_mask_threshold": 0.3, "overlap_threshold": 0.4, "stuff_label_ids": {3, 4}}
    expected, expected_segments = panoptic_segmentation(*logits, *SIZES, **options)
    found, segments = panoptic_segmentation(*logits, *SIZES, decide=lambda masks: masks >= 0.5, **options)
    assert equal_but_for_ties(found, segments, expected, expected_segments, logits) and len(segments) > 1
    claims, segments = panoptic_claims(*logits, *SIZES, **options)
    found, segments = map_of_winners(claims.argmax(0), segments)
    assert equal_but_for_ties(found, segments, expected, expected_segments, logits)
    options = {"top_k": 20, "thing_label_ids": {0, 1, 2}, "score_threshold": 0.1}
    expected = instance_segmentation(*logits, *SIZES, **options)
    found = instance_segmentation(*logits, *SIZES, decide=lambda masks: masks > 0.5, **options)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert len(found["scores"]) > 3


def test_nothing_found_stays_nothing(needs_skimage, needs_crf):
    logits = torch.tensor([[0.0, 0.0, 9.0]]), torch.randn(1, 10, 10)
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    for segmentation, segments in (
        panoptic_segmentation(*logits, (40, 40), decide=otsu_decision()),
        crf_panoptic_segmentation(image, *logits, (40, 40)),
    ):
        assert segments == [] and segmentation.shape == (40, 40) and not segmentation.any()
    for decide in (otsu_decision(), crf_instance_decision(image)):
        found = instance_segmentation(*logits, (40, 40), score_threshold=0.5, decide=decide)
        assert found["masks"].shape == (0, 40, 40) and found["boxes"].shape == (0, 4)


def two_coloured_image(size=(40, 60), edge=30):
    image = np.full((*size, 3), 40, dtype=np.uint8)
    image[:, edge:] = 210
    return image


def wavy_scores(size=(40, 60), edge=30, shift=5):
    """Two labels whose border lies `shift` pixels beside the image's edge, and which are unsure near it."""
    x = torch.arange(size[1], dtype=torch.float32).expand(size)
    right = torch.sigmoid((x + 0.5 - edge - shift) / 6)
    return torch.stack([1 - right, right])


def mean_field(image, probabilities, options):
    """The published update computed pixel against pixel, with the kernels normalised as by pydensecrf (symmetric)."""
    N, H, W = probabilities.shape
    y, x = np.mgrid[0:H, 0:W].reshape(2, -1).astype(np.float64)
    colour = image.reshape(-1, 3).astype(np.float64)
    place = ((x[:, None] - x) ** 2 + (y[:, None] - y) ** 2) / 2
    tone = ((colour[:, None] - colour[None]) ** 2).sum(-1) / 2
    kernels = (
        (options.smoothness, np.exp(-place / options.smoothness_reach**2)),
        (
            options.appearance,
            np.exp(-place / options.appearance_reach**2 - tone / options.appearance_colour**2),
        ),
    )
    unary = np.log(np.maximum(probabilities.reshape(N, -1).astype(np.float64), 1e-5))
    q = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(options.steps):
        message = unary.copy()
        for weight, kernel in kernels:
            norm = 1 / np.sqrt(kernel.sum(1))
            message += weight * ((q * norm) @ kernel) * norm
        q = np.exp(message - message.max(0))
        q /= q.sum(0)
    return q.reshape(N, H, W)


def test_crf_is_the_published_mean_field(needs_crf):
    """The library filters on a lattice, so values agree to a few hundredths, not to rounding."""
    rng = np.random.default_rng(0)
    image = two_coloured_image((16, 24), 12) + rng.integers(0, 12, (16, 24, 3), dtype=np.uint8)
    scores = wavy_scores((16, 24), 12, 3)
    options = CrfOptions(smoothness=1.0, appearance=2.0, appearance_reach=10.0, steps=3)
    found = dense_crf(image, scores, options).numpy()
    expected = mean_field(image, scores.numpy(), options)
    assert np.abs(found.sum(0) - 1).max() < 1e-4
    assert np.abs(found - expected).mean() < 0.03
    assert ((found > 0.5) == (expected > 0.5)).mean() > 0.97


def test_crf_moves_the_border_to_the_image_edge(needs_crf):
    image, scores = two_coloured_image(), wavy_scores()
    plain, refined = scores.argmax(0), crf_semantic_map(image, scores)
    truth = torch.zeros(40, 60, dtype=torch.int64)
    truth[:, 30:] = 1
    assert (plain != truth).float().mean() > 0.05 and (refined != truth).float().mean() < 0.01


def test_crf_without_pull_keeps_the_scores(needs_crf):
    scores = torch.rand(3, 20, 30) + 0.01
    refined = dense_crf(np.zeros((20, 30, 3), dtype=np.uint8), scores, CrfOptions(smoothness=0, appearance=0))
    torch.testing.assert_close(refined, scores / scores.sum(0), rtol=1e-4, atol=1e-5)


def test_crops_change_little(needs_crf):
    rng = np.random.default_rng(0)
    image = two_coloured_image((90, 130), 61) + rng.integers(0, 20, (90, 130, 3), dtype=np.uint8)
    scores = wavy_scores((90, 130), 61)
    options = {"appearance_reach": 8.0}
    whole = dense_crf(image, scores, CrfOptions(**options))
    crops = dense_crf(image, scores, CrfOptions(crop=64, overlap=20, **options))
    assert (whole.argmax(0) == crops.argmax(0)).float().mean() > 0.99
    assert (whole - crops).abs().mean() < 0.02


def test_crf_draws_instances_and_panoptic_segments_to_the_edge(needs_crf):
    image, scores = two_coloured_image(), wavy_scores()
    logits = logits_of(scores.clamp(0.001, 0.999), [0, 1])
    found = instance_segmentation(*logits, (40, 60), top_k=2, decide=crf_instance_decision(image))
    truth = torch.zeros(40, 60, dtype=torch.bool)
    truth[:, 30:] = True
    for mask, label in zip(found["masks"], found["labels"].tolist(), strict=True):
        assert (mask != (truth if label else ~truth)).float().mean() < 0.02
    segmentation, segments = crf_panoptic_segmentation(image, *logits, (40, 60))
    assert [segment["label_id"] for segment in segments] == [0, 1]
    assert (segmentation != 1 + truth.int()).float().mean() < 0.02
    assert [segment["area"] for segment in segments] == segmentation.flatten().bincount()[1:].tolist()


def test_a_segment_that_the_crf_takes_away_is_gone():
    winner = torch.tensor([[0, 1], [3, 3]])
    segments = [{"id": i, "label_id": 10 * i, "was_fused": False, "score": 0.9} for i in (1, 2, 3)]
    segmentation, kept = map_of_winners(winner, segments)
    assert segmentation.tolist() == [[0, 1], [2, 2]] and segmentation.dtype == torch.int32
    assert [(s["id"], s["label_id"], s["area"]) for s in kept] == [(1, 10, 1), (2, 30, 2)]


@pytest.mark.parametrize(
    "options, message",
    [({"steps": 0}, "steps=0.*at least 1"), ({"crop": 100, "overlap": 50}, "crop=100, overlap=50.*two overlaps")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrfOptions(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"overlap_threshold": 80}, "overlap_threshold=80"),
        ({"object_mask_threshold": -1}, "object_mask_threshold=-1"),
        ({"image_size": (9, 8)}, "must fit into canvas_size"),
    ],
)
def test_claims_refuse_what_panoptic_results_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        panoptic_claims(torch.zeros(3, 4), torch.zeros(3, 2, 2), (8, 8), **change)


@pytest.mark.parametrize("size", [(3, 40), (1, 64), (4, 50)])
@pytest.mark.parametrize("tta", [False, True])
def test_the_rows_of_a_flat_image_are_not_taken_for_channels(checkpoint, size, tta):
    _, model, processor, _ = checkpoint
    found = Segmenter.of(model, processor, task="semantic", tta=tta)(np.zeros((*size, 3), dtype=np.uint8))
    assert found.size == size


def test_an_image_of_another_size_is_refused(needs_crf):
    with pytest.raises(ValueError, match=r"shape \(20, 30, 3\).*\(40, 60, 3\).*target_size"):
        crf_semantic_map(np.zeros((20, 30, 3), dtype=np.uint8), wavy_scores())


@pytest.mark.parametrize("package, refine", [("skimage", "otsu"), ("pydensecrf", "crf")])
def test_a_missing_package_is_named_with_its_command(monkeypatch, checkpoint, package, refine):
    importing = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    command = {"skimage": "pip install scikit-image", "pydensecrf": "pip install pydensecrf2"}[package]
    with pytest.raises(ImportError, match=command):
        Segmenter.of(*checkpoint[1:3], task="instance", refine=refine)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=20)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    photo = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    with torch.no_grad():  # the queries of a random network say nearly the same; stretch their differences
        head = model.class_predictor
        mean = model(**processor(photo, return_tensors="pt")).class_queries_logits[0].mean(0)
        head.weight *= 40
        head.bias.copy_(40 * (head.bias - mean))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Image.fromarray(photo).save(folder / "photo.png")
    return folder, model, processor, photo


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_unrefined_results_are_the_processors(checkpoint, task):
    _, model, processor, photo = checkpoint
    segmenter = Segmenter.of(model, processor, task=task)
    numbers = {} if task == "semantic" else {"threshold": 0.1}
    found = segmenter(photo, **numbers)
    with torch.no_grad():
        outputs = model(**processor([photo, photo.transpose(1, 0, 2)], return_tensors="pt"))
    sizes = [(60, 90), (90, 60)]
    again = segment_outputs(outputs, segmenter.rules(**numbers), sizes)[0]
    assert (found.map == again.map).all() and found.segments and (found.masks == again.masks).all()
    if task == "semantic":
        scores = semantic_scores(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0, :, :16, :24], (64, 96), (64, 96), (60, 90)
        )
        assert (found.map == scores.argmax(0).numpy()).mean() > 0.999
    elif task == "panoptic":
        expected = processor.post_process_panoptic_segmentation(
            outputs, threshold=0.1, label_ids_to_fuse={3, 4}, target_sizes=sizes
        )[0]
        assert (found.map == expected["segmentation"].numpy()).all()
        assert [s.area for s in found.segments] == [info["area"] for info in expected["segments_info"]]
    else:
        expected = processor.post_process_instance_segmentation(outputs, threshold=0.1, target_sizes=sizes)[0]
        things = [label not in (3, 4) for label in expected["labels"].tolist()]
        assert (found.masks == expected["masks"][things].numpy()).all()


@pytest.mark.parametrize("task, refine", [("panoptic", "otsu"), ("instance", "otsu")])
def test_predict_refines_by_otsu(needs_skimage, checkpoint, tmp_path, task, refine):
    run_predict(checkpoint[0], tmp_path, task, "--refine", refine)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_predict_refines_by_crf(needs_crf, checkpoint, tmp_path, task):
    if task != "semantic":
        return run_predict(checkpoint[0], tmp_path, task, "--refine", "crf")
    folder, model, processor, photo = checkpoint
    arguments = ["predict", folder / "photo.png", "--model", folder, "--task", task, "--output", tmp_path / "out"]
    assert main([*map(str, arguments), "--refine", "crf"]) == 0
    with torch.no_grad():
        outputs = model(**processor(photo, return_tensors="pt"))
    mask_logits, size = outputs.masks_queries_logits[0], outputs.image_sizes[0].tolist()
    scores = semantic_scores(outputs.class_queries_logits[0], mask_logits, size, size, photo.shape[:2])
    written = np.asarray(Image.open(tmp_path / "out" / "semantic" / "photo.png"))
    assert (written == crf_semantic_map(photo, scores).numpy()).mean() > 0.999


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_predict_augments(checkpoint, tmp_path, task):
    run_predict(checkpoint[0], tmp_path, task, "--tta")


def run_predict(folder, output, task, *flags):
    arguments = ["predict", folder / "photo.png", "--model", folder, "--task", task]
    arguments += [] if task == "semantic" else ["--threshold", 0.1]
    assert main([str(part) for part in (*arguments, "--output", output / "plain")]) == 0
    assert main([str(part) for part in (*arguments, "--output", output / "refined", *flags)]) == 0
    names = {"panoptic": "panoptic.json", "instance": "instances.json", "semantic": "semantic/photo.png"}
    plain, refined = ((output / kind / names[task]).read_bytes() for kind in ("plain", "refined"))
    assert plain != refined
    if task != "semantic":
        assert json.loads(refined)


def test_otsu_for_semantic_results_is_refused(checkpoint, tmp_path, capsys):
    folder = checkpoint[0]
    arguments = ["predict", folder / "photo.png", "--model", folder, "--output", tmp_path, "--task", "semantic"]
    assert main([str(part) for part in (*arguments, "--refine", "otsu")]) == 2
    assert "semantic results have no threshold" in capsys.readouterr().err
