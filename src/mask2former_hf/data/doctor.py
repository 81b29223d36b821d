"""The doctor for data: all its checks, of one split or of two."""

from collections.abc import Callable, Iterable, Sequence

from . import checks, split_checks
from .checks import Plan
from .findings import Finding
from .survey import Survey, survey


def examine_data(
    splits: dict, plan: Plan, progress: Callable[[Iterable, str], Iterable] = lambda indices, split: indices
) -> tuple[list[Finding], list[Survey]]:
    """Findings of each split and, of "train" and "val", of both together; and what was read for them.

    Args:
        splits: name -> reader.
        plan: how the data are to be trained on.
        progress: wraps the numbers of the examples of a split, such as tqdm.
    """
    surveys = [
        survey(reader, split, progress=lambda indices, split=split: progress(indices, split))
        for split, reader in splits.items()
    ]
    found = [finding for one in surveys for check in checks.CHECKS for finding in check(one, plan)]
    if len(surveys) == 2:
        found += [finding for check in split_checks.CHECKS for finding in check(*surveys)]
    return found, surveys


def quick_findings(surveys: Sequence[Survey], plan: Plan) -> list[Finding]:
    """Of train and val, from what was read anyway before training."""
    found = [finding for one in surveys for check in checks.QUICK for finding in check(one, plan)]
    return found + [finding for check in split_checks.QUICK for finding in check(*surveys)]
