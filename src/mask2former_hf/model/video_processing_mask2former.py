"""Videos → padded tensors for the video model, and its outputs → objects with a mask in every frame.

Letters: `B` clips, `T` frames, `Q` queries, `K` classes, `N` objects; (H, W) the padded canvas.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature

from .forked_processes import one_thread_if_forked
from .image_processing_mask2former import Mask2FormerImageProcessor
from .postprocessing import logits_per_image
from .result_defaults import MASK_THRESHOLD
from .video_postprocessing import MAX_TRACKS, video_instance_segmentation


class Mask2FormerVideoProcessor(Mask2FormerImageProcessor):
    """Prepares clips for Mask2Former and turns its outputs into objects with a mask in every frame.

    Every frame is prepared as `Mask2FormerImageProcessor` prepares an image, with the same settings in the same file,
    `preprocessor_config.json`: a video checkpoint also serves single frames. What is inherited makes results of those.
    The original tests with a short side of 360 pixels (480 with most Swins).
    """

    model_input_names = ["pixel_values_videos", "pixel_mask"]
    size = {"shortest_edge": 360, "longest_edge": 1333}

    def __call__(self, videos, **kwargs) -> BatchFeature:
        return self.preprocess(videos, **kwargs)

    @one_thread_if_forked()
    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Videos to the model's inputs.

        Args:
            videos: one video or a list of them. A video is a list of frames, each an image in any form that
                `Mask2FormerImageProcessor` takes, or an array or tensor (T, h, w, 3) or (T, 3, h, w). The frames of a
                video have one size; videos of a batch may differ in it, and have the same number of frames.
            kwargs: settings of the image processor, for this call.

        Returns:
            BatchFeature with pixel_values_videos (B, T, 3, H, W) float32, zero outside the frames, and pixel_mask
            (B, H, W) int64, 1 on the frames of each video.

        Raises:
            ValueError, TypeError: as `Mask2FormerImageProcessor.preprocess`; also for frames of different sizes and
                videos of different lengths.
        """
        videos = [list(video) for video in videos] if _are_videos(videos) else [list(videos)]
        lengths = [len(video) for video in videos]
        if not videos or len(set(lengths)) > 1 or 0 in lengths:
            raise ValueError(
                f"videos have {lengths} frames; a batch needs videos of one length, at least 1: cut them, or pass "
                "them one by one."
            )
        kind = kwargs.pop("return_tensors", None)
        kind = getattr(kind, "value", kind)
        if kind not in ("pt", "np", None):
            raise ValueError(f'return_tensors={kind!r} must be "pt", "np" or None.')
        frames = super().preprocess([frame for video in videos for frame in video], return_tensors="pt", **kwargs)
        B, T = len(videos), lengths[0]
        masks = frames["pixel_mask"].unflatten(0, (B, T))
        if changed := (masks != masks[:, :1]).flatten(2).any(2).nonzero().tolist():
            clip, frame = changed[0]
            raise ValueError(
                f"videos[{clip}][{frame}] has another size than videos[{clip}][0]; the frames of a video have one "
                "size: cut the video where it changes."
            )
        data = {"pixel_values_videos": frames["pixel_values"].unflatten(0, (B, T)), "pixel_mask": masks[:, 0]}
        if kind != "pt":
            data = {name: value.numpy() if kind == "np" else list(value.numpy()) for name, value in data.items()}
        return BatchFeature(data)

    @one_thread_if_forked()
    def post_process_video_instance_segmentation(
        self, outputs, threshold=0.0, mask_threshold=MASK_THRESHOLD, target_sizes=None, *, top_k=MAX_TRACKS
    ) -> list[dict]:
        """Objects of every clip, best first, by the original's rules; masks may overlap.

        Args:
            outputs: the model's, with class_queries_logits (B, Q, K + 1), masks_queries_logits (B, Q, T, h, w),
                image_sizes, canvas_sizes and mask_strides.
            threshold: lowest score, which is the class probability alone; the original has none, 0.
            mask_threshold: mask probability above which a pixel belongs to an object.
            target_sizes: B pairs (rows, columns), usually the video's own; None keeps the size after `preprocess`.
            top_k: (query, class) pairs taken; the original's 10.

        Returns:
            B dicts: "masks" (N, T, H, W) bool, "scores" (N,), "labels" (N,), "queries" (N,); "segmentation"
            (T, H, W) int32, the number of the best object at each pixel and -1 elsewhere; and "segments_info" with
            "id" (0, 1, ..., the place in the others), "label_id", "was_fused" (False) and "score".
        """
        results = []
        for logits in logits_per_image(outputs, target_sizes, dimensions=5):
            found = video_instance_segmentation(
                *logits, top_k=top_k, score_threshold=threshold, mask_threshold=mask_threshold
            )
            masks = found["masks"]
            segmentation = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
            for number in reversed(range(len(masks))):  # the best on top
                segmentation.masked_fill_(masks[number], number)
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
            info = [
                {"id": number, "label_id": label, "was_fused": False, "score": score}
                for number, (label, score) in enumerate(rows)
            ]
            results.append({"segmentation": segmentation, "segments_info": info, **found})
        return results

    def to_dict(self) -> dict:
        fields = super().to_dict()
        # AutoImageProcessor reads the same file, and for it this is the image processor.
        fields["image_processor_type"] = Mask2FormerImageProcessor.__name__
        return fields


def _are_videos(videos) -> bool:
    """Whether this is many videos: its entries are lists of frames, or arrays of four dimensions."""
    if isinstance(videos, np.ndarray | torch.Tensor):
        return videos.ndim == 5
    if not isinstance(videos, Sequence) or isinstance(videos, str):
        raise TypeError(
            f"videos is a {type(videos).__name__}: give a list of frames, an array (T, h, w, 3), or a list of these"
        )
    first = videos[0] if videos else None
    return isinstance(first, list | tuple) or getattr(first, "ndim", 0) == 4


__all__ = ["Mask2FormerVideoProcessor"]
