"""The set loss over clips: a query is one object in all frames (the original's `mask2former_video/modeling`).

What differs from images: the matching cost takes the same points in every frame and counts them as one mask's, the
losses take a row per frame of a matched object, with points of its own; their sum is still divided by the number of
objects, so it is T times that of images.

Letters: L supervised layers, B clips, T frames, Q queries, K classes, C channels, N targets of a clip, M matched
queries of a clip, R = M * T rows, frames inside, P points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .criterion import Mask2FormerLoss, Target, check_labels
from .mask_logits import LazyMasks, SampledProduct, sample_masks


class LazyClipMasks(LazyMasks):
    """Mask logits of clips as a product not carried out: (L, B, Q, C) embeddings times (B, T, C, H, W) features.

    To the loss of images they are masks of Q * T queries, query n in frame t being number n * T + t.
    """

    def __init__(self, embeddings: Tensor, features: Tensor):
        super().__init__(embeddings, features.flatten(0, 1))
        self.num_frames = features.shape[1]

    def _frames(self, clip: int) -> tuple[Tensor, ...]:
        return self.features[clip * self.num_frames : (clip + 1) * self.num_frames]

    def _features_at(self, clip: int, points: Tensor) -> Tensor:
        """(L or 1, C, T * P): the same points in every frame."""
        T = self.num_frames
        frames = [super(LazyClipMasks, self)._features_at(clip * T + t, points) for t in range(T)]
        return torch.cat(frames, dim=2)

    def of_queries(self, clip: int, layers: slice, queries: Tensor) -> Tensor:
        """The maps of (l, R) queries in frames, R = M * T in order, (l * M * T, H, W) float32 without gradient."""
        embeddings = self._embeddings(clip, layers, queries)  # (l * M, C)
        with torch.no_grad():
            maps = [embeddings.float() @ frame.flatten(1).float() for frame in self._frames(clip)]
            return torch.stack(maps, dim=1).flatten(0, 1).unflatten(1, self.size)

    def sample(self, clip: int, queries: Tensor, points: Tensor, samples: Tensor) -> Tensor:
        embeddings = self._embeddings(clip, slice(None), queries)  # (L * M, C)
        T = self.num_frames
        of_frames = [
            SampledProduct.apply(embeddings, frame, points[t::T], samples[t::T])
            for t, frame in enumerate(self._frames(clip))
        ]
        return torch.stack(of_frames, dim=1).flatten(0, 1)  # (L * R, P)

    def _embeddings(self, clip, layers, queries):
        """One row per query: the frames of a query have the same embedding."""
        return self._rows(clip, layers, queries[:, :: self.num_frames] // self.num_frames)


class ClipTarget(NamedTuple):
    """What is known about a clip."""

    masks: Tensor  # (N, T, h, w) binary, of any dtype, the top left part of the canvas; the rest is zero
    labels: Tensor  # (N,) int64, K for an object without a label
    canvas: tuple[int, int]

    def sample(self, points: Tensor) -> Tensor:
        """(N, R, T * P) float32 samples at (1, R, P, 2) points, the same in every frame."""
        N, T = self.masks.shape[:2]
        samples = sample_masks(self.masks.flatten(0, 1), points, self.canvas)  # (N * T, R, P)
        return samples.view(N, T, *points.shape[1:3]).transpose(1, 2).flatten(2)

    def sample_matched(self, matched: Tensor, points: Tensor) -> Tensor:
        """(l, R, P) samples of `matched` (l, R), numbers of masks of targets in frames, at (l, R, P, 2) points."""
        return Target(self.masks.flatten(0, 1), self.labels, None, self.canvas).sample_matched(matched, points)

    def weights(self, points: Tensor) -> None:
        """All pixels of a clip take part."""


class Mask2FormerClipLoss(Mask2FormerLoss):
    """Match queries with the objects of clips, then supervise classes and the masks of every frame."""

    def forward(
        self,
        class_logits: Tensor,
        mask_logits: LazyClipMasks,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        canvas: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        normalizers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted loss terms of every layer, as `Mask2FormerLoss.forward` with these differences.

        Args:
            class_logits: (L, B, Q, K + 1), one class for a whole clip.
            mask_logits: of all frames.
            mask_labels: per clip (N, T, h, w) binary masks of any dtype, empty where an object is not to be seen.
            class_labels: per clip (N,) int64 in 0 .. K; K says that the masks are known and the class is not: matched
                by the probability of "no object", and the query is told "no object".
        """
        also = {"canvas": canvas, "generator": generator, "normalizers": normalizers}
        return super().forward(class_logits, mask_logits, mask_labels, class_labels, **also)

    def targets(self, mask_labels, class_labels, ignore_masks, canvas, batch_size, device) -> list[ClipTarget]:
        for name, value in (("mask_labels", mask_labels), ("class_labels", class_labels)):
            if len(value) != batch_size:
                raise ValueError(f"{name} has {len(value)} entries for a batch of {batch_size} clips: give one each")
        targets = []
        for clip, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
            check_labels(clip, masks, labels, self.settings.num_labels, of_clips=True)
            size = tuple(masks.shape[2:])
            own = size if canvas is None else tuple(canvas)
            if size[0] > own[0] or size[1] > own[1]:
                raise ValueError(
                    f"mask_labels[{clip}] is {size[0]}x{size[1]}, larger than the input, {own[0]}x{own[1]}: resize "
                    "masks with their frames"
                )
            targets.append(ClipTarget(masks.to(device), labels.to(device).long(), own))
        return targets

    def _mask_sums(self, clip, masks, target, queries, matched, generator) -> dict[str, Tensor]:
        frames = torch.arange(masks.num_frames, device=queries.device)
        in_frames = [(x.unsqueeze(-1) * len(frames) + frames).flatten(1) for x in (queries, matched)]  # (L, R)
        return super()._mask_sums(clip, masks, target, *in_frames, generator)
