"""Set loss of Mask2Former on sampled points (section 3.3 of the paper; the original's `modeling/criterion.py`).

Letters: L supervised layers (the last one is the final prediction), B batch, Q queries, K classes, C channels,
N targets of an image, M = min(Q, N) matched pairs of an image, P points.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .matcher import assign, focal_halves, matching_costs


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of (R, C, H, W) `maps` at (R, P, 2) `points`, (R, C, P).

    Points are (x, y) in [0, 1], the outer edges of the map; outside counts as zero (the original's `point_sample`).
    """
    return F.grid_sample(maps, _grid(points.unsqueeze(2)), mode="bilinear", align_corners=False).squeeze(3)


def _grid(points: Tensor) -> Tensor:
    return (2 * points).sub_(1)  # what grid_sample takes, with one temporary


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
        points = points * points.new_tensor([canvas[1] / w, canvas[0] / h])
    grids = _grid(points).expand(N, -1, -1, -1)
    chunk = max(1, _elements_at_once(masks.device) // max(1, h * w))
    samples = [
        F.grid_sample(some.unsqueeze(1).float(), grid, mode="bilinear", align_corners=False).squeeze(1)
        for some, grid in zip(masks.split(chunk), grids.split(chunk), strict=True)
    ]
    return torch.cat(samples) if N else points.new_zeros(0, *grids.shape[1:3])


def _elements_at_once(device: torch.device) -> int:
    """How many float32 the temporaries of a chunk may take: on CPUs below 32 MB, where the allocator starts to return
    memory to the system and every use pays for fresh pages; elsewhere enough to keep the device busy."""
    return 2**22 if device.type == "cpu" else 2**25


class _SampledProduct(torch.autograd.Function):
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
        step = max(1, _elements_at_once(features.device) // (H * W))
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
        features = self.features[image].float().unsqueeze(0)
        if features.device.type == "cpu":  # where sampling is several times as fast with channels innermost
            features = features.contiguous(memory_format=torch.channels_last)
        sampled = sample_maps(features.expand(len(points), -1, -1, -1), points)  # (L or 1, C, P)
        for layers in chunks:
            embeddings = self.embeddings[layers, image].float()  # (l, Q, C)
            if len(points) == 1:  # one product of all rows: a batch of them takes twice as long on CPUs
                yield (embeddings.flatten(0, 1) @ sampled[0]).unflatten(0, embeddings.shape[:2])
            else:
                yield embeddings @ sampled[layers]

    def of_queries(self, image: int, layers: slice, queries: Tensor) -> Tensor:
        embeddings, features = self._rows(image, layers, queries), self.features[image]
        with torch.no_grad():
            return (embeddings.float() @ features.flatten(1).float()).unflatten(1, self.size)

    def sample(self, image: int, queries: Tensor, points: Tensor, samples: Tensor) -> Tensor:
        return _SampledProduct.apply(self._rows(image, slice(None), queries), self.features[image], points, samples)

    def _rows(self, image, layers, queries):
        embeddings = self.embeddings[layers, image]
        return embeddings.gather(1, queries.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])).flatten(0, 1)


class Mask2FormerLoss(nn.Module):
    """Match queries with targets, then supervise classes and masks of every layer.

    Args:
        num_labels: K.
        no_object_weight: weight of the "no object" class in the cross-entropy.
        class_weight, mask_weight, dice_weight: weights of the matching cost (the terms returned are unweighted).
        num_points: P, for the matching cost of an image and for the losses of a matched mask.
        oversample_ratio: candidates per point for importance sampling.
        importance_sample_ratio: share of points that are the most uncertain candidates; the rest is uniform.
        focal: (alpha, gamma) for the focal loss instead of cross-entropy as mask term, in matching cost and loss.
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
        focal: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.num_labels, self.no_object_weight = num_labels, no_object_weight
        self.cost_weights = {"class_weight": class_weight, "mask_weight": mask_weight, "dice_weight": dice_weight}
        self.num_points, self.focal = num_points, focal
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_sample_ratio)
        weights = torch.ones(num_labels + 1)
        weights[-1] = no_object_weight
        self.register_buffer("empty_weight", weights)

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
            num_masks, class_normaliser, classes = self._class_targets(class_logits, labels, matches, normalizers)
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
            if labels.is_floating_point():
                raise ValueError(f"class_labels[{image}] is {labels.dtype}: labels are integers, of dtype torch.int64")
            given = mask_labels[image]
            if given.device.type == "cpu" and given.dtype != torch.bool and given.numel():
                low, high = given.aminmax()
                if not (low >= 0 and high <= 1):
                    raise ValueError(
                        f"mask_labels[{image}] has values from {low.item()} to {high.item()}: masks are 0 or 1; of a "
                        "0 and 255 mask take mask > 0"
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
        L, _, Q, _ = class_logits.shape
        every = slice(0, L)
        points = self.draw_points(
            "matching", image, every, (1, self.num_points, 2), class_logits.device, generator
        )  # (1 or L, P, 2)
        point_targets = sample_masks(target_masks, points.unsqueeze(0), canvas).transpose(0, 1)  # (1 or L, N, P)
        weights = _weights(ignored, points, canvas)
        shared = len(points) == 1
        temporaries = 3 * Q * self.num_points  # logits, probabilities and cross-entropies
        chunks = self._chunks(L, temporaries, class_logits.device)
        costs = []
        for layers, point_logits in zip(chunks, masks.at_points(image, points, chunks), strict=True):
            own = every if shared else layers
            costs.append(
                matching_costs(
                    class_logits[layers, image],
                    point_logits,
                    labels,
                    point_targets[own],
                    None if weights is None else weights[own],
                    **self.cost_weights,
                    focal=self.focal,
                )
            )
        return torch.cat(costs)  # (L, Q, N)

    def _chunks(self, num_layers: int, elements_per_layer: int, device: torch.device) -> list[slice]:
        step = max(1, _elements_at_once(device) // max(1, elements_per_layer))
        return [slice(start, min(start + step, num_layers)) for start in range(0, num_layers, step)]

    def _class_targets(self, class_logits, class_labels, matches, normalizers):
        L, B, Q, _ = class_logits.shape
        classes = class_logits.new_full((L, B, Q), self.num_labels, dtype=torch.long)
        for image, (queries, targets) in enumerate(matches):
            classes[:, image].scatter_(1, queries, class_labels[image][targets])
        if normalizers is not None:
            return *normalizers.to(class_logits.device, torch.float32), classes
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
        largest = max(masks.size[0] * masks.size[1], 2 * self.num_candidates)
        chunks = []
        with torch.no_grad():
            for layers in self._chunks(L, M * largest, queries.device):
                logits, some = masks.of_queries(image, layers, queries[layers]), matched[layers]
                points = self._loss_points(image, layers, logits, some.shape, ignored, canvas, generator)
                targets = _sample_matched(target_masks, some, points, canvas).flatten(0, 1)  # (lM, P)
                points = points.flatten(0, 1)  # (lM, P, 2)
                samples = sample_maps(logits.unsqueeze(1), points).squeeze(1)
                chunks.append((points, samples, targets, _weights(ignored, points, canvas)))
                del logits
        points, samples, targets, weights = zip(*chunks, strict=True)
        samples = masks.sample(image, queries, torch.cat(points), torch.cat(samples))  # (LM, P)
        parts = samples.split([len(chunk) for chunk in targets])
        sums = [self._row_losses(*rows) for rows in zip(parts, targets, weights, strict=True)]
        return tuple(torch.cat(terms).view(L, M).sum(1) for terms in zip(*sums, strict=True))

    def _row_losses(self, samples, targets, weights):
        """Mask and dice term of every row of (R, P) samples, two (R,) tensors."""
        if self.focal is None:
            entropy = F.binary_cross_entropy_with_logits(samples, targets, reduction="none")
        else:
            positive, negative = focal_halves(samples, self.focal)
            entropy = targets * positive + (1 - targets) * negative
        probabilities = samples.sigmoid()
        if weights is None:
            entropy = entropy.mean(1)
        else:
            entropy = (entropy * weights).sum(1) / weights.sum(1).clamp(min=1)
            probabilities, targets = probabilities * weights, targets * weights
        overlap = (probabilities * targets).sum(1)
        return entropy, 1 - (2 * overlap + 1) / (probabilities.sum(1) + targets.sum(1) + 1)

    def _loss_points(self, image, layers, logits, shape, ignored, canvas, generator):
        """The most uncertain of many uniform candidates, then uniform ones (PointRend, section 3.2), (l, M, P, 2)."""
        device, num_uniform = logits.device, self.num_points - self.num_uncertain
        candidates = self.draw_points(
            "candidates", image, layers, (*shape, self.num_candidates, 2), device, generator
        ).flatten(0, 1)
        uniform = self.draw_points("uniform", image, layers, (*shape, num_uniform, 2), device, generator)
        certainty = sample_maps(logits.unsqueeze(1), candidates).squeeze(1).abs_()  # (lM, candidates)
        weights = _weights(ignored, candidates, canvas)
        if weights is not None:
            certainty = certainty.masked_fill(weights == 0, float("inf"))
        chosen = certainty.topk(self.num_uncertain, dim=1, largest=False, sorted=False).indices
        chosen = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
        return torch.cat([chosen.unflatten(0, shape), uniform], dim=2)


def loss_normalizers(class_labels: Sequence[Tensor], num_queries: int, no_object_weight: float) -> Tensor:
    """(2,) float32 sums that the loss of all these images is divided by: number of targets, weight of all queries.

    Micro-batches whose losses are all divided by the sums of the whole batch add up to the batch's loss. With several
    processes, whose gradients are averaged, add the sums up and divide by the number of processes.

    Args:
        class_labels: of all images of all micro-batches.
        num_queries, no_object_weight: the model's; every other class counts 1.
    """
    targets = [len(labels) for labels in class_labels]
    matched = sum(min(count, num_queries) for count in targets)
    unmatched = len(targets) * num_queries - matched
    return torch.tensor([max(sum(targets), 1), matched + no_object_weight * unmatched], dtype=torch.float32)


def _sample_matched(masks: Tensor, matched: Tensor, points: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(l, M, P) samples of the targets `matched` (l, M) at their (l, M, P, 2) points."""
    if matched.shape[1] < len(masks):  # more targets than queries: each layer has a choice of its own
        return torch.stack(
            [
                sample_masks(masks[chosen], own.unsqueeze(1), canvas).squeeze(1)
                for chosen, own in zip(matched, points, strict=True)
            ]
        )
    order = matched.argsort(1)  # in the order of the targets, a target is sampled for all layers at once
    in_order = points.gather(1, order[..., None, None].expand_as(points)).transpose(0, 1)  # (N, l, P, 2)
    samples = sample_masks(masks, in_order, canvas).transpose(0, 1)  # (l, N, P)
    return samples.gather(1, matched.unsqueeze(-1).expand_as(samples))


def _weights(ignored: Tensor | None, points: Tensor, canvas: tuple[int, int]) -> Tensor | None:
    """Of (R, P, 2) points, (R, P): 0 where the bilinear sample touches an ignored pixel, else 1; None for all 1."""
    return None if ignored is None else (sample_masks(ignored, points.unsqueeze(0), canvas)[0] == 0).float()
