"""What goes into a Segmenter, and what a Segmentation is."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor, Segmentation, Segmenter

TASKS = ("panoptic", "instance", "semantic")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=20)
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    with torch.no_grad():  # the queries of a random network say nearly the same; stretch their differences
        head = model.class_predictor
        mean = model(**processor(photo(), return_tensors="pt")).class_queries_logits[0].mean(0)
        head.weight *= 40
        head.bias.copy_(40 * (head.bias - mean))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenters(checkpoint):
    return {task: Segmenter(checkpoint, task=task, device="cpu") for task in TASKS}


def at(task, threshold):
    """The option; semantic results have no threshold."""
    return {} if task == "semantic" else {"threshold": threshold}


def photo(size=(60, 90), seed=0):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def equal(ours: Segmentation, theirs: Segmentation):
    return ours.segments == theirs.segments and (ours.map == theirs.map).all() and (ours.masks == theirs.masks).all()


def test_any_form_of_an_image_gives_the_same(segmenters, tmp_path):
    segmenter, pixels = segmenters["panoptic"], photo()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    expected = segmenter(pixels, threshold=0.1)
    assert expected.segments and expected.size == (60, 90)
    for image in (
        Image.fromarray(pixels),
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        stream.getvalue(),
        torch.from_numpy(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        Image.fromarray(pixels).convert("RGBA"),
    ):
        assert equal(segmenter(image, threshold=0.1), expected)


def test_a_url_is_downloaded(segmenters, tmp_path, monkeypatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    stream = io.BytesIO()
    Image.fromarray(photo()).save(stream, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(stream.getvalue())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.handle_request, daemon=True).start()
    try:
        found = segmenters["panoptic"](f"http://127.0.0.1:{server.server_port}/photo.png", threshold=0.1)
    finally:
        server.server_close()
    assert equal(found, segmenters["panoptic"](photo(), threshold=0.1))


@pytest.mark.parametrize("task", TASKS)
def test_many_images_of_mixed_sizes_come_lazily_and_as_alone(segmenters, task):
    segmenter = segmenters[task]
    images = [photo((60, 90), 0), photo((90, 60), 1), photo((64, 64), 2)]
    drawn = []

    def source():
        for image in images:
            drawn.append(image)
            yield image

    results = segmenter(source(), batch_size=2, **at(task, 0.1))
    first = next(results)
    assert len(drawn) == 2
    for ours, image in zip([first, *results], images, strict=True):
        alone = segmenter(image, **at(task, 0.1))
        assert ours.size == image.shape[:2] and [s.label for s in ours.segments] == [s.label for s in alone.segments]
        assert (ours.map == alone.map).mean() > 0.999


def test_a_segmenter_travels_without_its_weights_and_a_process_loads_them_once(segmenters):
    segmenter = segmenters["instance"]
    sent = pickle.dumps(segmenter)
    assert len(sent) < 10_000
    one, two = pickle.loads(sent), pickle.loads(sent)
    assert equal(one(photo(), threshold=0.1), segmenter(photo(), threshold=0.1))
    assert one.model is two.model and one.model is not segmenter.model
    made = Segmenter.of(segmenter.model, segmenter.processor, task="instance")
    assert equal(pickle.loads(pickle.dumps(made))(photo(), threshold=0.1), one(photo(), threshold=0.1))


def test_what_is_no_image_is_refused(segmenters, tmp_path):
    segmenter = segmenters["panoptic"]
    with pytest.raises(TypeError, match="images is a int: give a PIL image"):
        segmenter(7)
    with pytest.raises(OSError, match="none.png"):
        segmenter(tmp_path / "none.png")
    with pytest.raises(OSError, match=r"a folder, .*give .* files"):
        segmenter(tmp_path)
    with pytest.raises(ValueError, match="image is float32"):
        segmenter(np.zeros((8, 8, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="threshold=2 must lie between 0 and 1"):
        segmenter(photo(), threshold=2)
    with pytest.raises(ValueError, match="batch_size=0"):
        segmenter([photo()], batch_size=0)


def test_bad_options_are_refused_before_the_first_image(checkpoint):
    with pytest.raises(ValueError, match="task='detection': must be one of"):
        Segmenter(checkpoint, task="detection", device="cpu")
    with pytest.raises(ValueError, match="refine='sharp': must be one of otsu, crf"):
        Segmenter(checkpoint, refine="sharp", device="cpu")
    with pytest.raises(ValueError, match="device='abacus'"):
        Segmenter(checkpoint, device="abacus")
    with pytest.raises(ValueError, match="no/such-model: no checkpoint found"):
        Segmenter("no/such-model", device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_segments_describe_the_map_and_the_masks(segmenters, task):
    result = segmenters[task](photo(), **at(task, 0.05))
    assert result.segments and result.masks.shape == (len(result.segments), 60, 90) and result.masks.dtype == bool
    for segment, mask in zip(result.segments, result.masks, strict=True):
        rows, columns = np.nonzero(mask)
        assert segment.area == len(rows)
        assert segment.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert segment.label == f"LABEL_{segment.label_id}"
        if task != "instance":
            assert (mask == (result.map == segment.id)).all()
    if task == "instance":
        scores = [segment.score for segment in result.segments]
        assert scores == sorted(scores, reverse=True) and not {s.label_id for s in result.segments} & {3, 4}
        top = np.zeros((60, 90), dtype=int)
        for segment, mask in zip(result.segments[::-1], result.masks[::-1], strict=True):
            top[mask] = segment.id
        assert (top == result.map).all()
    else:
        assert result.masks.sum(0).max() == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_result_is_immutable_and_can_be_sent_to_another_process(segmenters, task):
    result = segmenters[task](photo(), **at(task, 0.05))
    with pytest.raises(AttributeError):
        result.task = "other"
    with pytest.raises(ValueError, match="read-only"):
        result.map[0, 0] = 7
    assert equal(pickle.loads(pickle.dumps(result)), result)


@pytest.mark.parametrize("task", TASKS)
def test_coco_entries_are_json_that_pycocotools_reads(segmenters, task):
    decode = pytest.importorskip("pycocotools.mask").decode
    result = segmenters[task](photo(), **at(task, 0.05))
    entries = json.loads(json.dumps(result.to_coco(image_id=5)))
    assert len(entries) == len(result.segments)
    for entry, segment, mask in zip(entries, result.segments, result.masks, strict=True):
        assert (decode(entry["segmentation"]) == mask).all() and entry["area"] == segment.area
        left, top, right, bottom = segment.box
        assert entry["bbox"] == [left, top, right - left, bottom - top] and entry["image_id"] == 5
        assert entry["category_id"] == segment.label_id and entry.get("score") == segment.score


def test_only_panoptic_results_have_cocos_panoptic_form(segmenters):
    picture, segments = segmenters["panoptic"](photo(), threshold=0.05).to_coco_panoptic()
    assert picture.mode == "RGB" and picture.size == (90, 60) and segments
    with pytest.raises(ValueError, match="only panoptic results"):
        segmenters["instance"](photo()).to_coco_panoptic()


@pytest.mark.parametrize("task", TASKS)
def test_plot_draws_on_the_image_or_on_grey_also_without_a_segment(segmenters, task, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    for threshold in (0.05, 1.0):
        result = segmenters[task](photo(), **at(task, threshold))
        for image in (None, photo(), Image.fromarray(photo()), tmp_path / "photo.png"):
            assert result.plot(image).mode == "RGB"
