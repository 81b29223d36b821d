"""Set loss of Mask2Former on sampled points (section 3.3 of the paper; the original's `modeling/criterion.py`).

Letters: L supervised layers (the last one is the final prediction), B batch, Q queries, K classes, C channels,
N targets of an image, M = min(Q, N) matched pairs of an image, P points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .matcher import assign, matching_costs


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (R, C, H, W) `maps` at (R, P, 2) `points`, (R, C, P).

    Points are (x, y) in [0, 1], the outer edges of the map; outside counts as zero (the original's `point_sample`).
    """
    return F.grid_sample(maps, 2 * points.unsqueeze(2) - 1, mode="bilinear", align_corners=False).squeeze(3)


def sample_masks(masks: Tensor, points: Tensor, canvas: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Bilinear samples of masks that are stored compactly, without a float copy of them.

    Args:
        masks: (N, h, w) of any dtype, the top left part of the canvas; the rest of the canvas is zero.
        points: (1, P, 2) for all masks or, with `rows`, (R, P, 2), as (x, y) in [0, 1], the canvas' outer edges.
        canvas: (H, W), at least (h, w).
        rows: (R,) the mask that each row of points samples.

    Returns:
        (N, P) or (R, P) float32, equal to sampling the zero-padded masks.
    """
    N, h, w = masks.shape
    flat = masks.reshape(N, h * w)
    position_x, position_y = points[..., 0] * canvas[1] - 0.5, points[..., 1] * canvas[0] - 0.5
    left, top = position_x.floor(), position_y.floor()
    fraction_x, fraction_y = position_x - left, position_y - top
    left, top = left.long(), top.long()
    samples = 0.0
    for dy, weight_y in ((0, 1 - fraction_y), (1, fraction_y)):
        for dx, weight_x in ((0, 1 - fraction_x), (1, fraction_x)):
            x, y = left + dx, top + dy
            inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
            index = torch.where(inside, y * w + x, 0)
            values = flat[:, index[0]] if rows is None else flat[rows.unsqueeze(1), index]
            samples = samples + values.to(points.dtype) * (weight_x * weight_y * inside)
    return samples


class DenseMasks:
    """Mask logits that exist in full, (L, B, Q, H, W)."""

    def __init__(self, logits: Tensor):
        self.logits, self.num_layers = logits, len(logits)

    def at_points(self, image: int, points: Tensor) -> Tensor:
        """(L, Q, P) float32 logits of an image at (L or 1, P, 2) points."""
        return sample_maps(self.logits[:, image].float(), points.expand(self.num_layers, -1, -1))

    def of_queries(self, image: int, queries: Tensor) -> Tensor:
        """(L, M, H, W) float32 logits of (L, M) queries of an image."""
        layers = torch.arange(self.num_layers, device=queries.device).unsqueeze(1)
        return self.logits[layers, image, queries].float()


class LazyMasks:
    """Mask logits as a product not carried out: (L, B, Q, C) embeddings times (B, C, H, W) features.

    Sampling and the product are both linear, so features are sampled first and multiplied there.
    """

    def __init__(self, embeddings: Tensor, features: Tensor):
        self.embeddings, self.features, self.num_layers = embeddings, features, len(embeddings)

    def at_points(self, image: int, points: Tensor) -> Tensor:
        features = self.features[image].float().expand(len(points), -1, -1, -1)
        return self.embeddings[:, image].float() @ sample_maps(features, points)  # (L, Q, P)

    def of_queries(self, image: int, queries: Tensor) -> Tensor:
        layers = torch.arange(self.num_layers, device=queries.device).unsqueeze(1)
        embeddings = self.embeddings[layers, image, queries].float()  # (L, M, C)
        return torch.einsum("lmc,chw->lmhw", embeddings, self.features[image].float())


class Mask2FormerLoss(nn.Module):
    """Match queries with targets, then supervise classes and masks of every layer.

    Args:
        num_labels: K.
        no_object_weight: weight of the "no object" class in the cross-entropy.
        class_weight, mask_weight, dice_weight: weights of the matching cost (the terms returned are unweighted).
        num_points: P, for the matching cost of an image and for the losses of a matched mask.
        oversample_ratio: candidates per point for importance sampling.
        importance_sample_ratio: share of points that are the most uncertain candidates; the rest is uniform.
    """

    def __init__(
        self,
        num_labels: int,
        no_object_weight: float = 0.1,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ):
        super().__init__()
        self.num_labels, self.no_object_weight = num_labels, no_object_weight
        self.cost_weights = {"class_weight": class_weight, "mask_weight": mask_weight, "dice_weight": dice_weight}
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_sample_ratio)
        weights = torch.ones(num_labels + 1)
        weights[-1] = no_object_weight
        self.register_buffer("empty_weight", weights)

    def forward(
        self,
        class_logits: Tensor,
        mask_logits: Tensor | DenseMasks | LazyMasks,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        ignore_masks: Sequence[Tensor] | None = None,
        canvas: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Unweighted loss terms of every layer.

        Args:
            class_logits: (L, B, Q, K + 1).
            mask_logits: (L, B, Q, H, W), or a `LazyMasks`.
            mask_labels: per image (N, h, w) binary masks of any dtype, the top left part of the canvas.
            class_labels: per image (N,) int64 in 0 .. K - 1.
            ignore_masks: per image (h, w), nonzero where no statement is made; any sample that touches such a pixel
                takes no part in matching and losses.
            canvas: (H, W) of the padded images that the network saw; the size of each image's masks if not given.
            generator: source of the random points.

        Returns:
            `{"loss_cross_entropy", "loss_mask", "loss_dice"}`, each (L,) float32. Mask terms are sums over matched
            masks, divided by the number of targets per process; in training that number and the normaliser of the
            cross-entropy are averaged over `torch.distributed`'s processes.

        Raises:
            ValueError: for labels that do not fit, and for predictions that are not finite.
        """
        masks = DenseMasks(mask_logits) if isinstance(mask_logits, Tensor) else mask_logits
        targets = self._targets(class_logits, mask_labels, class_labels, ignore_masks, canvas)
        with torch.autocast(class_logits.device.type, enabled=False):
            costs = [self._cost(image, class_logits, masks, target, generator) for image, target in enumerate(targets)]
            matches = assign(costs, class_logits.dtype)
            labels = [labels for _, labels, _, _ in targets]
            num_masks, class_normaliser, classes = self._class_targets(class_logits, labels, matches)
            entropy = F.cross_entropy(
                class_logits.float().flatten(0, 2), classes.flatten(), self.empty_weight.float(), reduction="none"
            )
            loss_class = entropy.view(len(class_logits), -1).sum(1) / class_normaliser
            loss_mask, loss_dice = 0.0, 0.0
            for image, (target, match) in enumerate(zip(targets, matches, strict=True)):
                mask_sum, dice_sum = self._mask_losses(image, masks, target, match, generator)
                loss_mask, loss_dice = loss_mask + mask_sum, loss_dice + dice_sum
        return {
            "loss_cross_entropy": loss_class,
            "loss_mask": loss_mask / num_masks,
            "loss_dice": loss_dice / num_masks,
        }

    def draw_points(
        self, purpose: str, image: int, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
    ) -> Tensor:
        """Uniform points in [0, 1]^2 for one image; `purpose` is "matching", "candidates" or "uniform".

        Points of the matching cost are shared by all layers: (1, P, 2). The losses draw for each layer and matched
        mask: (L, M, points, 2).
        """
        return torch.rand(shape, device=device, generator=generator)

    def _targets(self, class_logits, mask_labels, class_labels, ignore_masks, canvas):
        B, device = class_logits.shape[1], class_logits.device
        ignore_masks = [None] * B if ignore_masks is None else ignore_masks
        given = {"mask_labels": mask_labels, "class_labels": class_labels, "ignore_masks": ignore_masks}
        for name, value in given.items():
            if len(value) != B:
                raise ValueError(f"{name} has {len(value)} entries for a batch of {B} images: give one per image")
        targets = []
        for image in range(B):
            masks, labels, ignored = mask_labels[image].to(device), class_labels[image].to(device), ignore_masks[image]
            if masks.ndim != 3 or labels.ndim != 1 or len(masks) != len(labels):
                raise ValueError(
                    f"mask_labels[{image}] has shape {tuple(masks.shape)} and class_labels[{image}] has shape "
                    f"{tuple(labels.shape)}: they must be (N, height, width) and (N,) for the N targets of the image"
                )
            if class_labels[image].device.type == "cpu":  # elsewhere a look at the values would stall the device
                unknown = sorted({label for label in labels.tolist() if not 0 <= label < self.num_labels})
                if unknown:
                    raise ValueError(
                        f"class_labels[{image}] contains {unknown}: labels are 0 to {self.num_labels - 1}; leave out "
                        "targets without a label"
                    )
            size = tuple(masks.shape[1:])
            frame = size if canvas is None else tuple(canvas)
            if size[0] > frame[0] or size[1] > frame[1]:
                raise ValueError(
                    f"mask_labels[{image}] is {size[0]}x{size[1]}, larger than the input, {frame[0]}x{frame[1]}: "
                    "resize masks with their image"
                )
            if ignored is not None:
                ignored = ignored.to(device)
                if tuple(ignored.shape) != size:
                    raise ValueError(
                        f"ignore_masks[{image}] has shape {tuple(ignored.shape)}: it must be that of the masks, {size}"
                    )
                ignored = ignored.bool().unsqueeze(0)  # (1, h, w)
            targets.append((masks, labels.long(), ignored, frame))
        return targets

    @torch.no_grad()
    def _cost(self, image, class_logits, masks, target, generator):
        target_masks, labels, ignored, canvas = target
        points = self.draw_points("matching", image, (1, self.num_points, 2), class_logits.device, generator)
        num_draws = len(points)
        flat = points.reshape(1, -1, 2)
        weights = _weights(ignored, flat, canvas).view(num_draws, -1)  # (1, P)
        point_targets = sample_masks(target_masks, flat, canvas).unflatten(1, (num_draws, -1)).transpose(0, 1)
        point_logits = masks.at_points(image, points)  # (L, Q, P)
        return matching_costs(
            class_logits[:, image], point_logits, labels, point_targets, weights, **self.cost_weights
        )  # (L, Q, N)

    def _class_targets(self, class_logits, class_labels, matches):
        L, B, Q, _ = class_logits.shape
        classes = class_logits.new_full((L, B, Q), self.num_labels, dtype=torch.long)
        for image, (queries, targets) in enumerate(matches):
            classes[:, image].scatter_(1, queries, class_labels[image][targets])
        # Every layer matches the same number of queries, but labels may be weighted differently: one sum per layer.
        class_normaliser = self.empty_weight.float()[classes].sum((1, 2))  # (L,)
        num_masks = class_normaliser.new_tensor([sum(len(labels) for labels in class_labels)])
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            totals = torch.cat([num_masks, class_normaliser])
            torch.distributed.all_reduce(totals)
            totals = totals / torch.distributed.get_world_size()
            num_masks, class_normaliser = totals[:1], totals[1:]
        return num_masks.clamp(min=1), class_normaliser, classes

    def _mask_losses(self, image, masks, target, match, generator):
        """Sums over the matched masks of an image, two (L,) tensors."""
        target_masks, _, ignored, canvas = target
        queries, matched = match
        L, M = queries.shape
        logits = masks.of_queries(image, queries).flatten(0, 1).unsqueeze(1)  # (LM, 1, H, W)
        with torch.no_grad():
            points = self._loss_points(image, logits, (L, M), ignored, canvas, generator)  # (LM, P, 2)
            targets = sample_masks(target_masks, points, canvas, rows=matched.flatten())  # (LM, P)
            weights = _weights(ignored, points.flatten(0, 1).unsqueeze(0), canvas).view(points.shape[:2])
        samples = sample_maps(logits, points).squeeze(1)  # (LM, P)
        entropy = F.binary_cross_entropy_with_logits(samples, targets, reduction="none")
        entropy = (entropy * weights).sum(1) / weights.sum(1).clamp(min=1)
        probabilities = samples.sigmoid() * weights
        overlap = (probabilities * targets).sum(1)
        dice = 1 - (2 * overlap + 1) / (probabilities.sum(1) + (targets * weights).sum(1) + 1)
        return entropy.view(L, M).sum(1), dice.view(L, M).sum(1)

    def _loss_points(self, image, logits, layers_and_matches, ignored, canvas, generator):
        """The most uncertain of many uniform candidates, then uniform ones (PointRend, section 3.2), (LM, P, 2)."""
        device, num_uniform = logits.device, self.num_points - self.num_uncertain
        candidates = self.draw_points(
            "candidates", image, (*layers_and_matches, self.num_candidates, 2), device, generator
        ).flatten(0, 1)
        uniform = self.draw_points("uniform", image, (*layers_and_matches, num_uniform, 2), device, generator)
        certainty = sample_maps(logits, candidates).squeeze(1).abs()  # (LM, candidates)
        if ignored is not None:
            weights = _weights(ignored, candidates.flatten(0, 1).unsqueeze(0), canvas).view_as(certainty)
            certainty = certainty.masked_fill(weights == 0, float("inf"))
        chosen = certainty.topk(self.num_uncertain, dim=1, largest=False).indices
        chosen = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
        return torch.cat([chosen, uniform.flatten(0, 1)], dim=1)


def _weights(ignored: Tensor | None, points: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(1, P) float32: 0 at points whose bilinear sample touches an ignored pixel, else 1; points are (1, P, 2)."""
    if ignored is None:
        return points.new_ones(points.shape[:2])
    return (sample_masks(ignored, points, canvas) == 0).float()
