"""Other labels or another number of queries for a trained model, without losing the rest."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.classes import ClassTable
from ..model.design_rules import classifies_pixels
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation


class LabelChange(NamedTuple):
    """What `set_labels` did, by name: new names (kept, merged, added) and old ones (dropped)."""

    kept: list[str]
    merged: list[str]
    added: list[str]
    dropped: list[str]


@torch.no_grad()
def resize_queries(
    model: Mask2FormerForUniversalSegmentation, num_queries: int, generator: torch.Generator | None = None
) -> Mask2FormerForUniversalSegmentation:
    """Change the number of queries in place: keep the first ones, or add new ones after them.

    A new query's feature and position are drawn per channel from the normal distribution that the present queries
    have, so that the decoder meets what it knows. Queries see each other in self-attention: results of the kept ones
    change with their company, and a short fine-tuning is advised. Make an optimizer afterwards, not before.

    Args:
        model: changed in place.
        num_queries: at least 1.
        generator: source of the new rows.

    Returns:
        The model.

    Raises:
        ValueError: for fewer than one query.
    """
    if num_queries < 1:
        raise ValueError(f"num_queries={num_queries}: must be at least 1")
    _check_masks(model)
    module = model.model.transformer_module
    for name in ("queries_features", "queries_embedder"):
        if getattr(module, name, None) is None:
            continue
        rows = getattr(module, name).weight
        kept, missing = rows[:num_queries], max(0, num_queries - len(rows))
        if missing:
            deviation = rows.std(0) if len(rows) > 1 else torch.ones_like(rows[0])  # 1 is what queries start with
            kept = torch.cat([kept, rows.mean(0) + deviation * _normal((missing, rows.shape[1]), rows, generator)])
        setattr(module, name, _like(getattr(module, name), nn.Embedding.from_pretrained(kept.clone(), freeze=False)))
    model.config.num_queries = num_queries
    return model


@torch.no_grad()
def set_labels(
    model: Mask2FormerForUniversalSegmentation,
    labels: Sequence[str],
    mapping: Mapping[str, str | None] | None = None,
    stuff: Iterable[str] | None = None,
    generator: torch.Generator | None = None,
) -> LabelChange:
    """Give a model other labels in place; a class that stays gives the logits that it gave.

    Old classes find their place by name: one whose name is in `labels` is kept, `mapping` sends others to a new name
    (renamed, or merged if several go there) or to `None`. What has no place is dropped, and a label that no old class
    goes to is new. Everything but the classifier's rows stays; "no object" is always kept.

    A merged class gets the mean of its classes' rows and log n more bias. The exact logit would be the log of the sum
    of exponentials, which is not linear; this is its tangent where the n classes agree, and never above it. It is a
    start for fine-tuning: where only one of them was sure, the merged class is less sure. A new class starts like any
    classifier, from PyTorch's default for a linear layer.

    Args:
        model: changed in place. Make an optimizer afterwards, not before.
        labels: new names in the order of the new label ids.
        mapping: old name -> new name or None, for the classes whose name does not say it.
        stuff: names of the new labels that are stuff. By default a label is stuff if all its old classes were, and a
            new one is a thing.
        generator: source of the rows of new classes.

    Returns:
        What was kept, merged, added and dropped; look at it for misspelt names.

    Raises:
        ValueError: for names that are double or unknown, or a model whose present labels have no unique names.
    """
    _check_masks(model)
    labels, mapping = list(labels), dict(mapping or {})
    old = [model.config.id2label[index] for index in range(model.config.num_labels)]
    _check_names(labels, mapping, old, stuff)
    targets = [mapping.get(name, name) for name in old]
    sources = [[index for index, target in enumerate(targets) if target == label] for label in labels]

    head, criterion = model.class_predictor, model.criterion
    classifier = torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1)  # (K + 1, C + 1)
    classifier, weights = _rows(classifier, criterion.empty_weight, sources, generator)
    replacement = nn.Linear(head.in_features, len(labels) + 1, device=head.weight.device, dtype=head.weight.dtype)
    replacement.weight.copy_(classifier[:, :-1])
    replacement.bias.copy_(classifier[:, -1])
    model.class_predictor = _like(head, replacement)
    criterion.empty_weight = weights

    _update_config(model.config, labels, sources, stuff)
    used = {index for indices in sources for index in indices}
    return LabelChange(
        kept=[label for label, indices in zip(labels, sources, strict=True) if len(indices) == 1],
        merged=[label for label, indices in zip(labels, sources, strict=True) if len(indices) > 1],
        added=[label for label, indices in zip(labels, sources, strict=True) if not indices],
        dropped=[name for index, name in enumerate(old) if index not in used],
    )


def _rows(classifier: Tensor, empty_weight: Tensor, sources: list[list[int]], generator) -> tuple[Tensor, Tensor]:
    """Of each new label the classifier's row, which ends in the bias, and the weight in the loss; of "no object" the
    old ones."""
    bound = 1 / math.sqrt(classifier.shape[1] - 1)
    rows, weights = [], []
    for indices in sources:
        if indices:
            row = classifier[indices].mean(0)
            row[-1] += math.log(len(indices))
            weights.append(empty_weight[indices].mean())
        else:
            row = _uniform(classifier[0].shape, classifier, generator) * bound
            weights.append(torch.ones_like(empty_weight[-1]))
        rows.append(row)
    return torch.stack([*rows, classifier[-1]]), torch.stack([*weights, empty_weight[-1]])


def _check_names(labels: list[str], mapping: dict, old: list[str], stuff: Iterable[str] | None):
    if not labels:
        raise ValueError("labels is empty: give at least one name")
    for name, names in (("labels", labels), ("the model's id2label", old)):
        double = sorted({label for label in names if names.count(label) > 1})
        if double:
            raise ValueError(f"{name} has {double} more than once: give every class its own name")
    unknown = {
        "mapping's keys": ([name for name in mapping if name not in old], "labels of the model", old),
        "mapping's values": (
            [name for name in mapping.values() if name is not None and name not in labels],
            "in labels",
            labels,
        ),
        "stuff": ([name for name in stuff or () if name not in labels], "in labels", labels),
    }
    for argument, (names, rule, known) in unknown.items():
        if names:
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise ValueError(f"{argument}: {names} must be {rule} ({shown})")


def _update_config(config, labels: list[str], sources: list[list[int]], stuff: Iterable[str] | None):
    old_stuff = config.stuff_label_ids
    config.stuff_label_ids = None  # ids of the old labels would not fit while the labels change
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    if stuff is not None:
        config.stuff_label_ids = sorted(labels.index(name) for name in set(stuff))
    elif old_stuff is not None:
        was_stuff = set(old_stuff)
        config.stuff_label_ids = [index for index, old in enumerate(sources) if old and was_stuff.issuperset(old)]
    if hasattr(config, "class_table"):
        del config.class_table  # original ids of the old labels


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """The new module in the old one's mode, with gradients where that had them."""
    for parameter, previous in zip(new.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(previous.requires_grad)
    return new.train(old.training)


def _normal(shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Drawn on the generator's device, so that a seed gives the same rows wherever the model is."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=_device(generator)).to(like)


def _uniform(shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """In [-1, 1)."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device=_device(generator))
    return (2 * drawn - 1).to(like)


def _check_masks(model: Mask2FormerForUniversalSegmentation):
    if classifies_pixels(model.config):
        raise ValueError(
            f"head_type={model.config.head_type!r}: its classes are what other models have as queries, "
            "and stay as they are; make a new model for others"
        )


def _device(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device


def model_for_classes(
    checkpoint: str | Mask2FormerForUniversalSegmentation,
    classes: ClassTable,
    task: str,
    num_queries: int | None = None,
):
    """A checkpoint's model for other classes: a class that it knows by name keeps its row of the classifier.

    Args:
        checkpoint: folder, Hub id, or its model, which is changed.
        num_queries: instead of the checkpoint's; the present ones are kept (`resize_queries`).

    Returns:
        The model, and the names of the classes that are new to it.
    """
    model = checkpoint
    if not isinstance(model, Mask2FormerForUniversalSegmentation):
        model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint)
    model.config.task = "semantic" if classifies_pixels(model.config) else task
    wanted = classes.config_fields()
    names = list(wanted["id2label"].values())
    if list(model.config.id2label.values()) == names:
        added = []
    else:
        added = set_labels(model, names).added
    for name, value in wanted.items():
        setattr(model.config, name, value)
    if num_queries is not None and num_queries != model.config.num_queries:
        resize_queries(model, num_queries)
    return model, added
