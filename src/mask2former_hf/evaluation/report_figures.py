"""The figures of a report, by matplotlib, which is imported here alone. No class name is drawn: fonts lack scripts."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.7,
    "lines.linewidth": 1.5,
}
BLUE, RED, GREY = "#2b6cb0", "#c05621", "#718096"
TERMS = {"loss_mask": "mask", "loss_dice": "dice", "loss_cross_entropy": "class"}


def run_figure(history: Sequence[Mapping], metric: str) -> bytes:
    """Loss with its terms, the metrics, and the learning rate, over the steps of a run.

    Args:
        history: Trainer's `state.log_history`.
        metric: the one that the best checkpoint is chosen by.
    """
    logged = _rows(history, "loss")
    measured = _rows(history, f"eval_{metric}")
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3), layout="constrained")
        loss, figures, rate = figure.subplots(1, 3)
        _curve(loss, logged, "loss", "loss", color="black")
        for name, shown in TERMS.items():
            _curve(loss, logged, name, shown, linewidth=1)
        loss.set(title="Loss in training", xlabel="step", ylim=(0, None))
        names = dict.fromkeys([metric, *_companions(measured, metric)])
        for name in names:
            _curve(figures, measured, f"eval_{name}", name, 100, marker=".", linewidth=2 if name == metric else 1)
        if measured:
            best = max(measured, key=lambda row: row[f"eval_{metric}"])
            figures.plot(best["step"], 100 * best[f"eval_{metric}"], "o", mfc="none", mec="black", ms=9)
            late = best["step"] > (measured[0]["step"] + measured[-1]["step"]) / 2
            figures.annotate(
                f"best {100 * best[f'eval_{metric}']:.1f}",
                (best["step"], 100 * best[f"eval_{metric}"]),
                (-6 if late else 6, 7),
                textcoords="offset points",
                ha="right" if late else "left",
            )
        figures.set(title="Metrics in percent", xlabel="step", ylim=(0, None))
        figures.margins(y=0.2)
        _curve(rate, logged, "learning_rate", None, color=GREY)
        rate.set(title="Learning rate", xlabel="step", ylim=(0, None))
        for axes in (loss, figures, rate):
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        return _png(figure)


def precision_recall_figure(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Curves by name: recall and precision."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, (recall, precision) in lines.items():
            axes.plot(recall, precision, label=name, marker="." if len(recall) < 20 else None)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend()
        return _png(figure)


def calibration_figure(bins: Sequence[Mapping]) -> bytes:
    """Of `report_numbers.calibration`: how often segments of a score are right, and how many they are."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        full = [row for row in bins if row["count"]]
        axes.plot((0, 1), (0, 1), color=GREY, linestyle="--", linewidth=1)
        axes.plot([row["score"] for row in full], [row["right"] for row in full], marker="o", color=BLUE)
        axes.set(ylabel="right", xlim=(0, 1), ylim=(0, 1.02))
        edges = np.linspace(0, 1, len(bins) + 1)
        counts.bar(edges[:-1], [row["count"] for row in bins], 0.9 / len(bins), align="edge", color=GREY)
        counts.set(xlabel="score", ylabel="number")
        counts.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        return _png(figure)


def sizes_figure(sides: np.ndarray, sizes: np.ndarray) -> bytes:
    """(S, 2) objects found and missed, between the bounds of `sides`, in pixels; ends without objects are cut."""
    rows = np.flatnonzero(sizes.any(1))
    first, last = (rows[0], rows[-1]) if len(rows) else (0, 0)
    names = [f"< {sides[0]:.0f}", *(f"{a:.0f}–{b:.0f}" for a, b in zip(sides, sides[1:], strict=False))]
    names = [*names, f"≥ {sides[-1]:.0f}"][first : last + 1]
    found, missed = sizes[first : last + 1].T
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.bar(names, found, color=BLUE, label="found")
        axes.bar(names, missed, bottom=found, color=RED, label="missed")
        for place, (right, wrong) in enumerate(zip(found, missed, strict=True)):
            if right + wrong:
                text = f"{100 * right / (right + wrong):.0f} %"
                axes.annotate(text, (place, right + wrong), (0, 2), textcoords="offset points", ha="center")
        axes.set(xlabel="square root of the area in pixels", ylabel="true objects")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        axes.legend()
        return _png(figure)


def qualities_figure(qualities: Sequence[float]) -> bytes:
    """A histogram of the images' qualities."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.hist(qualities, bins=np.linspace(0, 1, 21), color=BLUE, rwidth=0.9)
        axes.set(xlabel="quality of the image", ylabel="images", xlim=(0, 1))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return _png(figure)


def _rows(history: Sequence[Mapping], name: str) -> list[Mapping]:
    """Rows of the history that have a figure; of a step the first, as the best model is measured again at the end."""
    rows = {}
    for row in history:
        if row.get(name) is not None and np.isfinite(row[name]):
            rows.setdefault(row["step"], row)
    return [rows[step] for step in sorted(rows)]


def _companions(measured: Sequence[Mapping], metric: str) -> list[str]:
    """Other main metrics that were measured."""
    names = ("pq", "ap", "ap50", "box_ap", "miou")
    return [name for name in names if name != metric and measured and f"eval_{name}" in measured[-1]]


def _curve(axes, rows: Sequence[Mapping], name: str, shown: str | None, factor: float = 1, **style):
    points = [(row["step"], factor * row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=shown, **style)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
