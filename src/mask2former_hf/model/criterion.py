"""Set loss of Mask2Former on sampled points (section 3.3 of the paper; the original's `modeling/criterion.py`).

Letters: L supervised layers (the last one is the final prediction), B batch, Q queries, K classes, C channels,
N targets of an image, M = min(Q, N) matched pairs of an image, P points.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cpu_layout import chunk_length
from .mask_logits import DenseMasks, LazyMasks, every_cell, random_points, sample_maps, sample_masks, uncertain_points
from .mask_losses import MaskTerm, loss_weights, mask_terms
from .matcher import assign, matching_costs


class LossSettings(NamedTuple):
    """What `Mask2FormerLoss` computes, and at how many points; `from_config` reads it off a model's config."""

    num_labels: int  # K
    no_object_weight: float  # of the "no object" class in the cross-entropy
    weights: Mapping[str, float]  # of every term by name, in the matching cost (the terms returned are unweighted)
    mask_terms: Mapping[str, MaskTerm]  # those that compare masks, in matching cost and loss
    num_points: int  # P, for the matching cost of an image and for the losses of a matched mask
    num_candidates: int  # points per matched mask that importance sampling chooses from
    num_uncertain: int  # of the P points those that are the most uncertain candidates; the rest is uniform
    matching_on: str = "points"  # or "masks", every cell of the mask logits
    loss_on: str = "points"

    @classmethod
    def from_config(cls, config) -> "LossSettings":
        """From this package's config or transformers'."""
        return cls(
            num_labels=config.num_labels,
            no_object_weight=config.no_object_weight,
            weights=loss_weights(config),
            mask_terms=mask_terms(config),
            num_points=config.train_num_points,
            num_candidates=int(config.train_num_points * config.oversample_ratio),
            num_uncertain=int(config.train_num_points * config.importance_sample_ratio),
            matching_on=getattr(config, "matching_on", "points"),
            loss_on=getattr(config, "loss_on", "points"),
        )


class Target(NamedTuple):
    """What is known about an image."""

    masks: Tensor  # (N, h, w) binary, of any dtype, the top left part of the canvas; the rest is zero
    labels: Tensor  # (N,) int64
    ignored: Tensor | None  # (1, h, w) bool
    canvas: tuple[int, int]

    def sample(self, points: Tensor) -> Tensor:
        """(N, R, P) float32 samples of every mask at (N or 1, R, P, 2) points on the canvas."""
        return sample_masks(self.masks, points, self.canvas)

    def sample_matched(self, matched: Tensor, points: Tensor) -> Tensor:
        """(l, M, P) samples of the masks `matched` (l, M) at their (l, M, P, 2) points."""
        if matched.shape[1] < len(self.masks):  # more targets than queries: each layer has a choice of its own
            return torch.stack(
                [
                    sample_masks(self.masks[chosen], own.unsqueeze(1), self.canvas).squeeze(1)
                    for chosen, own in zip(matched, points, strict=True)
                ]
            )
        order = matched.argsort(1)  # in the order of the targets, a target is sampled for all layers at once
        in_order = points.gather(1, order[..., None, None].expand_as(points)).transpose(0, 1)  # (N, l, P, 2)
        samples = self.sample(in_order).transpose(0, 1)  # (l, N, P)
        return samples.gather(1, matched.unsqueeze(-1).expand_as(samples))

    def weights(self, points: Tensor) -> Tensor | None:
        """Of (R, P, 2) points, (R, P): 0 where the sample touches an ignored pixel, else 1; None for all 1."""
        if self.ignored is None:
            return None
        return (sample_masks(self.ignored, points.unsqueeze(0), self.canvas)[0] == 0).float()


def check_targets(
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    ignore_masks: Sequence[Tensor] | None,
    canvas: tuple[int, int] | None,
    batch_size: int,
    num_labels: int,
    device: torch.device,
) -> list[Target]:
    """A target per image on the device, from the arguments of `Mask2FormerLoss.forward`.

    Raises:
        ValueError: for labels that do not fit.
    """
    ignore_masks = [None] * batch_size if ignore_masks is None else ignore_masks
    given = {"mask_labels": mask_labels, "class_labels": class_labels, "ignore_masks": ignore_masks}
    for name, value in given.items():
        if len(value) != batch_size:
            raise ValueError(f"{name} has {len(value)} entries for a batch of {batch_size} images: give one per image")
    targets = []
    for image, (masks, labels, ignored) in enumerate(zip(mask_labels, class_labels, ignore_masks, strict=True)):
        check_labels(image, masks, labels, num_labels)
        size = tuple(masks.shape[1:])
        own_canvas = size if canvas is None else tuple(canvas)
        _check_sizes(image, size, ignored, own_canvas)
        if ignored is not None:
            ignored = ignored.to(device).bool().unsqueeze(0)
        targets.append(Target(masks.to(device), labels.to(device).long(), ignored, own_canvas))
    return targets


def check_labels(image: int, masks: Tensor, labels: Tensor, num_labels: int, of_clips: bool = False):
    """Shapes and dtypes; values only on the host, where a look at them does not stall the device.

    Of clips masks have frames, and a label may be `num_labels`, "not known".
    """
    if masks.ndim != 3 + of_clips or labels.ndim != 1 or len(masks) != len(labels):
        wanted, whole = ("(N, frames, height, width)", "clip") if of_clips else ("(N, height, width)", "image")
        raise ValueError(
            f"mask_labels[{image}] has shape {tuple(masks.shape)} and class_labels[{image}] has shape "
            f"{tuple(labels.shape)}: they must be {wanted} and (N,) for the N targets of the {whole}"
        )
    if labels.is_floating_point():
        raise ValueError(f"class_labels[{image}] is {labels.dtype}: labels are integers, of dtype torch.int64")
    if masks.device.type == "cpu" and masks.dtype != torch.bool and masks.numel():
        low, high = masks.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"mask_labels[{image}] has values from {low.item()} to {high.item()}: masks are 0 or 1; of a "
                "0 and 255 mask take mask > 0"
            )
    if labels.device.type == "cpu":
        unknown = sorted({label for label in labels.tolist() if not 0 <= label < num_labels + of_clips})
        if unknown:
            repair = (
                f", or {num_labels} for an object whose class is not known"
                if of_clips
                else "; leave out targets without a label"
            )
            raise ValueError(f"class_labels[{image}] contains {unknown}: labels are 0 to {num_labels - 1}{repair}")


def _check_sizes(image: int, size: tuple[int, int], ignored: Tensor | None, canvas: tuple[int, int]):
    if size[0] > canvas[0] or size[1] > canvas[1]:
        raise ValueError(
            f"mask_labels[{image}] is {size[0]}x{size[1]}, larger than the input, {canvas[0]}x{canvas[1]}: "
            "resize masks with their image"
        )
    if ignored is not None and tuple(ignored.shape) != size:
        raise ValueError(
            f"ignore_masks[{image}] has shape {tuple(ignored.shape)}: it must be that of the masks, {size}"
        )


class Mask2FormerLoss(nn.Module):
    """Match queries with targets, then supervise classes and masks of every layer.

    `settings` may be replaced between two calls. `empty_weight` is the buffer that transformers' criterion reads: the
    weight of every class, the last of which is `settings.no_object_weight`, whatever a checkpoint has there.
    """

    lazy_masks = LazyMasks

    def __init__(self, settings: LossSettings):
        super().__init__()
        self.settings = settings
        self.register_buffer("empty_weight", self.initial_weights())

    def initial_weights(self) -> Tensor:
        """(K + 1,) 1 for every class but "no object"."""
        weights = torch.ones(self.settings.num_labels + 1)
        weights[-1:].fill_(self.settings.no_object_weight)  # an assignment would wait for the device
        return weights

    @torch.no_grad()
    def write_no_object_weight(self, weight: float):
        """Into the buffer, for those who read a saved one."""
        self.empty_weight[-1] = weight

    @torch.compiler.disable  # numbers of targets vary and the assignment runs on the host: one break, not many
    def forward(
        self,
        class_logits: Tensor,
        mask_logits: Tensor | DenseMasks | LazyMasks,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
        ignore_masks: Sequence[Tensor] | None = None,
        canvas: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        normalizers: Tensor | None = None,
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
            normalizers: (2,) what the mask terms and the class term are divided by, from `loss_normalizers`, for
                gradient accumulation; counted in this batch if not given.

        Returns:
            `{"loss_cross_entropy"}` and every term of `settings.mask_terms`, each (L,) float32. Mask terms are sums
            over matched masks, divided by the number of targets per process; in training that number and the
            normaliser of the cross-entropy are averaged over `torch.distributed`'s processes.

        Raises:
            ValueError: for labels that do not fit, and for predictions that are not finite.
        """
        masks = DenseMasks(mask_logits) if isinstance(mask_logits, Tensor) else mask_logits
        B, device = class_logits.shape[1], class_logits.device
        targets = self.targets(mask_labels, class_labels, ignore_masks, canvas, B, device)
        with torch.autocast(device.type, enabled=False):
            costs = [self._cost(image, class_logits, masks, target, generator) for image, target in enumerate(targets)]
            matches = assign(costs, class_logits.dtype)
            classes, class_weights = self._class_targets(class_logits, targets, matches), self.class_weights()
            if normalizers is None:
                normalizers = self._normalizers(targets, class_weights[classes])
            num_masks, class_total = normalizers.to(device, torch.float32).split([1, len(normalizers) - 1])
            entropy = F.cross_entropy(
                class_logits.float().flatten(0, 2), classes.flatten(), class_weights, reduction="none"
            )
            losses = {"loss_cross_entropy": entropy.view(len(class_logits), -1).sum(1) / class_total}
            sums = [
                self._mask_sums(image, masks, target, *match, generator)
                for image, (target, match) in enumerate(zip(targets, matches, strict=True))
            ]
            for name in self.settings.mask_terms:
                losses[name] = sum(image[name] for image in sums) / num_masks
        return losses

    def targets(self, mask_labels, class_labels, ignore_masks, canvas, batch_size, device) -> list[Target]:
        return check_targets(
            mask_labels, class_labels, ignore_masks, canvas, batch_size, self.settings.num_labels, device
        )

    def draw_points(
        self,
        purpose: str,
        image: int,
        layers: slice,
        shape: tuple[int, ...],
        device: torch.device,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Uniform points in [0, 1]^2 for one image; `purpose` is "matching", "candidates" or "uniform".

        Points of the matching cost are shared by all layers: (1, P, 2). The losses draw for each of some layers and
        each matched mask: (l, M, points, 2).
        """
        return random_points(shape, device, generator)

    @torch.no_grad()
    def _cost(self, image, class_logits, masks, target, generator) -> Tensor:
        """(L, Q, N) matching costs of an image."""
        (L, _, Q, _), num_points = class_logits.shape, self.settings.num_points
        every = slice(0, L)
        if self.settings.matching_on == "masks":
            points = every_cell(masks.size, class_logits.device).unsqueeze(0)
        else:
            points = self.draw_points(
                "matching", image, every, (1, num_points, 2), class_logits.device, generator
            )  # (1 or L, P, 2)
        point_targets = target.sample(points.unsqueeze(0)).transpose(0, 1)  # (1 or L, N, P)
        weights = target.weights(points)
        chunks = _chunks(L, 3 * Q * point_targets.shape[-1], points.device)  # logits and two temporaries
        costs = []
        for layers, point_logits in zip(chunks, masks.at_points(image, points, chunks), strict=True):
            own = every if len(points) == 1 else layers
            costs.append(
                matching_costs(
                    class_logits[layers, image],
                    point_logits,
                    target.labels,
                    point_targets[own],
                    None if weights is None else weights[own],
                    self.settings.weights,
                    self.settings.mask_terms,
                )
            )
        return torch.cat(costs)

    def normalizers(self, batches: Sequence[dict], num_queries: int) -> Tensor:
        """`loss_normalizers` of several micro-batches."""
        labels = [labels for batch in batches for labels in batch["class_labels"]]
        return loss_normalizers(labels, num_queries, self.class_weights())

    def _class_targets(self, class_logits, targets, matches) -> Tensor:
        """(L, B, Q) class that each query should say."""
        classes = class_logits.new_full(class_logits.shape[:-1], self.settings.num_labels, dtype=torch.long)
        for image, (queries, matched) in enumerate(matches):
            classes[:, image].scatter_(1, queries, targets[image].labels[matched])
        return classes

    def class_weights(self) -> Tensor:
        """(K + 1,) float32; a checkpoint may weigh its classes, but the config says what "no object" weighs."""
        weights = self.empty_weight.float().clone()
        weights[-1:].fill_(self.settings.no_object_weight)  # an assignment would wait for the device
        return weights

    def _normalizers(self, targets, query_weights) -> Tensor:
        """(1 + L,) number of targets, and weight of all queries of each layer: labels may be weighted differently."""
        totals = query_weights.sum((1, 2))
        totals = torch.cat([totals.new_full((1,), sum(len(target.labels) for target in targets)), totals])
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
            totals = totals / torch.distributed.get_world_size()
        num_masks, class_totals = totals.split([1, len(totals) - 1])
        return torch.cat([num_masks.clamp(min=1), class_totals])

    def _mask_sums(self, image, masks, target, queries, matched, generator) -> dict[str, Tensor]:
        """Sums of every mask term over the matched masks of an image, each (L,)."""
        L, M = queries.shape
        largest = max(masks.size[0] * masks.size[1], 2 * self.settings.num_candidates)
        chunks = []
        with torch.no_grad():
            for layers in _chunks(L, M * largest, queries.device):
                logits, some = masks.of_queries(image, layers, queries[layers]), matched[layers]
                points = self._loss_points(image, layers, logits, some.shape, target, generator)
                targets = target.sample_matched(some, points).flatten(0, 1)  # (lM, P)
                points = points.flatten(0, 1)  # (lM, P, 2)
                samples = sample_maps(logits.unsqueeze(1), points).squeeze(1)
                chunks.append((points, samples, targets, target.weights(points)))
                del logits
        points, samples, targets, weights = zip(*chunks, strict=True)
        samples = masks.sample(image, queries, torch.cat(points), torch.cat(samples))  # (LM, P)
        rows = list(zip(samples.split([len(chunk) for chunk in targets]), targets, weights, strict=True))
        return {
            name: torch.cat([term.rows(*chunk) for chunk in rows]).view(L, M).sum(1)
            for name, term in self.settings.mask_terms.items()
        }

    def _loss_points(self, image, layers, logits, shape, target, generator) -> Tensor:
        """The most uncertain of many uniform candidates, then uniform ones (PointRend, section 3.2), (l, M, P, 2)."""
        settings, device = self.settings, logits.device
        if settings.loss_on == "masks":
            return every_cell(logits.shape[-2:], device).expand(*shape, -1, -1)
        candidates = self.draw_points(
            "candidates", image, layers, (*shape, settings.num_candidates, 2), device, generator
        ).flatten(0, 1)
        num_uniform = settings.num_points - settings.num_uncertain
        uniform = self.draw_points("uniform", image, layers, (*shape, num_uniform, 2), device, generator)
        uncertain = uncertain_points(logits, candidates, target.weights(candidates), settings.num_uncertain)
        return torch.cat([uncertain.unflatten(0, shape), uniform], dim=2)


def _chunks(num_layers: int, elements_per_layer: int, device: torch.device) -> list[slice]:
    step = chunk_length(elements_per_layer, device)
    return [slice(start, min(start + step, num_layers)) for start in range(0, num_layers, step)]


def loss_normalizers(class_labels: Sequence[Tensor], num_queries: int, class_weights: Tensor) -> Tensor:
    """(2,) float32 sums that the loss of all these images is divided by: number of targets, weight of all queries.

    Micro-batches whose losses are all divided by the sums of the whole batch add up to the batch's loss. With several
    processes, whose gradients are averaged, add the sums up and divide by the number of processes.

    Args:
        class_labels: of all images of all micro-batches.
        num_queries: of the model; of more targets in an image, which of them are matched is not known yet, and their
            mean weight counts.
        class_weights: (K + 1,) `Mask2FormerLoss.class_weights`.

    Returns:
        on the device of `class_weights`.
    """
    num_targets, total = sum(len(labels) for labels in class_labels), class_weights.new_zeros(())
    for labels in class_labels:
        matched = min(len(labels), num_queries)
        weight = class_weights[labels.to(class_weights.device)].sum() * (matched / max(len(labels), 1))
        total = total + weight + (num_queries - matched) * class_weights[-1]
    return torch.stack([total.new_tensor(max(num_targets, 1)), total]).float()
