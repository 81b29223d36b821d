"""The report of an evaluation or a run: `report.html`, one file that opens offline, and `results.json`."""

import importlib.metadata
import importlib.util
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..data.json_files import write_json
from ..data.whole_files import written_whole
from .evaluator import SegmentationEvaluator, headline
from .findings import SIDES
from .report_numbers import calibration, class_rows, precision_recall, scored
from .report_page import Page, confusion_table, data_table, pictures, plot, tiles

INSTALL = "pip install matplotlib"
PAGE, RESULTS = "report.html", "results.json"
PACKAGES = ("torch", "transformers", "numpy", "pillow", "faster-coco-eval", "pycocotools")
QUALITY = {
    "panoptic": "its panoptic quality: PQ of this image alone",
    "instance": "the formula of PQ (the matched objects' IoU, summed, over the mean number of found and true objects) "
    "on its objects with a score of at least 0.5, all classes taken together",
    "semantic": "its mean IoU, over the classes that this image has",
}


def results(evaluator: SegmentationEvaluator, **more) -> dict:
    """What stands in `results.json`: `metrics`, the headline; what else is given; `summary`, all figures by metric;
    and of findings `confusions`, `calibration`, `sizes` and `images`, the worst first."""
    summary = evaluator.compute()
    content = {"metrics": headline(summary)} | more | {"summary": summary}
    if evaluator.findings is None:
        return content
    findings, scores = evaluator.findings, scored(evaluator)
    bounds = [0.0, *SIDES]
    content["confusions"] = findings.confusions()
    content["calibration"] = None if scores is None else calibration(*scores)
    content["sizes"] = [
        {"from_side": side, "found": found, "missed": missed}
        for side, (found, missed) in zip(bounds, findings.sizes.tolist(), strict=True)
    ]
    content["images"] = [{"name": name, "quality": quality} for name, quality in findings.ranked()]
    return content


def write_report(
    folder: str | Path,
    evaluator: SegmentationEvaluator | None,
    *,
    title: str = "Evaluation",
    settings: Mapping | None = None,
    history: Sequence[Mapping] = (),
    metric: str | None = None,
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Write `report.html` into a folder.

    Args:
        evaluator: of all images, made with `findings=True`; None for a report of the run alone.
        title: of the page.
        settings: by name, as they are to be shown.
        history: Trainer's `state.log_history`, of a training run.
        metric: of the run, by which the best checkpoint is chosen; needed with a history.
        figures: headline, in [0, 1]; by default the evaluator's.

    Raises:
        ImportError: without matplotlib.
        OSError: if the file cannot be written.
    """
    check_matplotlib()
    from . import report_figures  # here, because matplotlib is an extra

    page = Page(title, f"{time.strftime('%Y-%m-%d %H:%M')} · {command()}")
    if figures is None:
        figures = {} if evaluator is None else headline(evaluator.compute())
    _metrics(page, figures, evaluator)
    if history:
        page.section("The run", plot(report_figures.run_figure(history, metric), "Loss, metrics and learning rate"))
    if evaluator is not None:
        _classes(page, evaluator)
        _objects(page, evaluator, report_figures)
        _images(page, evaluator)
    rows = [[name, "" if value is None else str(value)] for name, value in (settings or {}).items()]
    page.section(
        "Settings", data_table(["setting", "value"], rows) if rows else "<p>None were given.</p>", folded=True
    )
    page.section("Versions and command", data_table(["", ""], [*versions(), ["command", command()]]), folded=True)
    target = Path(folder) / PAGE
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as part:
        part.write_text(page.html(), encoding="utf-8")
    return target


def has_matplotlib() -> bool:
    """Whether the figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib():
    """Raises ImportError, with the line that installs it, where a report cannot be written."""
    if not has_matplotlib():
        raise ImportError(f"needs matplotlib: {INSTALL}")


def write_evaluation(folder: str | Path, evaluator: SegmentationEvaluator, **more):
    """Write `report.html` and `results.json` of an evaluation into a folder; for `evaluate(report=partial(...))`.

    Args:
        folder: is made if it is not there.
        evaluator: that has counted all images, made with `findings=True` (`evaluate` does so for a report).
        more: `title`, and others of `write_report`.

    Raises:
        ImportError: without matplotlib.
    """
    write_report(folder, evaluator, **more)
    write_json(Path(folder) / RESULTS, results(evaluator, settings=dict(more.get("settings") or {})))


def versions() -> list[list[str]]:
    """Rows of what was installed."""
    rows = [["mask2former_hf", __version__], ["Python", f"{platform.python_version()}, {platform.platform()}"]]
    for name in PACKAGES:
        try:
            rows.append([name, importlib.metadata.version(name)])
        except importlib.metadata.PackageNotFoundError:
            pass
    return rows


def command() -> str:
    """How this process was started."""
    name = Path(sys.argv[0]).name
    start = ["python", "-m", "mask2former_hf"] if name == "__main__.py" else [name]
    return shlex.join([*start, *sys.argv[1:]])


def _metrics(page: Page, figures: Mapping[str, float], evaluator: SegmentationEvaluator | None):
    text = "<p>In percent.</p>"
    if evaluator is not None:
        findings = evaluator.findings
        text = f"<p>In percent, on {len(findings.qualities)} images; below, their {findings.task} results.</p>"
        if not findings.ranked():
            text += "<p>No image had anything to find, and nothing was found.</p>"
    page.section("Metrics", tiles({name: value for name, value in figures.items() if value == value}) + text)


def _classes(page: Page, evaluator: SegmentationEvaluator):
    headings, rows, absent = class_rows(evaluator.compute())
    more = f"<p>{absent} classes of the model do not occur in these images.</p>" if absent else ""
    text = "<p>In percent, counts apart. A click on a heading sorts.</p>"
    page.section("Classes", text + data_table(headings, rows, percent=True) + more)
    findings = evaluator.findings
    kind = "Pixels" if findings.task == "semantic" else "Objects"
    rule = {
        "panoptic": "Objects match at an IoU above 0.5, first within their class.",
        "instance": "Objects match at an IoU of at least 0.5, first within their class; found are those with a score "
        "of at least 0.5.",
        "semantic": "Ignored pixels do not count.",
    }[findings.task]
    text = f"<p>{kind} of the class of the row that were found as the class of the column. {rule}</p>"
    names = [category["name"] for category in findings.categories.values()]
    page.section(
        "What was taken for what", text + confusion_table(findings.confusion, names, findings.task != "semantic")
    )


def _objects(page: Page, evaluator: SegmentationEvaluator, figures):
    findings, scores, curves = evaluator.findings, scored(evaluator), precision_recall(evaluator)
    parts = []
    if scores is not None and len(scores[0]):
        measured = calibration(*scores)
        text = (
            f"How often segments of a score are right (IoU 0.5). The mean distance to the diagonal, by number, is "
            f"{100 * measured['error']:.1f} points."
        )
        parts.append(plot(figures.calibration_figure(measured["bins"]), "Scores", text))
    if curves:
        text = "Mean over the classes, as average precision takes it."
        if "panoptic segments" in curves:
            text = "All classes together, while the lowest score that counts falls; IoU above 0.5."
        parts.append(plot(figures.precision_recall_figure(curves), "Precision and recall", text))
    if findings.sizes.any():
        text = "True objects by size: found as their class, or missed; the percentage is the share found."
        parts.append(plot(figures.sizes_figure(SIDES, findings.sizes), "Sizes found and missed", text))
    if qualities := [quality for _, quality in findings.ranked()]:
        text = f"The quality of an image is {QUALITY[findings.task]}."
        parts.append(plot(figures.qualities_figure(qualities), "Images by quality", text))
    if parts:
        page.section("Scores, sizes and images", f'<div class="row">{"".join(parts)}</div>')


def _images(page: Page, evaluator: SegmentationEvaluator):
    kept, quality = evaluator.findings.kept, QUALITY[evaluator.findings.task]
    best = [picture for picture in kept.best if picture not in kept.worst]
    text = f"<p>Image, truth, prediction; a click enlarges them. The quality of an image is {quality}.</p>"
    if kept.worst:
        page.section("The worst images", text + pictures(kept.worst))
    if best:
        page.section("The best images", pictures(best))
