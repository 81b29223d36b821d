"""A data set as the doctor sees it: one reading of its annotations, with what each example is kept of."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .classes import count_ids
from .example import Example
from .reader import annotation
from .statistics import Statistics, evenly_spread, look_through


class Facts(NamedTuple):
    """What is kept of an example.

    Args:
        name: in messages.
        size: (H, W).
        areas, labels: pixels and class index of each object.
        void: share of the pixels that are ignored.
    """

    name: str
    size: tuple[int, int]
    areas: tuple[int, ...]
    labels: tuple[int, ...]
    void: float


@dataclass(frozen=True)
class Survey:
    """A split that was looked through.

    Args:
        split: its name.
        dataset: the reader.
        statistics: of the examples that could be read.
        facts: of each of them.
        problems: index and error of those that could not.
    """

    split: str
    dataset: object
    statistics: Statistics
    facts: list[Facts] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    @property
    def classes(self):
        return self.statistics.classes

    def image_paths(self) -> list[Path]:
        """Files of the images that are looked at; none of data that are in no files."""
        paths = (image_path(self.dataset, index) for index in evenly_spread(len(self.dataset), MOST))
        return [path for path in paths if path is not None and path.is_file()]


MOST = 5000  # examples looked at, as before training


def survey(
    dataset,
    split: str,
    most: int = MOST,
    progress: Callable[[Iterable], Iterable] = lambda indices: indices,
    keep_going: bool = True,
) -> Survey:
    """Look a data set through once.

    Args:
        dataset: a reader, or what else has `classes`, a length, and examples.
        split: its name, for findings.
        most: examples looked at, spread evenly.
        progress: wraps the numbers of the examples, such as tqdm.
        keep_going: list examples that cannot be read; else raise what is wrong with the first.
    """
    facts, problems = [], []
    examples = _Readable(dataset, most, progress, facts, problems if keep_going else None)
    return Survey(split, dataset, look_through(examples, most=2 * most), facts, problems)


class _Readable:
    """A stream of the examples that can be read."""

    def __init__(self, dataset, most: int, progress, facts: list[Facts], problems: list | None):
        self.dataset, self.classes, self.left_out = dataset, dataset.classes, getattr(dataset, "left_out", 0)
        self.most, self.progress, self.facts, self.problems = most, progress, facts, problems

    def __iter__(self) -> Iterator[Example]:
        for index in self.progress(evenly_spread(len(self.dataset), self.most)):
            try:
                example = annotation(self.dataset, index)
                self._check_labels(example)
            except (OSError, ValueError) as error:
                if self.problems is None:
                    raise
                self.problems.append((index, str(error)))
                continue
            self.facts.append(facts_of(example))
            yield example

    def _check_labels(self, example: Example):
        if unknown := {entry["category_id"] for entry in example.segments} - set(range(len(self.classes))):
            raise ValueError(
                f"{example.name}: category_id {sorted(unknown)[0]} is no index of the {len(self.classes)} classes; "
                f"it must be 0 to {len(self.classes) - 1}"
            )


def facts_of(example: Example) -> Facts:
    """What is kept of an example."""
    areas = dict(zip(*count_ids(example.segmentation), strict=True))
    return Facts(
        example.name,
        example.size,
        tuple(areas.get(entry["id"], 0) for entry in example.objects),
        tuple(entry["category_id"] for entry in example.objects),
        float(np.mean(example.void())),
    )


def image_path(dataset, index: int) -> Path | None:
    """The image's file of an example, through parts of data sets; None if it is in no file of its own."""
    while hasattr(dataset, "indices"):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset.image_path(index) if hasattr(dataset, "image_path") else None


def spread_over(entries: list, most: int) -> list:
    """Up to about `most` of a list, evenly spread."""
    return [entries[index] for index in evenly_spread(len(entries), most)]


def equal_files(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of different files with the same content; only files of one length are read."""
    by_length, by_content = defaultdict(set), defaultdict(list)
    for path in paths:
        by_length[os.path.getsize(path)].add(Path(os.path.realpath(path)))
    for group in by_length.values():
        for path in sorted(group) if len(group) > 1 else ():
            with open(path, "rb") as file:
                by_content[blake2b(file.read()).digest()].append(path)
    return [group for group in by_content.values() if len(group) > 1]
