"""Mask logits as the loss reads them: sampled at points, whether they exist in full or as a product not carried out.

Letters: L supervised layers, B batch, Q queries, C channels, N masks, M matched queries of an image, R rows (M of each
of some layers), P points.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .compiled import uncertain_points as compiled_uncertain_points
from .compiled import uniform_points as compiled_uniform_points
from .cpu_layout import channels_last_on_cpu, chunk_length
from .onednn import product
from .transfers import to_device


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (R, C, H, W) `maps` at (R, P, 2) `points`, (R, C, P).

    Points are (x, y) in [0, 1], the outer edges of the map; outside counts as zero (the original's `point_sample`).
    """
    return F.grid_sample(maps, _grid(points.unsqueeze(2)), mode="bilinear", align_corners=False).squeeze(3)


def _grid(points: Tensor) -> Tensor:
    return (2 * points).sub_(1)  # what grid_sample takes, with one temporary


def every_cell(size: tuple[int, int], device: torch.device) -> Tensor:
    """(H * W, 2) points: the centres of a map's cells, where samples are the map itself."""
    rows, columns = ((torch.arange(side, device=device) + 0.5) / side for side in size)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).flatten(0, 1)


def sample_masks(masks: Tensor, points: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Bilinear samples of masks that are stored compactly; only a few at a time exist as float.

    Args:
        masks: (N, h, w) of any dtype, the top left part of the canvas; the rest of the canvas is zero.
        points: (N or 1, R, P, 2) as (x, y) in [0, 1], the canvas' outer edges; 1 for the same points in every mask.
        canvas: (H, W), at least (h, w).

    Returns:
        (N, R, P) float32, equal to sampling the zero-padded masks.
    """
    N, h, w = masks.shape
    if (h, w) != tuple(canvas):
        points = points * to_device([canvas[1] / w, canvas[0] / h], points.device).to(points.dtype)
    grids = _grid(points).expand(N, -1, -1, -1)
    chunk = chunk_length(h * w, masks.device)
    samples = [
        F.grid_sample(some.unsqueeze(1).float(), grid, mode="bilinear", align_corners=False).squeeze(1)
        for some, grid in zip(masks.split(chunk), grids.split(chunk), strict=True)
    ]
    return torch.cat(samples) if N else points.new_zeros(0, *grids.shape[1:3])


def most_uncertain(candidates: Tensor, certainty: Tensor, count: int) -> Tensor:
    """Of (R, P, 2) candidates the `count` of least (R, P) certainty, such as |logit|: (R, count, 2), in no order."""
    chosen = certainty.topk(count, dim=1, largest=False, sorted=False).indices
    return candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))


def random_points(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Uniform points in [0, 1)^2; other ones with the compiled library than without, of the same seed."""
    drawn = None if compiled_uniform_points is None else compiled_uniform_points(shape, device, generator)
    return torch.rand(shape, device=device, generator=generator) if drawn is None else drawn


def uncertain_points(logits: Tensor, candidates: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """Of (R, P, 2) candidates on (R, H, W) masks the `count` of least |logit|, those of weight 0 last, in no order."""
    if compiled_uncertain_points is not None:
        found = compiled_uncertain_points(logits, candidates, weights, count)
        if found is not None:
            return found
    certainty = sample_maps(logits.unsqueeze(1), candidates).squeeze(1).abs_()  # (R, P)
    if weights is not None:
        certainty = certainty.masked_fill(weights == 0, float("inf"))
    return most_uncertain(candidates, certainty, count)


class DenseMasks:
    """Mask logits that exist in full, (L, B, Q, H, W)."""

    def __init__(self, logits: Tensor):
        self.logits, self.size = logits, tuple(logits.shape[-2:])

    def at_points(self, image: int, points: Tensor, chunks: list[slice]) -> Iterator[Tensor]:
        """(l, Q, P) float32 logits of an image at (L or 1, P, 2) points, for one chunk of layers after the other."""
        points = points.expand(len(self.logits), -1, -1)
        for layers in chunks:
            yield sample_maps(self.logits[layers, image].float(), points[layers])

    def of_queries(self, image: int, layers: slice, queries: Tensor) -> Tensor:
        """The masks of (l, M) queries of an image in some layers, (l * M, H, W) float32 without gradient."""
        return self._rows(image, layers, queries).detach()

    def sample(self, image: int, queries: Tensor, points: Tensor, samples: Tensor) -> Tensor:
        """Samples (R, P) of the masks of (L, M) queries, R = L * M, at (R, P, 2) points, with gradient.

        Args:
            samples: the same, computed from the masks of `of_queries`.
        """
        return sample_maps(self._rows(image, slice(None), queries).unsqueeze(1), points).squeeze(1)

    def _rows(self, image, layers, queries):
        chosen = queries[..., None, None].expand(-1, -1, *self.size)
        return self.logits[layers, image].gather(1, chosen).flatten(0, 1).float()


class LazyMasks:
    """Mask logits as a product not carried out: (L, B, Q, C) embeddings times (B, C, H, W) features.

    Sampling and the product are both linear, so features are sampled first and multiplied there.
    """

    def __init__(self, embeddings: Tensor, features: Tensor):
        self.embeddings, self.size = embeddings, tuple(features.shape[-2:])
        self.features = features.unbind()  # each slice of its own would get a gradient of full size

    def at_points(self, image: int, points: Tensor, chunks: list[slice]) -> Iterator[Tensor]:
        sampled = self._features_at(image, points)
        for layers in chunks:
            embeddings = self.embeddings[layers, image].float()  # (l, Q, C)
            if len(points) == 1:  # one product of all rows: a batch of them takes twice as long on CPUs
                yield product(embeddings.flatten(0, 1), sampled[0].T, None).unflatten(0, embeddings.shape[:2])
            else:
                yield embeddings @ sampled[layers]

    def _features_at(self, image: int, points: Tensor) -> Tensor:
        """(L or 1, C, P) features of an image at (L or 1, P, 2) points."""
        features = channels_last_on_cpu(self.features[image].float().unsqueeze(0))
        return sample_maps(features.expand(len(points), -1, -1, -1), points)

    def of_queries(self, image: int, layers: slice, queries: Tensor) -> Tensor:
        embeddings, features = self._rows(image, layers, queries), self.features[image]
        with torch.no_grad():
            return product(embeddings.float(), features.flatten(1).T.float(), None).unflatten(1, self.size)

    def sample(self, image: int, queries: Tensor, points: Tensor, samples: Tensor) -> Tensor:
        return SampledProduct.apply(self._rows(image, slice(None), queries), self.features[image], points, samples)

    def _rows(self, image, layers, queries):
        embeddings = self.embeddings[layers, image]
        return embeddings.gather(1, queries.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])).flatten(0, 1)


class SampledProduct(torch.autograd.Function):
    """The gradient of samples (R, P) of mask logits, (R, C) embeddings times (C, H, W) features, at (R, P, 2) points.

    It needs the points and the two factors, so the logits are not kept for it; the samples are computed before.
    """

    @staticmethod
    def forward(ctx, embeddings, features, points, samples):
        ctx.save_for_backward(embeddings, features, points)
        return samples.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        embeddings, features, points = ctx.saved_tensors
        (C, H, W), pixels = features.shape, features.flatten(1).T.float()  # (H * W, C)
        rows = embeddings.float()
        of_rows = torch.zeros_like(rows)
        of_features = torch.zeros_like(pixels)
        step = chunk_length(H * W, features.device)
        bilinear, zeros = 0, 0
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            # The gradient of bilinear sampling depends on the map's shape alone.
            shape = rows.new_zeros(()).expand(len(rows[some]), 1, H, W)
            grid = _grid(points[some].unsqueeze(2))
            of_samples = gradient[some].unsqueeze(1).unsqueeze(3)
            of_logits, _ = torch.ops.aten.grid_sampler_2d_backward(
                of_samples, shape, grid, bilinear, zeros, False, (True, False)
            )
            of_logits = of_logits.flatten(1)  # (r, H * W)
            torch.mm(of_logits, pixels, out=of_rows[some])
            of_features.addmm_(of_logits.T, rows[some])
        return of_rows.to(embeddings.dtype), of_features.T.view(C, H, W).to(features.dtype), None, None
