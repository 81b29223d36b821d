"""Distillation: a student learns the answers of a frozen teacher, beside the labels or instead of them.

The teacher's queries take the place of the targets: they are matched with the student's by the assignment of the
labelled loss, whose costs here are the very terms that are minimised. For a matched pair of a teacher query t and a
student query s, at temperature T:

    class     T^2 KL(softmax(t / T) || softmax(s / T))         (Hinton et al., 2015)
    mask      KL of the pixels' probabilities: cross-entropy with the teacher's soft mask minus the mask's own entropy
    dice      1 - (2 sum(p q) + 1) / (sum(p^2) + sum(q^2) + 1)

so that each term is 0 where the student says what the teacher says. (The labelled loss' dice has p and q in its
denominator, not their squares, and is not 0 for equal masks unless they are 0 and 1.) Masks count for the teacher's
confident queries, at points of which most are where the student is uncertain; the other queries of the teacher teach
their classes only, with the weight of "no object". Queries that the student has beyond the teacher's learn "no
object"; of a teacher with more queries the surest are taken.

Letters: L layers, B batch, Q queries of the student, R of the teacher, N of them confident, K classes, P points.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.criterion import LossSettings
from ..model.design_rules import classifies_pixels
from ..model.mask_logits import DenseMasks, most_uncertain, sample_maps
from ..model.mask_losses import short_name
from ..model.matcher import assign
from .teacher import Answer, Teacher

NEVER = -100.0  # logit of a class that is not the answer


class Distillation(nn.Module):
    """Loss terms by which a student follows a teacher; call it with the student's output and the batch.

    Args:
        teacher: a Mask2FormerForUniversalSegmentation with the student's classes; frozen, in half precision on a GPU.
        student: the model in training. Needed where its output has no mask logits (training with labels, unless
            `output_auxiliary_logits=True`): the masks are then sampled from its mask features, without making them.
            Also checked for equal classes.
        weight: of all terms.
        temperature: of the class distributions.
        confidence, cache, dtype: see `training.teacher.Teacher`.
        feature_weight: of a term for the mask features, 1 - cosine at random points, 0 for none. Features of other
            channels go through a linear layer first, which is this module's only parameter: give
            `distillation.parameters()` to the optimizer.

    The weights among the terms, their points and the weight of "no object" are those of the student's config, or
    without a student the teacher's.

    Raises:
        ValueError: if teacher and student have different classes, or a number makes no sense.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | None = None,
        weight: float = 1.0,
        temperature: float = 2.0,
        confidence: float = 0.5,
        feature_weight: float = 0.0,
        cache: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be positive; 1 leaves the distributions as they are")
        for name, value in (("weight", weight), ("feature_weight", feature_weight)):
            if value < 0:
                raise ValueError(f"{name}={value}: must be 0 or more")
        student = getattr(student, "module", student)  # as DistributedDataParallel wraps it
        config = teacher.config if student is None else student.config
        if classifies_pixels(config) or classifies_pixels(teacher.config):
            raise ValueError("teacher and student must have head_type='masks': others match nothing")
        if student is not None and dict(config.id2label) != dict(teacher.config.id2label):
            raise ValueError(
                f"the teacher has {teacher.config.num_labels} classes and the student {config.num_labels}, or their "
                "names differ: id2label must be equal"
            )
        self._student = [student]  # in a list: neither model is a part of this module, its state or its parameters
        self._teacher = [Teacher(teacher, confidence, cache, dtype, keep_features=feature_weight > 0)]
        self.weight, self.temperature, self.feature_weight = weight, temperature, feature_weight
        self._config = config
        self.projection = None
        if feature_weight and config.mask_feature_size != teacher.config.mask_feature_size:
            self.projection = nn.Linear(config.mask_feature_size, teacher.config.mask_feature_size)

    @property
    def settings(self) -> LossSettings:
        """The labelled loss', by the config as it is now."""
        return LossSettings.from_config(self._config)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0].model

    @property
    def uses_cache(self) -> bool:
        """Whether batches need `image_ids` (`training.teacher.WithImageIds`)."""
        return self._teacher[0].cache is not None

    def forward(self, outputs, batch: Mapping, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weighted terms, to be added to the loss.

        Args:
            outputs: the student's for the batch. All layers that it has learn: the earlier ones are in
                `auxiliary_logits`, or in `transformer_decoder_hidden_states` if a student was given.
            batch: `pixel_values`, and if there are any `pixel_mask` and (for the cache) `image_ids`; no labels.
            generator: source of the random points.

        Returns:
            {"distillation_class", "distillation_mask", "distillation_dice"}, sums over the layers, and with a
            feature weight "distillation_features"; all scalars.

        Raises:
            ValueError: for an output without masks and no student, and other numbers of classes.
        """
        answers = self._teacher[0].answers(batch["pixel_values"], batch.get("pixel_mask"), batch.get("image_ids"))
        class_logits, masks = self._predictions(outputs)
        answers = [answer.surest(class_logits.shape[2]) for answer in answers]
        extents = outputs.image_sizes / outputs.canvas_sizes.amax(0)  # (B, 2) part of the mask logits that is image
        device = class_logits.device
        with torch.autocast(device.type, enabled=False):
            points, costs = [], []
            for image, answer in enumerate(answers):
                points.append(torch.rand(1, self.settings.num_points, 2, device=device, generator=generator))
                costs.append(self._cost(image, class_logits, masks, answer, points[-1], extents[image]))
            matches = assign(costs, class_logits.dtype)
            sums = class_logits.new_zeros(4, dtype=torch.float32)  # class, its weights, mask, dice
            for image, (answer, match) in enumerate(zip(answers, matches, strict=True)):
                sums = sums + self._image_sums(image, class_logits, masks, answer, match, extents[image], generator)
            num_masks = sums.new_tensor([sum(len(answer.mask_logits) for answer in answers)])
            num_masks, weight = _mean_over_processes(num_masks, sums[1:2].detach() / len(class_logits))
            terms = {
                "loss_cross_entropy": sums[0] / weight[0],
                "loss_mask": sums[2] / num_masks[0].clamp(min=1),
                "loss_dice": sums[3] / num_masks[0].clamp(min=1),
            }
            weights = self.settings.weights
            terms = {f"distillation_{short_name(name)}": weights[name] * term for name, term in terms.items()}
            if self.feature_weight:
                terms["distillation_features"] = self.feature_weight * self._feature_term(
                    outputs.pixel_decoder_last_hidden_state, answers, points, extents
                )
        return {name: self.weight * term for name, term in terms.items()}

    def _predictions(self, outputs):
        """(L, B, Q, K + 1) class logits and the masks of the layers that the output offers."""
        student = self._student[0]
        if outputs.masks_queries_logits is not None:
            layers = [*(outputs.auxiliary_logits or ()), outputs]
            class_logits = torch.stack([layer["class_queries_logits"] for layer in layers])
            masks = DenseMasks(torch.stack([layer["masks_queries_logits"] for layer in layers]))
        elif student is None:
            raise ValueError(
                "the output has no masks_queries_logits, as in training with labels: give Distillation the student, "
                "or call the model with output_auxiliary_logits=True"
            )
        else:
            states = outputs.transformer_decoder_hidden_states or (outputs.transformer_decoder_last_hidden_state,)
            class_logits, masks = student.predictions(
                torch.stack(tuple(states)), outputs.pixel_decoder_last_hidden_state
            )
        num_labels = self.settings.num_labels
        if class_logits.shape[-1] != num_labels + 1:
            raise ValueError(
                f"the output has {class_logits.shape[-1] - 1} classes and the teacher {num_labels}: they must "
                "be the same classes"
            )
        return class_logits, masks

    @torch.no_grad()
    def _cost(self, image, class_logits, masks, answer: Answer, points, extent) -> Tensor:
        """What each pair would add to the loss, (L, Q, R)."""
        log_student = (class_logits[:, image].float() / self.temperature).log_softmax(-1)  # (L, Q, K + 1)
        log_teacher = (answer.class_logits / self.temperature).log_softmax(-1)
        teacher = log_teacher.exp()
        divergence = (teacher * log_teacher).sum(-1) - log_student @ teacher.T  # (L, Q, R)
        weights = self.settings.weights
        cost = weights["loss_cross_entropy"] * self.temperature**2 * self._query_weights(answer) * divergence
        if len(answer.mask_logits):
            soft = sample_maps(answer.mask_logits[None].float(), points * _xy(answer.extent))[0].sigmoid()  # (N, P)
            layers = [slice(layer, layer + 1) for layer in range(len(cost))]
            for layer, logits in zip(layers, masks.at_points(image, points * _xy(extent), layers), strict=True):
                entropy, dice = _pairwise(logits, soft)  # (1, Q, N)
                cost[layer, :, : len(soft)] += weights["loss_mask"] * entropy + weights["loss_dice"] * dice
        return cost

    def _query_weights(self, answer: Answer) -> Tensor:
        weights = torch.full_like(answer.class_logits[:, 0], self.settings.no_object_weight)
        weights[: len(answer.mask_logits)] = 1
        return weights

    def _image_sums(self, image, class_logits, masks, answer: Answer, match, extent, generator) -> Tensor:
        """(4,) sums over layers and queries of an image: class term, weights of the queries, mask and dice terms."""
        queries, matched = match  # (L, R): every query of the answer has a partner
        logits = class_logits[:, image].float() / self.temperature  # (L, Q, K + 1)
        target = logits.new_full(logits.shape, NEVER)
        target[..., -1] = 0
        places = queries.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        target.scatter_(1, places, (answer.class_logits / self.temperature)[matched])
        weights = logits.new_full(logits.shape[:2], self.settings.no_object_weight)
        weights.scatter_(1, queries, self._query_weights(answer)[matched])
        divergence = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True)
        class_sum = self.temperature**2 * (weights * divergence.sum(-1)).sum()
        mask_sum = dice_sum = class_sum.new_zeros(())
        if len(answer.mask_logits):
            partners = queries.gather(1, matched.argsort(1))[:, : len(answer.mask_logits)]  # (L, N)
            mask_sum, dice_sum = self._mask_sums(image, masks, partners, answer, extent, generator)
        return torch.stack([class_sum, weights.sum(), mask_sum, dice_sum])

    def _mask_sums(self, image, masks, partners, answer: Answer, extent, generator) -> tuple[Tensor, Tensor]:
        """Mask and dice term of the student's masks of (L, N) queries, partners of the answer's N in every layer."""
        found = []
        with torch.no_grad():
            taught = answer.mask_logits.float().unsqueeze(1)
            for layer in range(len(partners)):
                logits = masks.of_queries(image, slice(layer, layer + 1), partners[layer : layer + 1])
                points = self._draw_points(logits, _xy(extent), generator)  # (N, P, 2)
                soft = sample_maps(taught, points * _xy(answer.extent)).squeeze(1).sigmoid()  # (N, P)
                points = points * _xy(extent)
                found.append((points, sample_maps(logits.unsqueeze(1), points).squeeze(1), soft))
            points, samples, soft = (torch.cat(rows) for rows in zip(*found, strict=True))
        logits = masks.sample(image, partners, points, samples)  # (LN, P)
        entropy = F.binary_cross_entropy_with_logits(logits, soft, reduction="none") - _entropy(soft)
        p = logits.sigmoid()
        overlap, total = (p * soft).sum(1), (p**2).sum(1) + (soft**2).sum(1)
        return entropy.mean(1).sum(), (1 - (2 * overlap + 1) / (total + 1)).sum()

    def _draw_points(self, logits, extent, generator) -> Tensor:
        """Points in the image, (N, P, 2): the most uncertain of many and uniform ones, as in the labelled loss."""
        settings = self.settings
        size, options = (len(logits), settings.num_candidates, 2), {"device": logits.device, "generator": generator}
        candidates = torch.rand(size, **options)
        certainty = sample_maps(logits.unsqueeze(1), candidates * extent).squeeze(1).abs()
        uncertain = most_uncertain(candidates, certainty, settings.num_uncertain)
        uniform = torch.rand(len(logits), settings.num_points - settings.num_uncertain, 2, **options)
        return torch.cat([uncertain, uniform], dim=1)

    def _feature_term(self, features, answers, points, extents) -> Tensor:
        distances = []
        for image, (answer, place) in enumerate(zip(answers, points, strict=True)):
            ours = sample_maps(features[image : image + 1].float(), place * _xy(extents[image]))[0].T  # (P, C)
            theirs = sample_maps(answer.features[None].float(), place * _xy(answer.extent))[0].T
            ours = ours if self.projection is None else self.projection(ours)
            distances.append(1 - F.cosine_similarity(ours, theirs, dim=-1))
        return torch.cat(distances).mean()


def _pairwise(logits: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and dice term of every pair: (L, Q, P) logits, (N, P) probabilities -> two (L, Q, N)."""
    entropy = F.softplus(logits).mean(-1, keepdim=True) - logits @ soft.T / soft.shape[1] - _entropy(soft).mean(-1)
    p = logits.sigmoid()
    total = (p**2).sum(-1, keepdim=True) + (soft**2).sum(-1)
    return entropy, 1 - (2 * p @ soft.T + 1) / (total + 1)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(torch.xlogy(probabilities, probabilities) + torch.xlogy(1 - probabilities, 1 - probabilities))


def _xy(extent: Tensor) -> Tensor:
    """(height, width) of the image in its frame -> factor of (x, y) points in the image."""
    return extent.flip(-1).float()


def _mean_over_processes(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensors
    joined = torch.cat(tensors)
    torch.distributed.all_reduce(joined)
    return tuple((joined / torch.distributed.get_world_size()).split([len(tensor) for tensor in tensors]))
