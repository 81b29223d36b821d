"""Videos through models of clips and of images: ids that stay, windows, bounded memory."""

import copy
import resource

import numpy as np
import pytest
import torch
from helpers import randomise, tiny_config

from mask2former_hf import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerVideoProcessor,
    Segmenter,
    VideoSegmenter,
)
from mask2former_hf.inference import results
from mask2former_hf.inference.exported import REPORT
from mask2former_hf.inference.tracking import Tracker, mask_iou
from mask2former_hf.model.postprocessing import logits_per_image


def moving(length, size=(48, 64), seed=0):
    """Noise that drifts to the right."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[0], size[1] + length, 3), np.uint8)
    return [noise[:, t : t + size[1]] for t in range(length)]


@pytest.fixture(scope="module")
def clips():
    model = randomise(Mask2FormerForVideoSegmentation(tiny_config("resnet", task="instance", decoder_layers=2)))
    model.class_predictor.weight.data *= 6
    return model.eval(), Mask2FormerVideoProcessor(size={"shortest_edge": 48, "longest_edge": 64})


@pytest.fixture(scope="module")
def images():
    config = tiny_config("resnet", task="panoptic", stuff_label_ids=[3, 4], num_queries=20, decoder_layers=2)
    model = randomise(Mask2FormerForUniversalSegmentation(config), seed=2)  # one that finds several classes
    model.class_predictor.weight.data *= 6
    return model.eval(), Mask2FormerImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})


def test_clips_whose_logits_overflow_are_refused(clips):
    model = copy.deepcopy(clips[0])
    model.class_predictor.bias.data[2] = torch.inf
    stream = VideoSegmenter.of(model, clips[1]).stream()
    with pytest.raises(ValueError, match="class_logits has values that are not numbers, or are infinite"):
        [stream.push(frame) for frame in moving(3)], stream.finish()


# --- which object is which -------------------------------------------------------------------------------------------


def box(left, width=4, length=20):
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, left : left + width] = True
    return mask


A, B = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])


def test_objects_that_meet_are_told_apart_by_their_look():
    tracker = Tracker()
    assert tracker.update(torch.cat([A, B]), [0, 0], torch.cat([box(2), box(6)])) == [1, 2]
    assert tracker.update(torch.cat([B, A]), [0, 0], torch.cat([box(4), box(4)])) == [2, 1]


def test_objects_of_one_look_are_told_apart_by_their_places():
    tracker = Tracker()
    tracker.update(torch.cat([A, A]), [0, 0], torch.cat([box(2), box(10)]))
    assert tracker.update(torch.cat([A, A]), [0, 0], torch.cat([box(11), box(3)])) == [2, 1]


def test_a_hidden_object_gets_its_id_back_and_a_new_one_a_new_id():
    tracker = Tracker(patience=3)
    tracker.update(torch.cat([A, B]), [0, 0], torch.cat([box(2), box(10)]))
    for _ in range(3):
        assert tracker.update(B, [0], box(10)) == [2]
    assert tracker.update(torch.cat([A, torch.tensor([[0.0, 0.0, 1.0]])]), [0, 0], torch.cat([box(15), box(2)])) == [
        1,
        3,
    ]
    for _ in range(4):
        tracker.update(B[:0], [], box(0)[:0])
    assert tracker.update(A, [0], box(15)) == [4], "after its patience a track has ended, and its id is not used again"
    assert not any(track.age > 3 for track in tracker.tracks)


def test_a_tracker_goes_on_from_its_saved_state(tmp_path):
    torch.manual_seed(0)
    steps = [(torch.randn(4, 8), [0, 1, 2, 0], torch.rand(4, 50) > 0.5) for _ in range(6)]
    whole, part = Tracker(), Tracker()
    expected = [whole.update(*step) for step in steps]
    for step in steps[:3]:
        part.update(*step)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    again = Tracker()
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert [again.update(*step) for step in steps[3:]] == expected[3:]


def test_mask_iou_of_empty_masks_is_zero():
    masks = torch.cat([box(2), box(4), box(0, 0)])
    torch.testing.assert_close(mask_iou(masks, masks), torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]]))


# --- models of clips -------------------------------------------------------------------------------------------------


def test_a_video_within_the_window_is_what_post_processing_says(clips):
    model, processor = clips
    frames = moving(4)
    with torch.no_grad():
        outputs = model(**processor(frames, return_tensors="pt"))
    (expected,) = processor.post_process_video_instance_segmentation(outputs, target_sizes=[(48, 64)])
    results = list(VideoSegmenter.of(model, processor, window=4, overlap=1)(frames, threshold=0.0))
    assert len(results) == 4
    for t, result in enumerate(results):
        seen = [n for n, mask in enumerate(expected["masks"][:, t]) if mask.any()]
        assert [segment.id for segment in result.segments] == [n + 1 for n in seen]
        assert [segment.score for segment in result.segments] == expected["scores"][seen].tolist()
        assert np.array_equal(result.masks, expected["masks"][seen, t].numpy())


@pytest.mark.parametrize("length", [1, 3, 4, 5, 11])
def test_every_frame_gets_one_result_in_order(clips, length):
    model, processor = clips
    segmenter = VideoSegmenter.of(model, processor, window=4, overlap=1)
    results = list(segmenter(moving(length), threshold=0.0))
    assert len(results) == length and all(result.size == (48, 64) for result in results)
    assert all(len({s.id for s in result.segments}) == len(result.segments) for result in results)


def test_objects_are_linked_across_windows(clips):
    """Of a picture that stands still, every window says the same."""
    model, processor = clips
    still = moving(1) * 13
    results = list(VideoSegmenter.of(model, processor, window=4, overlap=2)(still, threshold=0.0))
    ids = {tuple(segment.id for segment in result.segments) for result in results[:12]}
    assert max(max(i) for i in ids) <= 10, "no object was born twice"


def test_memory_does_not_grow_with_the_number_of_frames(clips):
    model, processor = clips
    segmenter, (frame,) = VideoSegmenter.of(model, processor, window=4, overlap=1), moving(1, (240, 320))
    stream, peaks = segmenter.stream(threshold=0.0), []
    for number in range(90):
        stream.push(frame)
        if number in (30, 89):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(stream.frames) == 4 and len(stream.tracker.tracks) <= 200
    assert peaks[1] - peaks[0] < 10_000, "kilobytes; the frames alone have 13,600"


# --- models of images ------------------------------------------------------------------------------------------------


def test_things_are_tracked_and_stuff_is_known_by_its_class(images):
    segmenter, numbers = VideoSegmenter.of(*images), {"threshold": 0.2, "overlap_threshold": 0.0}
    (first,) = segmenter(moving(1), stuff_label_ids=[], **numbers)
    stuff = first.segments[0].label_id
    assert {segment.label_id for segment in first.segments} != {stuff}
    results, owners = list(segmenter(moving(4), stuff_label_ids=[stuff], **numbers)), {}
    for result in results:
        assert set(np.unique(result.map)) - {0} == {segment.id for segment in result.segments}
        for segment in result.segments:
            owners.setdefault(segment.label_id == stuff, set()).add(segment.id)
    assert len(owners[True]) == 1 and owners[False] and not owners[True] & owners[False]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_video_that_stands_still_has_one_set_of_ids(images, task):
    model, processor = images
    numbers = {"threshold": 0.2, "overlap_threshold": 0.0}
    results = list(VideoSegmenter.of(model, processor, task=task)(moving(1) * 3, **numbers))
    first = [(segment.id, segment.area) for segment in results[0].segments]
    assert len(first) > 1
    assert all([(segment.id, segment.area) for segment in result.segments] == first for result in results)


def test_a_stream_goes_on_from_its_saved_state(images, tmp_path):
    segmenter, frames = VideoSegmenter.of(*images), moving(5)
    whole, first, second = (segmenter.stream(threshold=0.3) for _ in range(3))
    expected = [[s.id for s in whole.push(frame)[0].segments] for frame in frames]
    ids = [[s.id for s in first.push(frame)[0].segments] for frame in frames[:2]]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert ids + [[s.id for s in second.push(frame)[0].segments] for frame in frames[2:]] == expected
    assert second.seen == whole.seen, "the mean scores of objects are those of the whole video"


def test_the_query_of_a_panoptic_segment_is_the_one_whose_mask_it_is(images):
    """By pixels: of all queries, that one claims the segment."""
    model, processor = images
    frame = moving(1)[0]
    with torch.no_grad():
        (logits,) = logits_per_image(model(**processor([frame], return_tensors="pt")), [(48, 64)])
    rules = VideoSegmenter.of(*images).rules(threshold=0.2, overlap_threshold=0.0, stuff_label_ids=[])
    result, queries = results.panoptic_and_queries(logits, rules)
    scores = logits[0].softmax(-1)[:, :-1].amax(-1)
    for segment, query in zip(result.segments, queries, strict=True):
        assert scores[query].item() == pytest.approx(segment.score)
    assert len(set(queries)) == len(queries) > 1


def test_semantic_frames_are_what_images_are(images, monkeypatch):
    """Also of a checkpoint with a sliding window."""
    model, processor = images[0], Mask2FormerImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    (frame,), windows, slide = moving(1, (96, 128)), [], results.sliding_scores
    monkeypatch.setattr(results, "sliding_scores", lambda *args: windows.append(args[4]) or slide(*args))
    monkeypatch.setattr(model.config, "sliding_window", {"side": 64, "stride": 48}, raising=False)
    (video,) = VideoSegmenter.of(model, processor, task="semantic")([frame])
    assert windows == [{"side": 64, "stride": 48}]
    assert np.array_equal(video.map, Segmenter.of(model, processor, task="semantic")(frame).map)


# --- doors -----------------------------------------------------------------------------------------------------------


def test_the_checkpoint_says_which_model_it_is(clips, images, tmp_path):
    for part in clips:
        part.save_pretrained(tmp_path / "clips")
    for part in images:
        part.save_pretrained(tmp_path / "images")
    assert VideoSegmenter(tmp_path / "clips").of_clips and not VideoSegmenter(tmp_path / "images").of_clips
    with pytest.raises(ValueError, match="models of clips have 'instance' alone"):
        VideoSegmenter(tmp_path / "clips", task="panoptic")
    (tmp_path / "clips" / REPORT).write_text("{}")
    with pytest.raises(ValueError, match="is an export, .* give the checkpoint that it was made of"):
        VideoSegmenter(tmp_path / "clips")


def test_what_does_not_fit_is_named(clips, images):
    for name, value in (("overlap_threshold", 0.5), ("stuff_label_ids", [1])):
        with pytest.raises(ValueError, match=f"{name}=.*: is for models of images"):
            VideoSegmenter.of(*clips).stream(**{name: value})
    with pytest.raises(ValueError, match="window=3, overlap=3: windows must share fewer frames"):
        VideoSegmenter.of(*clips, window=3, overlap=3)
    stream = VideoSegmenter.of(*images).stream()
    stream.push(moving(1)[0])
    with pytest.raises(ValueError, match="a frame is 32x64, those before are 48x64"):
        stream.push(moving(1, (32, 64))[0])
    assert list(VideoSegmenter.of(*clips)([])) == []
