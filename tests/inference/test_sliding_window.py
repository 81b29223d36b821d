"""A sliding window gives the scores that Meta's gave, and `Segmenter` takes it where the checkpoint says so."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, needs_golden, tiny_model
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from mask2former_hf import Mask2FormerImageProcessor, Segmenter, VideoSegmenter
from mask2former_hf.data.example import Example
from mask2former_hf.evaluation.evaluator import SegmentationEvaluator, headline, run_evaluation
from mask2former_hf.hub.segmentation_pipeline import Mask2FormerSegmentationPipeline
from mask2former_hf.inference.segmentation import semantic_result
from mask2former_hf.inference.sliding_window import pass_size, sliding_scores, window_scores, windows_of


class Recorded:
    """A model that answers with the recorded logits, window by window."""

    def __init__(self, tensors, number):
        self.logits, self.masks = (tensors[f"pass{number}.window_{name}"] for name in ("logits", "masks"))
        self.seen = []

    def __call__(self, pixel_values):
        n, size = len(self.seen), torch.tensor([pixel_values.shape[-2:]])
        self.seen.append(pixel_values)
        return SimpleNamespace(
            class_queries_logits=self.logits[n : n + 1],
            masks_queries_logits=self.masks[n : n + 1],
            image_sizes=size,
            canvas_sizes=size,
            mask_strides=torch.tensor([4]),
        )


@needs_golden
def test_two_passes_over_the_windows_give_meta_s_classes():
    tensors = load_file(GOLDEN / "vit_adapter" / "sliding_window.safetensors")
    pixels, total = tensors["pixel_values"], 0
    for number in range(2):
        model = Recorded(tensors, number)
        scores = window_scores(model, pixels.flip(-1) if number else pixels, side=32, stride=21)
        assert len(model.seen) == len(model.logits)
        # Meta multiplies classes and masks in bfloat16: up to 0.02 at a scale of 5.8
        assert (scores[None, :, ::4, ::4] - tensors[f"pass{number}.scores_every_fourth"]).abs().max() < 0.03
        scores = F.interpolate(scores[None], size=(45, 61), mode="bilinear", align_corners=False)
        total = total + (scores.flip(-1) if number else scores).softmax(1) / 2
    assert (total[..., ::4, ::4] - tensors["mean_every_fourth"]).abs().max() < 0.01
    assert torch.equal(total.argmax(1), tensors["argmax"].long())


def test_windows_cover_an_image_and_end_with_it():
    assert [window[::2] for window in windows_of((48, 64), 32, 21)] == [
        (0, 0), (0, 21), (0, 32), (16, 0), (16, 21), (16, 32)
    ]  # fmt: skip
    assert windows_of((896, 1200), 896, 596) == [(0, 896, 0, 896), (0, 896, 304, 1200)]
    assert windows_of((832, 1000), 896, 596)[0] == (0, 832, 0, 896)  # a short side whole
    assert windows_of((20, 30), 32, 21) == [(0, 20, 0, 20), (0, 20, 10, 30)]  # both short: squares
    for size in ((97, 33), (64, 64), (31, 200)):
        seen = np.zeros(size)
        for top, bottom, left, right in windows_of(size, 32, 21):
            seen[top:bottom, left:right] += 1
        assert seen.min() >= 1


def test_passes_have_meta_s_sizes():
    size = {"shortest_edge": 896, "longest_edge": 2**15}
    assert [pass_size(size, factor)["shortest_edge"] for factor in (0.9, 0.95, 1.0, 1.05, 1.1)] == [
        832, 864, 896, 940, 985
    ]  # fmt: skip


@pytest.fixture
def windowed():
    model = tiny_model("resnet", task="semantic")
    model.config.sliding_window = {"side": 64, "stride": 40}
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 2**15})
    return model, processor, np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("tta", [False, True])
def test_segmenter_takes_the_windows_of_a_checkpoint_that_names_them(windowed, tta):
    model, processor, image = windowed
    found = Segmenter.of(model, processor, tta=tta)(image).map
    scores = sliding_scores(model, processor, image, (50, 90), model.config.sliding_window, tta)
    assert scores.shape == (5, 50, 90)
    assert np.array_equal(found, semantic_result(scores.argmax(0).numpy(), model.config.id2label).map)
    del model.config.sliding_window
    assert not np.array_equal(Segmenter.of(model, processor, tta=tta)(image).map, found)


def test_an_image_of_one_window_is_the_plain_result(windowed):
    model, processor, image = windowed
    found = Segmenter.of(model, processor)(image[:, :50]).map
    del model.config.sliding_window
    assert np.array_equal(found, Segmenter.of(model, processor)(image[:, :50]).map)


def test_evaluation_measures_what_segmenter_gives(windowed):
    model, processor, image = windowed
    found = Segmenter.of(model, processor)(image)
    segments = [{"id": segment.id + 1, "category_id": segment.label_id} for segment in found.segments]
    example = Example(image, found.map.astype(np.int32) + 1, segments)
    evaluator = SegmentationEvaluator(model.config, processor, ["miou"])
    run_evaluation(model, [[(0, example)]], evaluator, progress=False)
    assert headline(evaluator.compute())["miou"] == 1


def test_pipeline_and_video_give_what_segmenter_gives(windowed):
    model, processor, image = windowed
    images = [image, image[:, ::-1].copy(), image[:, :70].copy()]
    expected = [Segmenter.of(model, processor)(one) for one in images]
    pipe = Mask2FormerSegmentationPipeline(model=model, image_processor=processor)
    pictures = [Image.fromarray(one) for one in images]
    for results in (pipe(pictures), pipe(pictures, batch_size=2)):
        for result, one in zip(results, expected, strict=True):
            assert {s["label"]: np.asarray(s["mask"]).sum() for s in result} == {
                s.label: 255 * (one.map == s.label_id).sum() for s in one.segments
            }
    frames = VideoSegmenter.of(model, processor)(images[:2])
    assert all(np.array_equal(a.map, b.map) for a, b in zip(frames, expected[:2], strict=True))
