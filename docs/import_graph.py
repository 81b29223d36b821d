"""Draws docs/floors.svg: which folder of the package imports which, as a house.

    python docs/import_graph.py

Everything in it is read from the code: rooms are folders, their texts the first lines of docstrings, arrows the import
statements. tests/test_import_graph.py reads the imports with the functions of this file.
"""

import ast
import textwrap
from collections import Counter
from collections.abc import Iterator
from html import escape
from itertools import pairwise, permutations, product
from pathlib import Path

import mask2former_hf

ROOT = Path(mask2former_hf.__file__).parent
PUBLIC = {name: module.split(".")[0] for name, module in mask2former_hf._EXPORTS.items()}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT]

Arrow = tuple[str, str]  # the folder that imports, the folder that it imports

# --- reading ---------------------------------------------------------------------------------------------------------


def imports_of_ours(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Modules of this package that a file imports, relative to the package root, with the statement."""
    package = ("mask2former_hf", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield ".".join((*base, name))[len("mask2former_hf") :].lstrip("."), node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mask2former_hf":
            for alias in node.names:
                rest = node.module[len("mask2former_hf") :].lstrip(".")
                yield rest or alias.name, node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mask2former_hf":
                    yield alias.name[len("mask2former_hf") :].lstrip("."), node


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def folder_imported(name: str) -> str:
    """The folder that a module of `imports_of_ours` is in, public names included; another name for what is in none."""
    return PUBLIC.get(name, name.split(".")[0])


def arrows_between_folders() -> set[Arrow]:
    folders = {folder_of(path) for path in FILES}
    found = {(folder_of(path), folder_imported(name)) for path in FILES for name, _ in imports_of_ours(path)}
    return {(above, below) for above, below in found if above != below and below in folders}


def floors_of(arrows: set[Arrow]) -> dict[str, int]:
    """Folder -> floor: one above the highest that it imports, 0 for one that imports none.

    Raises:
        ValueError: if folders import each other in a circle.
    """
    below = {folder_of(path): set() for path in FILES}
    for above, lower in arrows:
        below[above].add(lower)
    floors = {}
    while len(floors) < len(below):
        ready = [folder for folder in below if folder not in floors and below[folder] <= floors.keys()]
        if not ready:
            raise ValueError(f"folders import each other in a circle: {sorted(below.keys() - floors.keys())}")
        floors |= {folder: max((floors[lower] + 1 for lower in below[folder]), default=0) for folder in ready}
    return floors


def without_implied(arrows: set[Arrow]) -> list[Arrow]:
    """The arrows that do not follow from a chain of others."""

    def leads(start: str, end: str) -> bool:
        return (start, end) in arrows or any(leads(b, end) for a, b in arrows if a == start)

    def implied(above: str, below: str) -> bool:
        return any(leads(middle, below) for start, middle in arrows if start == above and middle != below)

    return sorted(arrow for arrow in arrows if not implied(*arrow))


# --- drawing ---------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 1200, 104, 1096  # of the picture; where rooms begin and end
ROOF, BETWEEN_ROOMS, BETWEEN_FLOORS = 150, 30, 54
COLOURS = {
    "cli": "#7a5195",
    "training": "#b5446e",
    "hub": "#d9652b",
    "evaluation": "#c48a00",
    "export": "#8a7f2d",
    "inference": "#4f8a3c",
    "conversion": "#2f8f83",
    "model": "#2b6cb0",
    "kernels": "#4a5568",
    "data": "#6b5b4b",
}
GREY = "#4a5568"  # a folder without a colour of its own


class Room:
    """A folder with its place in the picture."""

    def __init__(self, folder: str, left: float, right: float):
        self.folder, self.left, self.right, self.top, self.height = folder, left, right, 0.0, 0.0
        docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
        files = sorted(p.stem for p in (ROOT / folder).iterdir() if p.suffix in (".py", ".cpp") and p.stem[:2] != "__")
        self.text = textwrap.wrap(docstring.splitlines()[0].replace("`", ""), int((right - left - 40) / 6.9))
        self.files = textwrap.wrap("   ".join(files), int((right - left - 40) / 7.0), break_on_hyphens=False)
        self.needs = 54 + 18 * len(self.text) + 8 + 17 * len(self.files) + 8

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def draw(self) -> str:
        colour, x, y, width = COLOURS.get(self.folder, GREY), self.left, self.top, self.right - self.left
        lines = [
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{self.height:g}" rx="8" fill="#ffffff" '
            f'stroke="{colour}" stroke-width="1.4"/>',
            f'<path d="M{x:g} {y + 8:g} a8 8 0 0 1 8 -8 h{width - 16:g} a8 8 0 0 1 8 8 z" fill="{colour}"/>',
            f'<text x="{x + 20:g}" y="{y + 38:g}" class="name" fill="{colour}">{self.folder}/</text>',
        ]
        y += 62
        for line in self.text:
            lines.append(f'<text x="{x + 20:g}" y="{y:g}" class="text">{escape(line)}</text>')
            y += 18
        y += 8
        for line in self.files:
            lines.append(f'<text x="{x + 20:g}" y="{y:g}" class="files" xml:space="preserve">{escape(line)}</text>')
            y += 17
        return "\n".join(lines)


class House:
    """Rooms on their floors, ordered so that the arrows are short.

    Args:
        floors: folder -> floor.
        arrows: to be drawn.
    """

    def __init__(self, floors: dict[str, int], arrows: list[Arrow]):
        self.arrows = arrows
        rows = [sorted(f for f in floors if floors[f] == level) for level in range(max(floors.values()), -1, -1)]
        self.rows = min(product(*(list(permutations(row)) for row in rows)), key=self._length)
        self.rooms, top = {}, ROOF + 26.0
        for row in self.rows:
            own = [Room(folder, *span) for folder, span in self._spans(row).items()]
            for room in own:
                room.top, room.height = top, max(other.needs for other in own)
            self.rooms |= {room.folder: room for room in own}
            top = own[0].bottom + BETWEEN_FLOORS
        self.ground = top - BETWEEN_FLOORS + 26

    def _spans(self, row):
        step = (RIGHT - LEFT + BETWEEN_ROOMS) / len(row)
        return {folder: (LEFT + n * step, LEFT + (n + 1) * step - BETWEEN_ROOMS) for n, folder in enumerate(row)}

    def _length(self, rows):
        return sum(abs(a - b) for arrow in self.arrows for a, b in pairwise(self._route(arrow, rows)))

    def _route(self, arrow: Arrow, rows) -> list[float]:
        """x of the middle of both rooms and, between them, of where the line passes the floors that it skips."""
        above, below = ([folder in row for row in rows].index(True) for folder in arrow)
        start, end = (sum(self._spans(rows[n])[folder]) / 2 for n, folder in zip((above, below), arrow, strict=True))
        places = [start]
        for n in range(above + 1, below):
            aim = start + (end - start) * (n - above) / (below - above)
            gaps = [right + BETWEEN_ROOMS / 2 for _, right in self._spans(rows[n]).values()][:-1]
            free = [LEFT - 22.0, *gaps, RIGHT + 22.0]
            places.append(min(free, key=lambda place: abs(place - aim) + abs(place - places[-1])))
        return [*places, end]

    def _ends(self, routes: dict[Arrow, list[float]]) -> dict[Arrow, tuple[float, float]]:
        """Where each arrow leaves its room and enters the other, in the order of where it comes from or goes to."""
        ends = {}
        for side, neighbour in ((0, 1), (1, -2)):
            for folder, room in self.rooms.items():
                own = sorted((arrow for arrow in routes if arrow[side] == folder), key=lambda a: routes[a][neighbour])
                for number, arrow in enumerate(own, start=1):
                    place = room.left + (room.right - room.left) * number / (len(own) + 1)
                    ends[arrow] = (*ends.get(arrow, ()), place)
        return ends

    def draw(self) -> list[str]:
        lines, used = [], Counter()
        routes = {arrow: self._route(arrow, self.rows) for arrow in self.arrows}
        for (above, below), (start, end) in self._ends(routes).items():
            x, y = start, self.rooms[above].bottom
            path = [f"M{x:.1f} {y:.1f}"]
            first = [above in row for row in self.rows].index(True) + 1
            for n, corridor in enumerate(routes[above, below][1:-1], start=first):
                passed = self.rooms[self.rows[n][0]]
                place = corridor + (0, -7, 7, -14, 14)[used[n, corridor] % 5]
                used[n, corridor] += 1
                path += [bend(x, y, place, passed.top), f"V{passed.bottom:.1f}"]
                x, y = place, passed.bottom
            top, colour = self.rooms[below].top, COLOURS.get(above, GREY)
            path.append(bend(x, y, end, top - 9))
            dashes = ' stroke-dasharray="5 4"' if (above, below) == ("model", "kernels") else ""
            lines.append(f'<path d="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
            lines.append(f'<path d="M{end:.1f} {top - 1:.1f} l-5.5 -10 h11 z" fill="{colour}"/>')
        return lines + [room.draw() for room in self.rooms.values()]


def bend(x: float, y: float, to_x: float, to_y: float) -> str:
    half = (y + to_y) / 2
    return f"C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}"


def picture() -> str:
    """The SVG file's text."""
    arrows = arrows_between_folders()
    house = House(floors_of(arrows), without_implied(arrows))
    ground = house.ground
    wall_left, wall_right = LEFT - 46, RIGHT + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {ground + 64:g}" width="{WIDTH}" '
        f'height="{ground + 64:g}" role="img" aria-label="Folders of mask2former_hf and what they import">',
        "<style>text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif }"
        " .title { font-size: 30px; font-weight: bold; fill: #2d3748 }"
        " .name { font-size: 19px; font-weight: bold } .text { font-size: 13.5px; fill: #2d3748 }"
        " .files { font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace; font-size: 11.5px; fill: #718096 }"
        " .note { font-size: 13px; fill: #4a5568 }</style>",
        f'<rect width="{WIDTH}" height="{ground + 64:g}" fill="#ffffff"/>',
        f'<path d="M{wall_left} {ROOF} H{wall_right} V{ground:g} H{wall_left} z" fill="#f7f5f0" stroke="#c9c2b4"/>',
        f'<path d="M{wall_left - 34} {ROOF} L{WIDTH / 2:g} 18 L{wall_right + 34} {ROOF} z" fill="#e9e4d8" '
        'stroke="#c9c2b4" stroke-linejoin="round"/>',
        f'<text x="{WIDTH / 2:g}" y="102" text-anchor="middle" class="title">mask2former_hf</text>',
        f'<text x="{WIDTH / 2:g}" y="128" text-anchor="middle" class="note">on the roof: examples/ and benchmarks/, '
        "which may import everything</text>",
        f'<path d="M20 {ground:g} H{WIDTH - 20}" stroke="#8a8170" stroke-width="3" stroke-linecap="round"/>',
        *house.draw(),
        f'<text x="{WIDTH / 2:g}" y="{ground + 30:g}" text-anchor="middle" class="note">An arrow means “imports”; '
        "arrows that follow from a chain of others are left out. Dashed: only if it is there.</text>",
        f'<text x="{WIDTH / 2:g}" y="{ground + 50:g}" text-anchor="middle" class="note">Drawn from the import '
        "statements by docs/import_graph.py.</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("floors.svg").write_text(picture(), encoding="utf-8")
