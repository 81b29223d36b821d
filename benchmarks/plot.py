"""Line charts without a plotting library."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = [(200, 80, 60), (50, 110, 190), (60, 150, 90)]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 470, 80, 24, 46, 64


def line_chart(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[Sequence[float]]],
):
    """Draw the mean of each series over `x`, and a band from its smallest to its largest run.

    Args:
        series: name -> runs, each with a value per entry of `x`.
    """
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    font, large = ImageFont.load_default(size=14), ImageFont.load_default(size=18)
    pen = ImageDraw.Draw(sheet, "RGBA")
    highest = max(value for runs in series.values() for run in runs for value in run)
    raw = highest / 5
    tick_step = next(m * 10.0 ** floor(log10(raw)) for m in (1, 2, 2.5, 5, 10) if m * 10.0 ** floor(log10(raw)) >= raw)
    top = tick_step * ceil(highest * 1.02 / tick_step)
    x_top = max(x)

    def place(a, b):
        return LEFT + (WIDTH - LEFT - RIGHT) * a / x_top, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * b / top

    pen.text((LEFT, 12), title, font=large, fill="black")
    pen.text((WIDTH / 2, HEIGHT - 14), x_label, font=font, fill="black", anchor="ms")
    pen.text((10, TOP - 8), y_label, font=font, fill="black", anchor="ls")
    for tick in range(round(top / tick_step) + 1):
        value = tick_step * tick
        _, y = place(0, value)
        pen.line((LEFT, y, WIDTH - RIGHT, y), fill=(225, 225, 225))
        pen.text((LEFT - 8, y), f"{value:.3g}", font=font, fill="black", anchor="rm")
    for value in x:
        left, y = place(value, 0)
        pen.text((left, y + 8), f"{value:g}", font=font, fill="black", anchor="ma")
    for number, (name, runs) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        columns = list(zip(*runs, strict=True))
        low, high = ([place(a, pick(c)) for a, c in zip(x, columns, strict=True)] for pick in (min, max))
        if len(runs) > 1:
            pen.polygon([*low, *reversed(high)], fill=(*colour, 60))
        middle = [place(a, sum(c) / len(c)) for a, c in zip(x, columns, strict=True)]
        pen.line(middle, fill=colour, width=3)
        for left, y in middle:
            pen.ellipse((left - 4, y - 4, left + 4, y + 4), fill=colour)
        pen.text((LEFT + 16, TOP + 8 + 22 * number), f"- {name}", font=large, fill=colour)
    sheet.save(path)
