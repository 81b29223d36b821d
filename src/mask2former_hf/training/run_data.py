"""What a run finds out about its data before the first step."""

import os
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

from ..data.checks import Plan
from ..data.doctor import quick_findings
from ..data.findings import Finding
from ..data.reader import check_headers
from ..data.statistics import Statistics
from ..data.survey import Survey, survey
from ..evaluation.evaluator import METRICS
from ..model.design_rules import classifies_pixels
from .backbones import queries_for
from .settings import TrainingSettings


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # before torch.distributed is initialised


def check_split_headers(dataset, split: str, show: bool):
    """Find out before the first step which image files cannot be opened or have another size than their annotation."""
    if _first_process():
        try:
            check_headers(dataset, progress=show)
        except ValueError as error:
            raise ValueError(f"{split}: {error}") from error


def look_through_split(dataset, split: str, show: bool) -> Survey:
    """`survey`, which also finds labels that are not in the class table; raises what is wrong with the first."""
    hidden = not show or not _first_process()
    bar = partial(tqdm, desc=f"reading {split} annotations", disable=hidden)
    try:
        return survey(dataset, split, progress=bar, keep_going=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{split}: {error}") from error


def findings_before(surveys: Sequence[Survey], side: int) -> list[Finding]:
    """What the doctor says of the data without reading more than was read."""
    return quick_findings(surveys, Plan(side))


def check_segments(settings: TrainingSettings, model, train: Statistics, val: Statistics):
    """Refuse more segments than queries, and overlaps where the metric has no meaning for them."""
    queries = model.config.num_queries
    if train.most > queries and not classifies_pixels(model.config):
        whose = f"queries={queries}" if settings.queries else f"model={settings.model} has {queries} queries"
        keeps = "" if settings.model is None else ", which keeps those of the checkpoint and adds new ones"
        raise ValueError(
            f"{whose}: an image to train on has {train.most} segments, and each query finds one; give "
            f"queries={queries_for(train.most)}{keeps}"
        )
    undefined = [m for m in ("pq", "miou") if m in (settings.metrics or METRICS[model.config.task])]
    if val.overlapping and undefined:
        raise ValueError(
            f"val: {val.overlapping} of {val.examples} images have overlapping segments, and there "
            f"is no {' and no '.join(undefined)} of those: give metrics=ap"
        )
