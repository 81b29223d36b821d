"""What a run leaves to read: a log of lines with their time, and a table of its figures."""

import csv
import math
import time
from pathlib import Path

from transformers import TrainerCallback

from ..data.whole_files import written_whole

LOG, FIGURES = "log.txt", "metrics.csv"


class RunLog(TrainerCallback):
    """Writes `log.txt`, a line per log, and `metrics.csv`, a row per evaluation, into a run's folder as it goes.

    The log is continued by a resumed run; the table is made of the run's whole history, so that steps which were done
    twice stand there once.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, text: str):
        """Add lines to the log, each with the time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.writelines(f"{now}  {line}\n" for line in text.splitlines())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            figures = [(name, value) for name, value in logs.items() if isinstance(value, int | float)]
            shown = (f"{name} {value:.6g}" for name, value in figures if math.isfinite(value))
            self.write(f"step {state.global_step}: {', '.join(shown)}")

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        rows = {row["step"]: row for row in state.log_history if "eval_runtime" in row}  # of a step the last
        timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "step", "epoch")
        names = list(dict.fromkeys(name for row in rows.values() for name in row if name not in timing))
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / FIGURES) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["step", "epoch", *(name.removeprefix("eval_") for name in names)])
            for step, row in sorted(rows.items()):
                figures = (row.get(name, math.nan) for name in names)
                table.writerow([step, row.get("epoch"), *(x if math.isfinite(x) else "" for x in figures)])
