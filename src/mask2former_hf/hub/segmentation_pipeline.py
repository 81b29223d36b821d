"""`pipeline("image-segmentation")` for this implementation.

transformers' own pipeline runs our model, but reads results by its own rules: `subtask=None` is panoptic whatever the
checkpoint was trained for, no stuff is fused, instance masks lose what overlaps, its thresholds (0.9, 0.5, 0.5) are
not the original's, and images of different sizes cannot be in one batch.
"""

import copy
import os

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.image_utils import load_image
from transformers.pipelines.image_segmentation import ImageSegmentationPipeline
from transformers.utils import ModelOutput, logging

from ..data.images import to_rgb
from ..inference.known_labels import stuff_of, task_of
from ..model.configuration_mask2former import TASKS
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation

logger = logging.get_logger(__name__)


class Mask2FormerSegmentationPipeline(ImageSegmentationPipeline):
    """Segments images by the checkpoint's own task, with the results of `Mask2FormerImageProcessor.post_process_*`.

    Constructed with another model than ours it is transformers' own pipeline, because it is registered for the task as
    a whole. Inputs are those of transformers' pipeline (paths, URLs, PIL images, lists, generators and datasets of
    them), besides `pathlib` paths and images of 16 bits; a batch (`batch_size=8`) may mix sizes.

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
        if isinstance(image, str | os.PathLike) and os.path.isfile(image):
            image = Image.open(image)  # not load_image, whose conversion to RGB turns 16-bit images white
        elif not isinstance(image, Image.Image):
            image = load_image(image, timeout=timeout)
        image = to_rgb(image, "image")
        inputs = self.image_processor([image], input_data_format="channels_last", return_tensors="pt")
        return {"inputs": dict(inputs), "target_size": torch.tensor([image.shape[:2]])}

    def _forward(self, model_inputs):
        inputs, sizes = model_inputs["inputs"], model_inputs["target_size"]
        inputs = inputs if isinstance(inputs, list) else [inputs]  # transformers collates tensors, and lists the rest
        canvas = [max(item["pixel_values"].shape[side] for item in inputs) for side in (-2, -1)]
        batch = {name: torch.cat([_pad(item[name], canvas) for item in inputs]) for name in inputs[0]}
        outputs = self.model(**batch)
        # Only what post-processing reads: transformers copies every field to the host.
        return ModelOutput(
            class_queries_logits=outputs.class_queries_logits,
            masks_queries_logits=outputs.masks_queries_logits,
            image_sizes=outputs.image_sizes,
            canvas_sizes=outputs.canvas_sizes,
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
        config = self.model.config
        task = task_of(config) if subtask is None else subtask
        if task not in TASKS:
            raise ValueError(
                f"subtask={subtask!r}: must be one of {', '.join(TASKS)}, or None for the checkpoint's own"
            )
        processor = copy.copy(self.image_processor)
        if config.stuff_label_ids is not None or processor.label_ids_to_fuse is None:
            processor.label_ids_to_fuse = stuff_of(config)
        given = {
            "threshold": threshold,
            "mask_threshold": mask_threshold,
            "overlap_mask_area_threshold": overlap_mask_area_threshold,
        }
        options = {name: value for name, value in given.items() if value is not None}
        options["target_sizes"] = model_outputs["target_size"].tolist()
        outputs = self._on_own_canvas(model_outputs)
        if task == "panoptic":
            result = processor.post_process_panoptic_segmentation(outputs, **options)[0]
            ids, segments = result["segmentation"].numpy(), result["segments_info"]
            found = [(segment["score"], segment["label_id"], ids == segment["id"]) for segment in segments]
        elif task == "instance":
            result = processor.post_process_instance_segmentation(outputs, **options)[0]
            rows = (result["scores"].tolist(), result["labels"].tolist(), result["masks"].numpy())
            found = list(zip(*rows, strict=True))
        else:
            labels = processor.post_process_semantic_segmentation(
                outputs, target_sizes=options["target_sizes"], resize_masks_first=task_of(config) != "semantic"
            )[0].numpy()
            found = [(None, label, labels == label) for label in np.unique(labels).tolist()]
        return [
            {"score": score, "label": config.id2label[label], "mask": Image.fromarray(mask.astype(np.uint8) * 255)}
            for score, label, mask in found
        ]

    def _on_own_canvas(self, outputs: ModelOutput) -> ModelOutput:
        """Without the columns and rows that a batch mate of a larger canvas added to the mask logits."""
        height, width = (-(-side // self.model.config.common_stride) for side in outputs["canvas_sizes"][0].tolist())
        return ModelOutput(
            dict(outputs) | {"masks_queries_logits": outputs["masks_queries_logits"][..., :height, :width]}
        )


def _pad(tensor: torch.Tensor, canvas: list[int]) -> torch.Tensor:
    return F.pad(tensor, (0, canvas[1] - tensor.shape[-1], 0, canvas[0] - tensor.shape[-2]))
