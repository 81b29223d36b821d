"""What is traced: the network, and the rules of its results, as modules whose inputs and outputs are tensors alone.

Letters: B batch, Q queries, K classes, N instances, S segments, (H, W) an image's result.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.instance_masks import masks_to_boxes
from ..model.panoptic_rules import accept, contest, kept_queries
from .forms import FORMS, to_graph_forms

NUMBERS = ("stuff", "threshold", "mask_threshold", "overlap_threshold")  # inputs of results that have a default


class Network(nn.Module):
    """(B, c, H, W) float32 pixels → float32 class logits (B, Q, K + 1) and mask logits (B, Q, H / 4, W / 4).

    Inside is a copy of the model, on the CPU, in which nothing depends on a size in Python.

    Args:
        model: `Mask2FormerForUniversalSegmentation`.
        dtype: of weights and arithmetic inside.
        forms: class of a part -> class of its form in the graph.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, forms: dict[type, type] = FORMS):
        super().__init__()
        self.model = copy.deepcopy(model).to("cpu", dtype).eval().requires_grad_(False)
        self.model.set_attn_implementation("eager")  # of fused attention a trace keeps tests for rows without a key
        to_graph_forms(self.model, forms)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values, return_dict=True)
        return output.class_queries_logits.float(), output.masks_queries_logits.float()


class Results(nn.Module):
    """Logits of one image → its result, by the rules of `model.postprocessing`.

    Args:
        mask_stride: pixels per cell of the mask logits.
        top_k: pairs of query and class that may become instances.
        resize_masks_first: see `postprocessing.semantic_scores`.
    """

    inputs: tuple[str, ...] = ()  # those of NUMBERS that the rules read
    outputs: tuple[str, ...] = ()

    def __init__(self, mask_stride: int, top_k: int, resize_masks_first: bool):
        super().__init__()
        self.mask_stride, self.top_k, self.resize_masks_first = mask_stride, top_k, resize_masks_first

    def resized(self, maps: Tensor, canvas: list[Tensor], image_size: Tensor, target_size: Tensor) -> Tensor:
        """`mask_resizing.resize_mask_logits` of (n, h, w) maps, whose n may be 0."""
        first = maps.new_zeros(1, *maps.shape[1:])  # runtimes resize no empty tensor
        return self.to_target(self.to_canvas(torch.cat([first, maps]), canvas), image_size, target_size)[1:]

    def to_canvas(self, maps: Tensor, canvas: list[Tensor]) -> Tensor:
        return F.interpolate(maps[None], size=canvas, mode="bilinear", align_corners=False)[0]

    def to_target(self, maps: Tensor, image_size: Tensor, target_size: Tensor) -> Tensor:
        maps = maps[None, :, : image_size[0], : image_size[1]]
        size = (target_size[0], target_size[1])
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]

    def canvas(self, mask_logits: Tensor) -> list[Tensor]:
        return [self.mask_stride * side for side in mask_logits.shape[-2:]]


class PanopticResults(Results):
    inputs = NUMBERS
    outputs = ("segmentation", "segment_labels", "segment_scores", "segment_areas")

    def forward(self, class_logits, mask_logits, image_size, target_size, stuff, *thresholds):
        threshold, mask_threshold, overlap_threshold = thresholds
        kept, scores, labels = kept_queries(class_logits[0], threshold)
        scores, labels = scores[kept], labels[kept]
        masks = self.resized(mask_logits[0][kept], self.canvas(mask_logits), image_size, target_size)
        size = (target_size[0], target_size[1])
        found = contest(scores, [(0, masks)], size, lambda masks: masks >= mask_threshold)
        segments = accept(found, scores, labels, stuff[labels], overlap_threshold)
        ids = segments.numbers.int()[found.owner] * found.inside
        return ids, segments.labels, segments.scores, segments.areas


class InstanceResults(Results):
    """Without empty masks, which no result shows."""

    inputs = NUMBERS[:3]
    outputs = ("segmentation", "masks", "scores", "labels", "boxes")

    def forward(self, class_logits, mask_logits, image_size, target_size, stuff, threshold, mask_threshold):
        num_classes = class_logits.shape[2] - 1
        scores = class_logits[0].softmax(-1)[:, :-1].flatten()
        scores, pairs = scores.topk(self.top_k)
        wanted = (scores * 1.001 >= threshold) & ~stuff[pairs % num_classes]
        scores, pairs = scores[wanted], pairs[wanted]
        labels = pairs % num_classes
        logits = self.resized(
            mask_logits[0][pairs // num_classes], self.canvas(mask_logits), image_size, target_size
        )  # (N, H, W)
        masks = logits > torch.log(mask_threshold / (1 - mask_threshold))
        areas = masks.flatten(1).sum(1)
        scores = scores * ((logits.sigmoid() * masks).flatten(1).sum(1) / (areas + 1e-6))
        shown = (scores >= threshold) & (areas > 0)
        scores, labels, masks = scores[shown], labels[shown], masks[shown]
        scores, order = scores.topk(scores.shape[0])  # by falling score
        labels, masks = labels[order], masks[order]
        everywhere = masks.new_ones(1, *masks.shape[1:])
        first = torch.cat([masks, everywhere]).int().argmax(0)  # N where there is no instance
        ids = torch.where(first < scores.shape[0], first + 1, 0).int()
        return ids, masks, scores, labels, masks_to_boxes(masks)


class SemanticResults(Results):
    outputs = ("segmentation",)

    def forward(self, class_logits, mask_logits, image_size, target_size):
        probabilities = class_logits[0].softmax(-1)[:, :-1].T  # (K, Q)
        logits = self.to_canvas(mask_logits[0], self.canvas(mask_logits))
        if self.resize_masks_first:
            scores = self.mixed(probabilities, self.to_target(logits, image_size, target_size))
        else:
            scores = self.to_target(self.mixed(probabilities, logits), image_size, target_size)
        return (scores.argmax(0).int(),)

    def mixed(self, probabilities: Tensor, logits: Tensor) -> Tensor:
        """(K, Q) and (Q, H, W) → (K, H, W)."""
        return (probabilities @ logits.sigmoid().flatten(1)).view(-1, *logits.shape[1:])


RESULTS = {"panoptic": PanopticResults, "instance": InstanceResults, "semantic": SemanticResults}
