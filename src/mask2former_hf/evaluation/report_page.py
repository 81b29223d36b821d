"""The HTML of a report: one file with everything in it, whose texts are escaped; readable without JavaScript."""

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from .kept_pictures import Picture

MOST_CLASSES = 30  # in the table of confusions; more do not fit a screen
MOST_CONFUSIONS = 20  # in the list below it

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 1180px; margin: 2em auto; padding: 0 1.2em; }
h1 { font-size: 1.7em; margin-bottom: 0; } h2 { font-size: 1.2em; margin: 2em 0 .5em; }
h2, summary { border-bottom: 1px solid #e2e8f0; padding-bottom: .2em; }
summary { font-size: 1.2em; font-weight: bold; cursor: pointer; margin: 1.6em 0 .5em; }
p { margin: .5em 0; max-width: 52em; } .small, figcaption { color: #4a5568; font-size: .87em; }
.small { overflow-wrap: anywhere; max-width: none; }
.tiles { display: flex; flex-wrap: wrap; gap: .7em; }
.tile { background: #edf2f7; border-radius: .4em; padding: .5em 1em; min-width: 4.5em; }
.tile b { display: block; font-size: 1.6em; line-height: 1.2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #edf2f7; }
th { color: #4a5568; font-weight: 600; vertical-align: bottom; } .sortable th { cursor: pointer; }
th:first-child, td:first-child, .text td { text-align: left; } .text td { overflow-wrap: anywhere; }
.confusion td, .confusion th { padding: .25em .45em; font-size: .87em; border: 1px solid #fff; }
.confusion thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; max-height: 11em; }
.confusion td { min-width: 2.4em; text-align: center; } .confusion td:first-child { text-align: center; }
.confusion tbody th { text-align: right; }
.row { display: flex; flex-wrap: wrap; gap: 1.2em; } .row figure { width: calc(50% - .6em); }
figure { margin: .5em 0; } figure img { max-width: 100%; height: auto; } figure b { display: block; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(540px, 1fr)); gap: 1em; }
.pictures figure { margin: 0; } .triple { display: flex; gap: 3px; } .triple img { width: 33.1%; object-fit: contain; }
.pictures figure { cursor: zoom-in; } .pictures .large { grid-column: 1 / -1; cursor: zoom-out; }
@media (max-width: 600px) { .pictures { grid-template-columns: 1fr; } .row figure { width: 100%; } }
@media print { details > * { display: block; } }
"""
SCRIPT = """
document.querySelectorAll('.pictures figure').forEach(function (figure) {
  figure.onclick = function () { figure.classList.toggle('large'); };
});
document.querySelectorAll('.sortable th').forEach(function (head) {
  head.onclick = function () {
    var body = head.closest('table').tBodies[0], up = head.dataset.up = head.dataset.up === '1' ? '0' : '1';
    var value = function (row) { return row.cells[head.cellIndex].textContent; };
    Array.from(body.rows).sort(function (a, b) {
      var x = parseFloat(value(a)), y = parseFloat(value(b));
      var order = isNaN(x) && isNaN(y) ? value(a).localeCompare(value(b)) : isNaN(x) ? 1 : isNaN(y) ? -1 : x - y;
      return isNaN(x) || isNaN(y) || up === '1' ? order : -order;
    }).forEach(function (row) { body.appendChild(row); });
  };
});
"""


class Page:
    """Sections of HTML under a title.

    Args:
        title, subtitle: text, which is escaped.
    """

    def __init__(self, title: str, subtitle: str):
        self.title, self.subtitle, self.sections = title, subtitle, []

    def section(self, heading: str, body: str, folded: bool = False):
        """Add a section; its body is HTML. A folded one opens by a click."""
        if folded:
            self.sections.append(f"<details><summary>{escape(heading)}</summary>{body}</details>")
        else:
            self.sections.append(f"<h2>{escape(heading)}</h2>{body}")

    def html(self) -> str:
        """The whole file."""
        body = "\n".join(self.sections)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style></head>\n<body><h1>{escape(self.title)}</h1>\n"
            f'<p class="small">{escape(self.subtitle)}</p>\n{body}\n<script>{SCRIPT}</script></body></html>\n'
        )


def tiles(figures: Mapping[str, float]) -> str:
    """Figures in [0, 1] as large numbers in percent."""
    cells = (f'<div class="tile">{escape(name)}<b>{100 * value:.1f}</b></div>' for name, value in figures.items())
    return f'<div class="tiles">{"".join(cells)}</div>'


def data_table(headings: Sequence[str], rows: Sequence[Sequence], percent: bool = False) -> str:
    """A table of text, or with `percent` one that can be sorted: floats in percent, nan as a dash."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(_shown(value))}</td>" for value in row) + "</tr>" for row in rows)
    kind = "sortable" if percent else "text"
    top = f"<thead><tr>{head}</tr></thead>" if any(headings) else ""
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def confusion_table(confusion: np.ndarray, names: Sequence[str], background: bool) -> str:
    """Rows are true classes, columns found ones, colours shares of the row; below it the most frequent confusions.

    Args:
        confusion: (K + 1, K + 1) counts, of the background in the last row and column.
        names: K.
        background: whether it has a meaning.
    """
    frequency = confusion[:-1, :-1].sum(1) + confusion[:-1, -1]
    seen = np.flatnonzero(frequency + confusion[:, :-1].sum(0))
    shown = np.sort(seen[np.argsort(-frequency[seen], kind="stable")][:MOST_CLASSES]).tolist()
    last = [len(names)] if background else []
    rows, columns = [*names, "(nothing there)"], [*names, "(missed)"]
    head = "".join(f"<th>{escape(columns[column])}</th>" for column in shown + last)
    body = ""
    for row in shown + last:
        total = max(confusion[row].sum(), 1)
        cells = "".join(_confusion_cell(confusion[row, column], total, row == column) for column in shown + last)
        body += f"<tr><th>{escape(rows[row])}</th>{cells}</tr>"
    text = f"<p>The {MOST_CLASSES} most frequent of {len(seen)} classes.</p>" if len(seen) > len(shown) else ""
    table = f'<table class="confusion"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'{text}<div class="wide">{table}</div>{_most_confused(confusion, rows, columns)}'


def plot(png: bytes, title: str, text: str = "") -> str:
    """A figure with its title above and text below."""
    caption = f"<figcaption>{escape(text)}</figcaption>" if text else ""
    return f'<figure><b>{escape(title)}</b><img alt="{escape(title)}" src="{_embedded(png, "png")}">{caption}</figure>'


def pictures(kept: Sequence[Picture]) -> str:
    """Image, truth and prediction of each, with its quality and name."""
    figures = []
    for picture in kept:
        parts = {"image": picture.image, "truth": picture.truth, "prediction": picture.prediction}
        images = "".join(f'<img alt="{name}" src="{_embedded(data, "jpeg")}">' for name, data in parts.items())
        text = f"{100 * picture.quality:.1f} · {picture.name}"
        figures.append(f'<figure><div class="triple">{images}</div><figcaption>{escape(text)}</figcaption></figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def _shown(value) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{100 * value:.1f}"
    return str(value)


def _confusion_cell(count: int, total: int, is_right: bool) -> str:
    share = count / total
    colour = "49, 130, 206" if is_right else "221, 107, 32"
    dark = ";color:#fff" if share > 0.6 else ""
    style = f' style="background:rgba({colour},{share:.2f}){dark}"' if count else ""
    return f'<td{style} title="{count} of {total}">{_short(count) if count else "·"}</td>'


def _short(count: int) -> str:
    for least, size, letter in ((10**9, 10**9, "G"), (10**6, 10**6, "M"), (10**4, 10**3, "k")):
        if count >= least:
            return f"{count / size:.4g} {letter}"
    return str(count)


def _most_confused(confusion: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> str:
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    wrong[-1], wrong[:, -1] = 0, 0
    places = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [divmod(int(place), len(confusion)) for place in places]
    lines = [[rows[true], columns[found], str(wrong[true, found])] for true, found in pairs if wrong[true, found]]
    if not lines:
        return ""
    table = data_table(["true class", "found as", "times"], lines)
    return f"<details><summary>The most frequent confusions</summary>{table}</details>"


def _embedded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
