"""`pipeline("image-segmentation")` for this implementation.

transformers' own pipeline runs our model, but reads results by its own rules: `subtask=None` is panoptic whatever the
checkpoint was trained for, no stuff is fused, instance masks lose what overlaps, its thresholds (0.9, 0.5, 0.5) are
not the original's, and images of different sizes cannot be in one batch.
"""

import os

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.image_utils import load_image
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.utils import ModelOutput, logging

from ..inference.known_labels import task_of, window_of
from ..inference.results import as_processed, from_scores, segment_outputs
from ..inference.rules import rules_of
from ..inference.segmenter import DOWNLOAD_TIMEOUT, read
from ..inference.sliding_window import sliding_scores
from ..model.channels import image_channels
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from ..model.result_defaults import TASKS

logger = logging.get_logger(__name__)


class Mask2FormerSegmentationPipeline(ImageSegmentationPipeline):
    """Segments images by the checkpoint's own task, with the results of `Segmenter`.

    Constructed with another model than ours it is transformers' own pipeline, because it is registered for the task as
    a whole. Inputs are those of transformers' pipeline (paths, URLs, PIL images, lists, generators and datasets of
    them), besides `pathlib` paths, images of 16 bits and, for a checkpoint of bands, files and arrays of them; a batch
    (`batch_size=8`) may mix sizes.

    A call takes `subtask` (`"panoptic"`, `"instance"` or `"semantic"`; by default the checkpoint's own), `threshold`,
    `mask_threshold` and `overlap_mask_area_threshold` (by default those of `post_process_*`), and `timeout`. A result
    is a list of segments, each `{"score": float, "label": str, "mask": PIL image of mode "L", 255 inside}`, at the
    image's own size. Semantic segments have the score None; instances overlap, the best first.
    """

    def __new__(cls, *args, model=None, **kwargs):
        if model is not None and not isinstance(model, Mask2FormerForUniversalSegmentation):
            return ImageSegmentationPipeline(*args, model=model, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        processor = self.image_processor
        if not isinstance(processor, Mask2FormerImageProcessor):
            logger.warning_once(
                f"{type(processor).__module__}.{type(processor).__name__} is replaced by this package's "
                "Mask2FormerImageProcessor with the same settings: the model's output is made for it"
            )
            self.image_processor = Mask2FormerImageProcessor.from_dict(processor.to_dict())

    def preprocess(self, image, subtask=None, timeout=None):
        if isinstance(image, str) and not image.startswith(("http://", "https://")) and not os.path.exists(image):
            image = load_image(image)  # of base64
        channels = image_channels(self.image_processor)
        pixels = read(image, timeout=timeout or DOWNLOAD_TIMEOUT, channels=channels)
        config = self.model.config
        if window_of(config, subtask or task_of(config)) is not None:
            return {"inputs": {"image": pixels}, "target_size": torch.tensor([pixels.shape[:2]])}
        inputs = self.image_processor([as_processed(pixels, channels)], return_tensors="pt")
        return {"inputs": dict(inputs), "target_size": torch.tensor([pixels.shape[:2]])}

    def _forward(self, model_inputs):
        inputs, sizes = model_inputs["inputs"], model_inputs["target_size"]
        inputs = inputs if isinstance(inputs, list) else [inputs]  # transformers collates tensors, and lists the rest
        if "image" in inputs[0]:
            window = window_of(self.model.config)
            channels = image_channels(self.image_processor)
            pairs = zip((as_processed(item["image"], channels) for item in inputs), sizes.tolist(), strict=True)
            scores = [sliding_scores(self.model, self.image_processor, *pair, window) for pair in pairs]
            return ModelOutput(scores=scores, target_size=sizes)
        canvas = [max(item["pixel_values"].shape[side] for item in inputs) for side in (-2, -1)]
        batch = {name: torch.cat([_pad(item[name], canvas) for item in inputs]) for name in inputs[0]}
        outputs = self.model(**batch)
        # Only what post-processing reads: transformers copies every field to the host.
        return ModelOutput(
            class_queries_logits=outputs.class_queries_logits,
            masks_queries_logits=outputs.masks_queries_logits,
            image_sizes=outputs.image_sizes,
            canvas_sizes=outputs.canvas_sizes,
            mask_strides=outputs.mask_strides,
            target_size=sizes,
        )

    def postprocess(
        self,
        model_outputs,
        subtask=None,
        threshold=None,
        mask_threshold=None,
        overlap_mask_area_threshold=None,
    ):
        if subtask not in (None, *TASKS):
            raise ValueError(
                f"subtask={subtask!r}: must be one of {', '.join(TASKS)}, or None for the checkpoint's own"
            )
        numbers = {"threshold": threshold, "mask_threshold": mask_threshold}
        numbers["overlap_threshold"] = overlap_mask_area_threshold
        try:
            rules = rules_of(self.model.config, subtask, processor=self.image_processor, **numbers)
        except ValueError as error:
            raise ValueError(str(error).replace("overlap_threshold=", "overlap_mask_area_threshold=")) from error
        outputs = ModelOutput(**model_outputs)
        if "scores" in outputs:  # of one image, alone in a list or in a batch
            return self._segments(from_scores(outputs.scores[0], rules))
        result = segment_outputs(outputs, rules, outputs.target_size.tolist())[0]
        return self._segments(result)

    @staticmethod
    def _segments(result) -> list[dict]:
        return [
            {"score": s.score, "label": s.label, "mask": Image.fromarray(mask.astype(np.uint8) * 255)}
            for s, mask in zip(result.segments, result.masks, strict=True)
        ]


def _pad(tensor: torch.Tensor, canvas: list[int]) -> torch.Tensor:
    return F.pad(tensor, (0, canvas[1] - tensor.shape[-1], 0, canvas[0] - tensor.shape[-2]))
