"""What the doctor says of one split: each check a function in a table, from a survey to findings."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .findings import ERROR, WARNING, Finding
from .image_checks import IMAGE_CHECKS
from .reader import check_headers
from .survey import Survey, equal_files
from .wrong_ids import explain

FEW_PIXELS = 16  # one cell of the finest mask, whose stride is 4
BACKGROUND_NAMES = ("background", "_background_", "bg", "unlabeled", "unlabelled", "void")


@dataclass(frozen=True)
class Plan:
    """How the data are to be trained on: short side of the images, and queries; None for a new model's own number."""

    side: int = 512
    queries: int | None = None


def unreadable(split: Survey, plan: Plan) -> Iterator[Finding]:
    if split.problems:
        seen = len(split.problems) + len(split.facts)
        index, text = split.problems[0]
        yield Finding(
            ERROR,
            split.split,
            f"{len(split.problems)} of {seen} examples cannot be read. {text}",
            "training stops at the first of them",
            explain(split.dataset, index) or "mend or leave out these files; `Reader.check()` lists them",
        )


def headers(split: Survey, plan: Plan) -> Iterator[Finding]:
    try:
        check_headers(split.dataset, progress=False)
    except ValueError as error:
        yield Finding(
            ERROR,
            split.split,
            str(error),
            "images and annotations that do not fit each other stop the training",
            "mend these files, save turned images upright without the EXIF tag, or leave them out",
        )


def counted(split: Survey, plan: Plan) -> Iterator[Finding]:
    yield from split.statistics.findings(split.split)
    if split.statistics.examples and sum(split.statistics.pixels) == 0:
        yield Finding(
            ERROR,
            split.split,
            "no segment has a pixel that counts",
            "there is nothing to learn or to measure",
            "see whether all objects are crowds or all labels ignored",
        )


def empty_objects(split: Survey, plan: Plan) -> Iterator[Finding]:
    if empty := split.statistics.empty:
        yield Finding(
            WARNING,
            split.split,
            f"{empty} of {split.statistics.objects} objects have no pixel",
            "a query is spent on each, and there is nothing to learn from them",
            "take them out of the annotations",
        )


def classes_never_seen(split: Survey, plan: Plan) -> Iterator[Finding]:
    pixels, rows = split.statistics.pixels, split.classes.rows
    absent = [row.name for row, count in zip(rows, pixels, strict=True) if not count]
    if absent and 2 * len(absent) <= len(rows) and sum(pixels) and not _is_shifted(split):
        yield Finding(
            WARNING,
            split.split,
            f"{len(absent)} of {len(rows)} classes are never seen: {', '.join(absent[:5])}",
            "they cannot be learnt here, and their metric is undefined",
            "add images that have them, or take the classes out",
        )


def ids_off_by_one(split: Survey, plan: Plan) -> Iterator[Finding]:
    if _is_shifted(split):
        names = [row.name for row in split.classes.rows]
        yield Finding(
            WARNING,
            split.split,
            f"class 0, {names[0]!r}, never occurs and every other one does",
            "ids that begin with 1, under names that begin with 0, look so, and every name would be wrong",
            f"look at a picture with its names; if they are shifted, name the classes from 1: {{1: {names[0]!r}}}",
        )


def _is_shifted(split: Survey) -> bool:
    pixels = split.statistics.pixels
    return len(pixels) >= 3 and split.classes.rows[0].id == 0 and not pixels[0] and all(pixels[1:])


def images_without_statement(split: Survey, plan: Plan) -> Iterator[Finding]:
    mostly = [fact.name for fact in split.facts if fact.void > 0.5]
    share = split.statistics.void / max(1, sum(fact.size[0] * fact.size[1] for fact in split.facts))
    if mostly and len(mostly) >= 0.1 * len(split.facts) and share <= 0.5:
        yield Finding(
            WARNING,
            split.split,
            f"in {len(mostly)} of {len(split.facts)} images masks cover less than half, such as {mostly[0]}",
            "what is ignored is not learnt, and not measured either",
            "annotate these images fully, or give the rest a class",
        )


def overlaps(split: Survey, plan: Plan) -> Iterator[Finding]:
    task, count = getattr(split.dataset, "task", None), split.statistics.overlapping
    if count and task in ("panoptic", "semantic"):
        yield Finding(
            ERROR,
            split.split,
            f"{count} of {split.statistics.examples} images have segments that overlap in {task} data",
            f"a pixel of a {task} map has one segment; PQ and mIoU are not defined here",
            "decide which segment is in front, or train on them as instances (--task instance)",
        )


def too_small(split: Survey, plan: Plan) -> Iterator[Finding]:
    areas = scaled_areas(split, plan.side)
    under, few = int((areas < 1).sum()), int((areas < FEW_PIXELS).sum())
    if under and under >= 0.01 * len(areas):
        yield Finding(
            WARNING,
            split.split,
            f"{under} of {len(areas)} objects are under a pixel when the short side has {plan.side}",
            "what has no pixel left cannot be found",
            "train on larger images (--crop, --test-size), or on tiles of them",
        )
    elif few > 0.3 * len(areas):
        yield Finding(
            WARNING,
            split.split,
            f"{few} of {len(areas)} objects have under {FEW_PIXELS} pixels when the short side has {plan.side}",
            "the masks' finest cell is 4 x 4 pixels",
            "train on larger images (--crop, --test-size), or on tiles of them",
        )


def scaled_areas(split: Survey, side: int) -> np.ndarray:
    """Pixels of the objects, without empty ones, when the images' short side is `side`."""
    scales = [(side / min(fact.size)) ** 2 for fact in split.facts]
    return np.array([a * s for fact, s in zip(split.facts, scales, strict=True) for a in fact.areas if a])


def too_many_objects(split: Survey, plan: Plan) -> Iterator[Finding]:
    fullest = max(split.facts, key=lambda fact: len(fact.areas), default=None)
    if plan.queries is not None and fullest and len(fullest.areas) > plan.queries:
        over = sum(len(fact.areas) > plan.queries for fact in split.facts)
        yield Finding(
            ERROR,
            split.split,
            f"{over} images have more objects than the {plan.queries} queries; {fullest.name} has "
            f"{len(fullest.areas)}",
            "each query finds one object",
            f"give at least --queries {len(fullest.areas)}, or cut the images into tiles",
        )


def full_image_objects(split: Survey, plan: Plan) -> Iterator[Finding]:
    if getattr(split.dataset, "task", None) != "instance":
        return
    full = sum(any(area > 0.95 * np.prod(fact.size) for area in fact.areas) for fact in split.facts)
    if full and full >= 0.1 * len(split.facts):
        yield Finding(
            WARNING,
            split.split,
            f"in {full} of {len(split.facts)} images an object fills nearly the whole image",
            "so does a background that was annotated as if it were an object",
            "leave the background out: in data of instances it is what no object covers",
        )


def background_as_a_class(split: Survey, plan: Plan) -> Iterator[Finding]:
    named = [row.name for row in split.classes.rows if row.name.strip().lower() in BACKGROUND_NAMES]
    if named and getattr(split.dataset, "task", None) == "instance":
        yield Finding(
            WARNING,
            split.split,
            f"{named[0]!r} is a class of objects",
            "in data of instances the background is what no object covers, and needs no class",
            "take the class out, or map its label to nothing",
        )


def stuff_in_pieces(split: Survey, plan: Plan) -> Iterator[Finding]:
    stuff, pieces = set(split.classes.stuff_label_ids), Counter()
    for fact in split.facts:
        counts = Counter(label for label in fact.labels if label in stuff)
        pieces.update(label for label, count in counts.items() if count > 1)
    if pieces and getattr(split.dataset, "task", None) == "panoptic":
        label, count = pieces.most_common(1)[0]
        yield Finding(
            WARNING,
            split.split,
            f"{split.classes.rows[label].name!r} is stuff and has several segments in {count} images",
            "stuff is one segment per image: PQ counts each further piece as a miss",
            "set isthing to 1 if these are objects, or merge the segments",
        )


def repeated_images(split: Survey, plan: Plan) -> Iterator[Finding]:
    groups = equal_files(split.image_paths())
    if groups:
        yield Finding(
            WARNING,
            split.split,
            f"{sum(map(len, groups)) - len(groups)} images are there twice, such as {groups[0][0].name} and "
            f"{groups[0][1].name}",
            "they count double, and if their annotations differ, they contradict each other",
            "keep one of each",
        )


Check = Callable[[Survey, Plan], Iterator[Finding]]
QUICK: tuple[Check, ...] = (  # of what was read anyway
    counted,
    ids_off_by_one,
    images_without_statement,
    too_small,
    full_image_objects,
    background_as_a_class,
    stuff_in_pieces,
)
CHECKS: tuple[Check, ...] = (
    unreadable,
    headers,
    *QUICK,
    empty_objects,
    classes_never_seen,
    overlaps,
    too_many_objects,
    repeated_images,
    *IMAGE_CHECKS,
)
