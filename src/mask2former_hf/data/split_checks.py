"""What the doctor says of the data to train on and those to measure on, side by side."""

import os
from collections.abc import Iterator

import numpy as np

from .findings import WARNING, Finding
from .survey import Survey, equal_files

BETWEEN = "train and val"
FAR = 0.35  # half the sum of differences of the class shares; two halves of CamVid differ by less than 0.1


def leakage(train: Survey, val: Survey) -> Iterator[Finding]:
    """Equal images on both sides."""
    ours = {os.path.realpath(path) for path in train.image_paths()}
    theirs = {os.path.realpath(path) for path in val.image_paths()}
    shared = [[path, path] for path in sorted(ours & theirs)]
    groups = [[str(path) for path in group] for group in equal_files([*train.image_paths(), *val.image_paths()])]
    shared += [group for group in groups if ours & set(group) and theirs & set(group)]
    if shared:
        names = sorted({os.path.basename(path) for path in shared[0]})
        yield Finding(
            WARNING,
            BETWEEN,
            f"{len(shared)} images are in both, such as {' and '.join(names)}",
            "what was learnt by heart is then measured as if it were understood",
            "take them out of one of the two, with their neighbours of the same video or slide",
        )


def classes_only_in_val(train: Survey, val: Survey) -> Iterator[Finding]:
    rows = zip(train.classes.rows, train.statistics.pixels, val.statistics.pixels, strict=True)
    only = [row.name for row, here, there in rows if there and not here]
    if only:
        yield Finding(
            WARNING,
            BETWEEN,
            f"{', '.join(only[:5])} {'are' if len(only) > 1 else 'is'} only in val",
            "what is never shown cannot be found, and counts as 0 in the mean over classes",
            "divide the images anew, so that each class is on both sides",
        )


def distributions(train: Survey, val: Survey) -> Iterator[Finding]:
    """Shares of the classes' pixels."""
    pixels = [np.array(side.statistics.pixels, dtype=float) for side in (train, val)]
    used = int((sum(pixels) > 0).sum())
    if any(not counts.sum() for counts in pixels) or min(len(train.facts), len(val.facts)) < max(8, used):
        return  # few images of many classes always differ
    shares = [counts / counts.sum() for counts in pixels]
    difference = np.abs(shares[0] - shares[1])
    if difference.sum() / 2 > FAR:
        index = int(difference.argmax())
        yield Finding(
            WARNING,
            BETWEEN,
            f"the classes are distributed differently; {train.classes.rows[index].name!r} has {shares[0][index]:.0%} "
            f"of the pixels in train and {shares[1][index]:.0%} in val",
            "the figures of val then say little about what was learnt",
            "divide the images at random, by whole videos, slides or places",
        )


def sizes(train: Survey, val: Survey) -> Iterator[Finding]:
    if not train.facts or not val.facts:
        return
    short = [float(np.median([min(fact.size) for fact in side.facts])) for side in (train, val)]
    if max(short) > 2 * min(short):
        yield Finding(
            WARNING,
            BETWEEN,
            f"the short side of images is {short[0]:.0f} in train and {short[1]:.0f} in val, in the median",
            "unless both are resized alike, things have another size there than they were learnt at",
            "measure on images as those to train on, or choose --test-size so that things keep their size",
        )


def objects_per_image(train: Survey, val: Survey) -> Iterator[Finding]:
    means = [side.statistics.mean for side in (train, val)]
    if min(len(train.facts), len(val.facts)) >= 8 and max(means) > 4 * max(min(means), 0.25):
        yield Finding(
            WARNING,
            BETWEEN,
            f"there are {means[0]:.1f} objects per image in train and {means[1]:.1f} in val",
            "one of the two may be annotated less completely",
            "see whether objects are missing in the annotations of one",
        )


QUICK = (classes_only_in_val, distributions, sizes, objects_per_image)  # of what was read anyway
CHECKS = (leakage, *QUICK)
