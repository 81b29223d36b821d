"""Data whose classes are some of a model's, or stand in another order, are measured by the model's own labels."""

from collections import Counter
from dataclasses import replace

from torch.utils.data import IterableDataset

from ..data.example import Example
from ..data.reader import Reader
from ..inference.known_labels import plain_name


class Relabelled(Reader):
    """Examples of a data set with other indices of their classes; it has no table of them, which is the model's.

    Args:
        labels: of each class of the data set, by its index.
    """

    def __init__(self, dataset, labels: dict[int, int]):
        self.dataset, self.labels = dataset, labels
        self.task = getattr(dataset, "task", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        example = Example.of(self.dataset[index])
        segments = [{**segment, "category_id": self.labels[segment["category_id"]]} for segment in example.segments]
        return replace(example, segments=segments)


def with_classes_of(config, dataset):
    """A data set whose `category_id`s are the labels of a model, matched by name.

    Names are equal as they stand, or, where that is unique on both sides, up to case, punctuation and the endings of
    COCO's merged classes (`inference.known_labels.plain_name`). Data need not have every class of the model.

    Args:
        config: of the model.
        dataset: with `classes`, otherwise it is taken for the model's; a stream has to have exactly the model's.

    Returns:
        The data set itself if its classes are the model's, or one that reads it.

    Raises:
        ValueError: with the difference, if the model lacks a class of the data.
    """
    classes = getattr(dataset, "classes", None)
    ours = {int(label): str(name) for label, name in config.id2label.items()}
    if classes is None or dict(classes.id2label) == ours:
        return dataset
    return Relabelled(dataset, labels_in_model(config, classes, exactly=isinstance(dataset, IterableDataset)))


def labels_in_model(config, classes, exactly: bool = False) -> dict[int, int]:
    """The label of the model for each class of a table, by index, matched as in `with_classes_of`.

    Args:
        exactly: the table has to have the model's classes in the model's order.

    Raises:
        ValueError: with the difference, if the model lacks a class.
    """
    theirs, ours = dict(classes.id2label), {int(label): str(name) for label, name in config.id2label.items()}
    if theirs == ours:
        return {label: label for label in ours}
    labels = {index: _label_of(name, theirs, ours) for index, name in theirs.items()}
    missing = [theirs[index] for index, label in labels.items() if label is None]
    if missing or exactly:
        only = [name for label, name in ours.items() if label not in labels.values()]
        raise ValueError(
            f"dataset has {len(theirs)} classes and the model {len(ours)}; only in the data: {_listed(missing)}; only "
            f"in the model: {_listed(only)}. Name the classes as the model does (classes=), use a checkpoint for "
            "those of the data, or give the model their labels (training.label_surgery.set_labels)"
        )
    return labels


def _label_of(name: str, theirs: dict[int, str], ours: dict[int, str]) -> int | None:
    """The model's label of a class of the data; None where no name or more than one is its."""
    for form in (str, plain_name):
        found = [label for label, own in ours.items() if form(own) == form(name)]
        if len(found) == 1 and Counter(map(form, theirs.values()))[form(name)] == 1:
            return found[0]
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more if names else "none"
