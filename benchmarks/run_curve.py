"""Plot a metric over the steps of runs of `mask2former-hf train`.

    python benchmarks/run_curve.py RUN [RUN ...] --metric pq --plot curve.png

Several runs (seeds) of the same length give a mean and a band.
"""

import argparse
import json
from pathlib import Path

from plot import line_chart


def curve(run: Path, metric: str) -> dict[int, float]:
    """Step -> percent, from the run's last checkpoint."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    history = json.loads(states[-1].read_text())["log_history"]
    return {row["step"]: 100 * row[f"eval_{metric}"] for row in history if f"eval_{metric}" in row}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metric", required=True)
    parser.add_argument("--plot", type=Path, required=True)
    arguments = parser.parse_args()
    curves = [curve(run, arguments.metric) for run in arguments.runs]
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    series = {arguments.metric: [[c[step] for step in steps] for c in curves]}
    line_chart(arguments.plot, f"{arguments.metric} while training", "steps", "%", steps, series)


if __name__ == "__main__":
    main()
