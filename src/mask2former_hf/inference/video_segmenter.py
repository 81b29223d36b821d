"""Segment videos: frames in, one `Segmentation` per frame out, in which an object keeps its id."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ..model.argument_checks import check_logits
from ..model.channels import image_channels, model_channels
from ..model.forked_processes import one_thread_if_forked
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from ..model.postprocessing import logits_per_image, stack_instances
from ..model.video_postprocessing import MAX_TRACKS, best_pairs, resized_masks
from ..model.video_processing_mask2former import Mask2FormerVideoProcessor
from .exported import is_exported
from .loading import LoadingError, is_video_checkpoint, load_model, load_processor, to_device
from .precision import dtype_field
from .results import instances_and_queries, panoptic_and_queries, segment_images
from .rules import Rules, rules_of
from .segmentation import Segmentation, instance_result
from .segmenter import read
from .tracking import Tracker

WINDOW, OVERLAP = 10, 3  # frames


class VideoSegmenter:
    """Segments videos with a checkpoint of clips or of images.

    ```python
    for frame in VideoSegmenter("facebook/mask2former-swin-tiny-coco-instance")(frames):
        print([(segment.id, segment.label) for segment in frame.segments])
    ```

    A model of clips sees `window` frames at a time, its objects are linked where windows overlap; a video no longer
    than the window is what the original computes. A model of images sees one frame at a time, its objects are linked
    by the embeddings of their queries and by the overlap of their masks. Either way memory does not grow with the
    number of frames.

    Args:
        checkpoint: folder or Hub id.
        task: "panoptic", "instance" or "semantic"; None for what the checkpoint is for. Models of clips have
            "instance" only.
        device: None for a GPU if there is one, else the CPU.
        dtype: of the weights; None as they are in the file, "auto" as in `Segmenter`.
        window: frames that a model of clips sees at a time.
        overlap: frames that two windows share, fewer than `window`.
        tracking: fields of `tracking.Tracker`, how objects are linked.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, and for options that do not fit it.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        *,
        task: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        window: int = WINDOW,
        overlap: int = OVERLAP,
        tracking: Mapping | None = None,
    ):
        if is_exported(checkpoint):
            raise LoadingError(
                f"{checkpoint}: is an export, whose graph does not give what objects of a video are linked by (the "
                "embeddings of queries); give the checkpoint that it was made of"
            )
        fields = dtype_field(dtype, device)
        if is_video_checkpoint(checkpoint):
            model = load_model(checkpoint, Mask2FormerForVideoSegmentation, **fields)
            processor = load_processor(checkpoint, Mask2FormerVideoProcessor)
        else:
            model, processor = load_model(checkpoint, **fields), load_processor(checkpoint)
        self._set(to_device(model, device), processor, task, window, overlap, tracking)

    @classmethod
    def of(
        cls,
        model,
        processor,
        *,
        task: str | None = None,
        window: int = WINDOW,
        overlap: int = OVERLAP,
        tracking: Mapping | None = None,
    ):
        """A segmenter with a model that is there already; its device and dtype are the model's."""
        segmenter = cls.__new__(cls)
        segmenter._set(model.eval(), processor, task, window, overlap, tracking)
        return segmenter

    def _set(self, model, processor, task, window, overlap, tracking):
        if not 0 <= overlap < window:
            raise ValueError(f"window={window!r}, overlap={overlap!r}: windows must share fewer frames than they have")
        if model_channels(model.config) != 3 or image_channels(processor) is not None:
            raise ValueError(
                f"the checkpoint takes images of {model_channels(model.config)} bands, and videos are RGB: segment "
                "their frames with Segmenter"
            )
        self.of_clips = isinstance(model, Mask2FormerForVideoSegmentation)
        self.model, self.processor, self.window, self.overlap = model, processor, window, overlap
        self.task, self.tracking = rules_of(model.config, task, processor=processor).task, dict(tracking or {})
        if self.of_clips and self.task != "instance":
            raise ValueError(f"task={self.task!r}: models of clips have 'instance' alone")

    def stream(self, **numbers) -> "FrameStream | WindowStream":
        """A video that is to come, frame by frame.

        Args:
            numbers: `threshold`, `mask_threshold`, `top_k` and, for images, `overlap_threshold` and
                `stuff_label_ids`; see `Rules`. The scores of models of clips are class probabilities alone, and 10
                objects are looked for.
        """
        rules = self.rules(**numbers)
        if self.of_clips:
            return WindowStream(self.model, self.processor, rules, self.tracking, self.window, self.overlap)
        return FrameStream(self.model, self.processor, rules, self.tracking)

    def rules(self, **numbers) -> Rules:
        """What results are made by; see `stream`.

        Raises:
            ValueError: for a number that is out of range, or that such results are not made by.
        """
        if self.of_clips:
            for name in ("overlap_threshold", "stuff_label_ids"):
                if numbers.get(name) is not None:
                    raise ValueError(f"{name}={numbers[name]!r}: is for models of images; leave it out")
            numbers = {"top_k": MAX_TRACKS} | numbers
        return rules_of(self.model.config, self.task, processor=self.processor, **numbers)

    def __call__(self, frames: Iterable, **numbers) -> Iterator[Segmentation]:
        """Results of frames in their order, each as soon as it is known.

        Args:
            frames: images of one size in any form that `Segmenter` takes.
            numbers: see `stream`.
        """
        stream = self.stream(**numbers)
        for frame in frames:
            yield from stream.push(frame)
        yield from stream.finish()


@dataclass
class Seen:
    """What a stream knows of an object: its class, and its scores."""

    label_id: int
    total: float = 0.0
    count: int = 0

    @property
    def score(self) -> float:
        """The mean over the frames or windows where it was found."""
        return self.total / self.count


class _Stream:
    def __init__(self, model, processor, rules: Rules, tracking: Mapping):
        self.model, self.processor, self.rules = model, processor, rules
        self.tracker, self.size, self.seen = Tracker(**tracking), None, {}

    def _read(self, frame) -> np.ndarray:
        frame = read(frame)
        if self.size not in (None, frame.shape[:2]):
            raise ValueError(
                f"a frame is {frame.shape[0]}x{frame.shape[1]}, those before are {self.size[0]}x{self.size[1]}: a "
                "video has one size; begin a new stream where it changes"
            )
        self.size = frame.shape[:2]
        return frame

    def _remember(self, ids, labels, scores):
        for number, label, score in zip(ids, labels, scores, strict=True):
            seen = self.seen.setdefault(number, Seen(label))
            seen.total, seen.count = seen.total + score, seen.count + 1

    def _embeddings(self, outputs, queries):
        states = outputs.transformer_decoder_last_hidden_state[0]
        return self.model.model.normalise(states)[queries]


class FrameStream(_Stream):
    """A video through a model of images. `state_dict` has all that the next frame needs."""

    def __init__(self, model, processor, rules: Rules, tracking: Mapping):
        super().__init__(model, processor, rules, tracking)
        self.stuff_ids = {}

    @one_thread_if_forked()
    @torch.inference_mode()
    def push(self, frame) -> list[Segmentation]:
        """The result of the next frame, in a list of one."""
        frame = self._read(frame)
        if self.rules.task == "semantic":  # nothing to follow; a checkpoint's sliding window is used
            return segment_images(self.model, self.processor, [frame], self.rules)
        inputs = self.processor(Image.fromarray(frame), return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        (logits,) = logits_per_image(outputs, [self.size])
        find = instances_and_queries if self.rules.task == "instance" else panoptic_and_queries
        result, queries = find(logits, self.rules)
        stuff = set(self.rules.stuff_label_ids)
        things = [n for n, segment in enumerate(result.segments) if segment.label_id not in stuff]
        of_things = [queries[n] for n in things]
        labels = [result.segments[n].label_id for n in things]
        masks = (logits[1][of_things] > 0).flatten(1)
        ids = dict(zip(things, self.tracker.update(self._embeddings(outputs, of_things), labels, masks), strict=True))
        ids = [ids[n] if n in ids else self._stuff_id(s.label_id) for n, s in enumerate(result.segments)]
        self._remember(ids, [s.label_id for s in result.segments], [s.score for s in result.segments])
        return [with_ids(result, ids)]

    def finish(self) -> list[Segmentation]:
        """What is left to say when the video ends: nothing."""
        return []

    def _stuff_id(self, label: int) -> int:
        if label not in self.stuff_ids:
            self.stuff_ids[label] = self.tracker.next_id
            self.tracker.next_id += 1
        return self.stuff_ids[label]

    def state_dict(self) -> dict:
        """Plain lists and tensors, for `torch.save`."""
        seen = {number: [seen.label_id, seen.total, seen.count] for number, seen in self.seen.items()}
        return {"tracker": self.tracker.state_dict(), "stuff_ids": self.stuff_ids, "size": self.size, "seen": seen}

    def load_state_dict(self, state: dict):
        """Go on where `state_dict` was taken."""
        self.tracker.load_state_dict(state["tracker"])
        self.stuff_ids, self.size = dict(state["stuff_ids"]), state["size"]
        self.seen = {number: Seen(*fields) for number, fields in state["seen"].items()}


class WindowStream(_Stream):
    """A video through a model of clips, a window of frames at a time."""

    def __init__(self, model, processor, rules: Rules, tracking: Mapping, window: int, overlap: int):
        super().__init__(model, processor, rules, tracking)
        self.frames, self.step, self.waiting = deque(maxlen=window), window - overlap, 0

    def push(self, frame) -> list[Segmentation]:
        """The results that are known with this frame: none, until a window is full."""
        self.frames.append(self._read(frame))
        self.waiting += 1
        full = len(self.frames) == self.frames.maxlen and self.waiting >= self.step
        return self._run() if full else []

    def finish(self) -> list[Segmentation]:
        """The results of the last frames, seen with as many before them as a window holds."""
        return self._run() if self.waiting else []

    @one_thread_if_forked()
    @torch.inference_mode()
    def _run(self) -> list[Segmentation]:
        frames = [Image.fromarray(frame) for frame in self.frames]
        outputs = self.model(**self.processor(frames, return_tensors="pt").to(self.model.device))
        ((class_logits, mask_logits, *sizes),) = logits_per_image(outputs, [self.size], dimensions=5)
        check_logits(class_logits, mask_logits)
        rules, shared = self.rules, len(frames) - self.waiting
        scores, labels, queries = best_pairs(class_logits, rules.top_k, rules.threshold)
        maps, labels, scores = mask_logits[queries], labels.tolist(), scores.tolist()  # (N, T, h, w)
        inside = maps > 0
        ids = self.tracker.update(
            self._embeddings(outputs, queries), labels, inside[:, :shared].flatten(1), inside.flatten(1)
        )
        self._remember(ids, labels, scores)
        self.waiting = 0
        results = []
        for number in range(shared, len(frames)):
            masks = resized_masks(maps[:, number : number + 1], *sizes, rules.mask_threshold)[:, 0]
            results.append(tracks_result(masks, ids, scores, labels, rules))
        return results


def tracks_result(masks: torch.Tensor, ids: list[int], scores: list[float], labels: list[int], rules: Rules):
    """Of (N, H, W) bool masks of objects, best first, in one frame; those that are not to be seen are left out."""
    _, kept = stack_instances(masks)
    *parts, own_ids = ([values[n] for n in kept] for values in (scores, labels, ids))
    return with_ids(instance_result(masks[kept].cpu().numpy(), *parts, rules.id2label), own_ids)


def with_ids(result: Segmentation, ids: list[int]) -> Segmentation:
    """The same with other ids for its segments."""
    segments = tuple(replace(segment, id=number) for segment, number in zip(result.segments, ids, strict=True))
    return replace(result, segments=segments)
