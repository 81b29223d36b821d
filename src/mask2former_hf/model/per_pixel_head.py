"""Per-pixel classification, what masks are compared with: a class for every cell of a map, and no segments.

The original's `PerPixelBaselineHead` and `PerPixelBaselinePlusHead`, whose decoder is the standard one. In terms of
mask classification both have one query per class: query k surely says class k, and its mask is the map of class k. So
they are read by what reads masks. Letters: L supervised layers, B batch, K classes, C channels, (h, w) of the mask
features, (H, W) of the input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .criterion import LossSettings, Target, check_targets
from .result_defaults import CERTAIN
from .transformer_decoder import DecoderStates

NO_LABEL = -1


class CertainClasses(nn.Module):
    """The class logits of queries that each are a class: (..., K, C) states -> (..., K, K + 1)."""

    def __init__(self, num_labels: int):
        super().__init__()
        self.out_features = num_labels + 1

    def forward(self, states: Tensor) -> Tensor:
        K = self.out_features - 1
        logits = torch.eye(K, K + 1, dtype=states.dtype, device=states.device) * CERTAIN - CERTAIN
        return logits.expand(*states.shape[:-2], -1, -1)


class _AsTheyAre(nn.Module):
    """In place of a decoder: states need no norm, and are the embeddings."""

    def __init__(self):
        super().__init__()
        self.layernorm, self.mask_predictor = nn.Identity(), nn.Identity()


class PerPixelClassifier(nn.Module):
    """A 1x1 convolution: K embeddings that are parameters, the same for every image, each with a bias behind it."""

    def __init__(self, num_labels: int, mask_feature_size: int):
        super().__init__()
        self.classifier = nn.Conv2d(mask_feature_size, num_labels, 1)
        self.decoder = _AsTheyAre()

    def changed_fields(self) -> dict:
        """Fields of the config that may change with the module."""
        return {"num_queries": self.classifier.out_channels}

    def forward(self, maps: list[Tensor], mask_features: Tensor, eager: bool) -> DecoderStates:
        rows = torch.cat([self.classifier.weight.flatten(1), self.classifier.bias.unsqueeze(1)], dim=1)  # (K, C + 1)
        states = rows.expand(mask_features.shape[0], -1, -1)  # not len(), which tracing makes a constant
        return DecoderStates([states], [states], [], [])


def class_maps(embeddings: Tensor, mask_features: Tensor) -> Tensor:
    """Logarithms of every class's probability, (B, K, h, w), of (B, K, C) embeddings, or (B, K, C + 1) with a bias.

    The original's maps are logits. They differ by one number per cell, the same for all classes, and resizing is
    linear: the best class of every pixel is the same. None of these is above 0, where sigmoids would be equal.
    """
    C = mask_features.shape[1]
    logits = torch.einsum("bqc,bchw->bqhw", embeddings[..., :C], mask_features)
    if embeddings.shape[-1] > C:
        logits = logits + embeddings[..., C:, None]
    return logits.log_softmax(1)


class ClassMaps:
    """`class_maps` of (L, B, K, C) embeddings, made for one layer at a time."""

    def __init__(self, embeddings: Tensor, mask_features: Tensor):
        self.embeddings, self.mask_features = embeddings, mask_features

    def __iter__(self):
        return (class_maps(embeddings, self.mask_features) for embeddings in self.embeddings)


class PerPixelLoss(nn.Module):
    """Cross-entropy of every labelled pixel, of the maps resized to the input; the same interface as the set loss.

    `settings` may be replaced between two calls.
    """

    lazy_masks = ClassMaps
    empty_weight = None  # there is no "no object"

    def __init__(self, settings: LossSettings):
        super().__init__()
        self.settings = settings

    @torch.compiler.disable  # numbers of targets vary
    def forward(
        self,
        class_logits: Tensor,
        mask_logits: ClassMaps,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        ignore_masks: Sequence[Tensor] | None = None,
        canvas: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        normalizers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The term of every layer, unweighted; arguments are those of `Mask2FormerLoss.forward`.

        A pixel's label is that of the last mask that has it. Pixels of no mask, ignored ones and padding have none.
        Nothing is drawn, so `generator` has no work.

        Args:
            class_logits: say how many images there are, and where.
            normalizers: (1,) the number of labelled pixels of the whole batch, from `normalizers`.

        Returns:
            `{"loss_cross_entropy"}`, (L,) float32, a mean over labelled pixels; 0 if there are none.
        """
        batch_size, device = class_logits.shape[1], class_logits.device
        targets = check_targets(
            mask_labels, class_labels, ignore_masks, canvas, batch_size, self.settings.num_labels, device
        )
        labels = torch.stack([label_map(target) for target in targets])  # (B, H, W)
        count = (labels != NO_LABEL).sum() if normalizers is None else normalizers[0].to(device)
        with torch.autocast(device.type, enabled=False):
            sums = [self._sum(maps.float(), labels) for maps in mask_logits]
        return {"loss_cross_entropy": torch.stack(sums) / count.clamp(min=1)}

    def _sum(self, maps: Tensor, labels: Tensor) -> Tensor:
        resized = F.interpolate(maps, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(resized, labels, ignore_index=NO_LABEL, reduction="sum")

    def normalizers(self, batches: Sequence[dict], num_queries: int) -> Tensor:
        """(1,) number of labelled pixels in several micro-batches, at least 1."""
        counts = []
        for batch in batches:
            masks, labels = batch["mask_labels"], batch["class_labels"]
            canvas = tuple(batch["pixel_values"].shape[-2:])
            checked = check_targets(
                masks,
                labels,
                batch.get("ignore_masks"),
                canvas,
                len(masks),
                self.settings.num_labels,
                masks[0].device,
            )
            counts += [(label_map(target) != NO_LABEL).sum() for target in checked]
        return torch.stack(counts).sum().clamp(min=1).float().reshape(1)

    def write_no_object_weight(self, weight: float):
        """There is none."""


def label_map(target: Target) -> Tensor:
    """(H, W) int64 label of every pixel of the canvas, `NO_LABEL` where it has none."""
    height, width = target.masks.shape[-2:]
    labels = target.labels.new_full(target.canvas, NO_LABEL)
    inside = labels[:height, :width]
    for mask, label in zip(target.masks, target.labels, strict=True):
        inside.copy_(torch.where(mask > 0, label, inside))
    if target.ignored is not None:
        inside.masked_fill_(target.ignored[0], NO_LABEL)
    return labels
