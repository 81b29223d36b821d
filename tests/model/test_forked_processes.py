"""Processes that were forked, as `datasets.map(num_proc=2)` does: torch's threads stayed in the parent."""

import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_model

from mask2former_hf import Mask2FormerImageProcessor, Segmenter, VideoSegmenter

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
IMAGE = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)


@pytest.fixture
def threads():
    """Two, that have begun: a fork leaves them behind."""
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.zeros(2**20).exp()
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def segmenter():
    size = {"shortest_edge": 96, "longest_edge": 160}
    return Segmenter.of(tiny_model("resnet"), Mask2FormerImageProcessor(size=size))


def prepare(segmenter):
    processor = Mask2FormerImageProcessor()
    prepared = processor(IMAGE, np.zeros((300, 400), np.uint8), return_tensors="pt")
    return prepared["pixel_values"].numpy().copy()  # after it the child has its two threads again, and no use for them


def post_process(segmenter):
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(1, 10, 6, generator=generator),
        masks_queries_logits=torch.randn(1, 10, 64, 64, generator=generator),
    )
    return segmenter.processor.post_process_semantic_segmentation(outputs)[0].numpy()


def segment(segmenter):
    rows = segmenter.on_batch({"image": [IMAGE]}, [0], threshold=0.0)
    return np.array(rows["score"])


def segment_in_turn(segmenter):
    return scores(next(segmenter([IMAGE], threshold=0.0)))


def segment_frames(segmenter):
    (frame,) = VideoSegmenter.of(segmenter.model, segmenter.processor)([IMAGE], threshold=0.0)
    return scores(frame)


def scores(result):
    return np.array([segment.score for segment in result.segments])


@pytest.mark.parametrize("work", [prepare, post_process, segment, segment_in_turn, segment_frames])
def test_what_a_forked_process_asks_for_is_computed_there_as_here(work, segmenter, threads):
    expected = work(segmenter)

    def child(pipe):
        pipe.send((work(segmenter), torch.get_num_threads()))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there,), daemon=True)
    process.start()
    found = here.recv() if here.poll(30) else None
    process.kill(), process.join()
    assert found is not None, "it waits for threads that only the parent has"
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    assert found[1] == 2 == torch.get_num_threads()  # what belongs to the process is as it was
