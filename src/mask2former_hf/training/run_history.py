"""What a run's folder says about how it went: logs, evaluations and settings, of a finished or a stopped run."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from .run_folder import RESULTS, SETTINGS, steps_with_results
from .run_log import LOG

STATE = "trainer_state.json"
_LINE = re.compile(r"^\S+ \S+  step (\d+): (.*)$")
_START = re.compile(r"as the backbone starts from (trained|random) weights")
EVALUATION, LEARNING_RATE = "eval_", "learning_rate"
METRICS = ("pq", "ap", "miou")  # the first that was measured is the headline


@dataclass(frozen=True)
class History:
    """A run.

    Args:
        folder: of the run.
        steps: a row per log of training, by name; what was not finite is nan.
        evaluations: likewise, names without `eval_`.
        settings: as far as they were written down.
        pretrained: whether the backbone started from trained weights; None if unknown.
        finished: its results are there.
    """

    folder: Path
    steps: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    pretrained: bool | None = None
    finished: bool = False

    @property
    def metric(self) -> str | None:
        """The headline's name."""
        return next((name for name in METRICS if any(name in row for row in self.evaluations)), None)

    def series(self, name: str, rows: list[dict] | None = None) -> list[float]:
        """A figure over time, where it was logged."""
        return [row[name] for row in (self.steps if rows is None else rows) if name in row]


def read_history(folder: str | Path) -> History:
    """Of `log.txt`, or where there is none of the newest checkpoint's `trainer_state.json`, and of the settings.

    Raises:
        FileNotFoundError: if the folder has neither.
    """
    folder = Path(folder)
    states = sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda path: _number(path.parent.name))
    states = [path for path in [folder / STATE] if path.is_file()] or states
    text = (folder / LOG).read_text(encoding="utf-8") if (folder / LOG).is_file() else ""
    rows = [found for line in text.splitlines() if (found := _row(line))]
    if not rows and not states:
        raise FileNotFoundError(f"{folder}: there is neither {LOG} nor a checkpoint with {STATE}: no run wrote there")
    rows = rows or json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    steps = {row["step"]: _complete(row) for row in rows if LEARNING_RATE in row}
    evaluations = {row["step"]: row for row in rows if any(name.startswith(EVALUATION) for name in row)}
    start = _START.search(text)
    return History(
        folder,
        [steps[step] for step in sorted(steps)],
        [{k.removeprefix(EVALUATION): v for k, v in evaluations[step].items()} for step in sorted(evaluations)],
        _json(folder / SETTINGS) | _json(folder / RESULTS).get("settings", {}),
        None if start is None else start[1] == "trained",
        steps_with_results(folder) > 0,
    )


def _row(line: str) -> dict | None:
    found = _LINE.match(line)
    if found is None:
        return None
    pairs = (pair.rsplit(" ", 1) for pair in found[2].split(", ") if " " in pair)
    return {"step": int(found[1])} | {name: float(value) for name, value in pairs}


def _complete(row: dict) -> dict:
    """`log.txt` leaves out what is not finite."""
    return {"loss": math.nan} | {k: v if isinstance(v, int | float) else math.nan for k, v in row.items()}


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
