"""Reader of pictures of labels: an RGB image for each image, in which a colour is a class."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .annotations import label_lookup, semantic_annotation
from .class_forms import class_table, naming_classes
from .classes import IGNORE, ClassTable, count_ids
from .example import Example
from .fields import NAME, displayed
from .folders import FolderReader
from .images import MAP_SUFFIXES, read_panoptic_ids
from .palette import VOC_BORDER, voc_palette
from .text_files import read_text

VOID = ("void", "ignore", "ignored", "unlabeled", "unlabelled")  # names that stand for no class
COLOUR_FILES = ("classes.json", "labelmap.txt", "class_dict.csv", "colors.json", "colours.json")

_DIGITS = re.compile(r"\s*[0-9]{1,3}\s*")
Colour = tuple[int, int, int]


class ColourMaps(FolderReader):
    """Semantic maps in colours: CamVid's, Pascal VOC's, and what CVAT and others export as "segmentation masks".

    A class that occurs in an image is one segment with id = index + 1. Names such as "void" are ignored. See
    `Example`.

    Args:
        images, maps: folders; files are matched by their path without extension and suffix.
        classes: a file or mapping with colours (`read_colours`); or names without colours, in any form of
            `class_forms.class_table`: then class n has colour n of VOC's palette, and its border is ignored.
        image_suffix, map_suffix: as in `LabelMaps`.

    Raises:
        ValueError: also for two classes of one colour.
    """

    task = "semantic"

    def __init__(self, images: str | Path, maps: str | Path, classes, image_suffix: str = "", map_suffix: str = ""):
        self.classes, colours = colour_table(classes)
        super().__init__(images, maps, image_suffix, map_suffix)
        self._codes = np.array(sorted(colours), dtype=np.int64)
        self._labels = np.array([colours[code] for code in sorted(colours)], dtype=np.int32)
        self._lookup = label_lookup(self.classes)

    @property
    def colours(self) -> set[int]:
        """What is declared, as red + 256 green + 65536 blue."""
        return set(self._codes.tolist())

    def annotation(self, index: int) -> Example:
        self._check_index(index)
        path, names = self.maps / self._map_files[index], (self._names[index], self._image_files[index])
        return self._annotate(read_panoptic_ids(path), path, *names)  # a colour as one number, of palettes, too

    def _annotate(self, ids, path, image_id, file_name):
        place = np.searchsorted(self._codes, ids).clip(max=len(self._codes) - 1)
        unknown = self._codes[place] != ids
        if unknown.any():
            codes, pixels = count_ids(ids[unknown])
            first = [code for _, code in sorted(zip(pixels, codes, strict=True), reverse=True)[:5]]
            shown = ", ".join(f"{_colour(code)} ({pixels[codes.index(code)]} pixels)" for code in first)
            raise ValueError(
                f"{path}: has {len(codes)} colours that are no class, such as {shown}; declare them. Edges that were "
                f"smoothed or JPEG's compression make colours that nobody chose: save the maps anew. {self.classes}"
            )
        names = {"image_id": image_id, "file_name": file_name}
        return semantic_annotation(self._labels[place], self._lookup, self.classes, path, **names)


def colour_table(given) -> tuple[ClassTable, dict[int, int]]:
    """The classes that a declaration names, and for each colour, R + 256 G + 65536 B, the id of its class."""
    with naming_classes(given):
        return _colour_table(given)


def _colour_table(given) -> tuple[ClassTable, dict[int, int]]:
    named = read_colours(given)
    if named is None:
        table = class_table(given)
        most = max(row.id for row in table.rows) + 1
        colours = {_code(colour): number for number, colour in enumerate(voc_palette(most)) if table.has(number)}
        return _with_border(table, colours)
    labels, colours = {}, {}
    for name, colour in named:
        number = len(labels)
        labels[number] = IGNORE if name.strip().lower() in VOID else name
        if _code(colour) in colours:
            other = named[colours[_code(colour)]][0]
            raise ValueError(f"{name!r} and {other!r} have the colour {list(colour)}: give every class its own")
        colours[_code(colour)] = number
    table = ClassTable.from_labels(labels)
    return _with_border(table, colours)


def _with_border(table: ClassTable, colours: dict[int, int]) -> tuple[ClassTable, dict[int, int]]:
    """Also VOC's border, as void, unless the colour is a class."""
    if _code(VOC_BORDER) in colours:
        return table, colours
    used = [*(row.id for row in table.rows), *table.ignored, *(number for number, _ in table.aliases)]
    void = table.ignored[0] if table.ignored else max(used) + 1
    if not table.ignored:
        table = ClassTable(table.rows, (void,), table.aliases, table.unsaid)
    return table, {**colours, _code(VOC_BORDER): void}


def read_colours(given) -> list[tuple[str, Colour]] | None:
    """(name, (R, G, B)) of each class; None for a declaration without colours.

    Read are, as files or what they hold: `{"classes": [names], "colors": [[r, g, b], ...]}` with a further colour for
    void (CamVid's form here); a list, bare or under "classes" or "categories", of `{"name", "color"}`; `{"road":
    [128, 64, 128]}`; CVAT's labelmap.txt; a csv with a header and name, r, g, b. A colour may be "#804080".
    """
    if isinstance(given, str | Path):
        path = Path(given)
        if path.suffix.lower() == ".txt" and path.is_file():
            return _labelmap(path)
        if path.suffix.lower() == ".csv":
            return _csv(path)
        return _declared(ClassTable.json_content(path), f"{path}: ") if path.suffix.lower() == ".json" else None
    return _declared(given, "")


def _declared(given, where: str) -> list[tuple[str, Colour]] | None:
    """What a json or a mapping says of colours, `where` before errors; None if it says nothing of them."""
    if isinstance(given, Mapping) and {"classes", "colors"} <= set(given):
        names, colours = given["classes"], given["colors"]
        if not _is_list(names) or not _is_list(colours) or len(colours) not in (len(names), len(names) + 1):
            raise ValueError(
                f"{where}{_count(names)} classes and {_count(colours)} colors: lists that give every class one, and "
                "void the last"
            )
        names = [*names, *["void"] * (len(colours) - len(names))]
        return [_entry(name, colour, where) for name, colour in zip(names, colours, strict=True)]
    entries = given.get("categories", given.get("classes")) if isinstance(given, Mapping) else given
    entries = list(entries) if _is_list(entries) else []
    if entries and all(isinstance(entry, Mapping) and {"name", "color"} <= {*entry} for entry in entries):
        return [_entry(entry["name"], entry["color"], where) for entry in entries]
    if isinstance(given, Mapping) and given and all(_is_colour(value) for value in given.values()):
        return [_entry(name, colour, where) for name, colour in given.items()]
    return None


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _count(value) -> str:
    return str(len(value)) if _is_list(value) else displayed(value)


def _entry(name, colour, where: str) -> tuple[str, Colour]:
    """Checked.

    Raises:
        ValueError: with `where`.
    """
    try:
        NAME.convert(name)
    except ValueError:
        raise ValueError(f"{where}the class {displayed(name)} has no name, {NAME.text}; give it one") from None
    try:
        return name, _levels(colour)
    except ValueError as error:
        raise ValueError(f"{where}{name!r}: {error}") from None


def _labelmap(path: Path) -> list[tuple[str, Colour]] | None:
    lines = [line.strip() for line in read_text(path).splitlines()]
    fields = [line.split(":") for line in lines if line and not line.startswith("#")]
    if not all(len(row) > 1 and row[1] for row in fields):
        return None  # a name per line
    return [_entry(row[0], row[1].split(","), f"{path}: ") for row in fields]


def _csv(path: Path) -> list[tuple[str, Colour]]:
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: not a csv file ({error}); save it anew") from None
    rows = [{key.strip().lower(): value for key, value in row.items() if key} for row in rows]
    if not rows or not {"name", "r", "g", "b"} <= set(rows[0]):
        raise ValueError(f"{path}: a file of colours has a header with name, r, g, b")
    found = []
    for line, row in enumerate(rows, start=2):
        name, colour = _entry(row["name"], [row["r"], row["g"], row["b"]], f"{path}, line {line}: ")
        found.append((name.strip(), colour))
    return found


def _is_colour(value) -> bool:
    try:
        _levels(value)
    except ValueError:
        return False
    return True


def _levels(value) -> Colour:
    """(R, G, B) of three levels from 0 to 255, as numbers or texts, or of "#rrggbb"; a fourth is alpha."""
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        return tuple(int(value[k : k + 2], 16) for k in (1, 3, 5))
    levels = value[:3] if _is_list(value) else ()
    numbers = [int(level) if isinstance(level, str) and _DIGITS.fullmatch(level) else level for level in levels]
    if len(numbers) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in numbers):
        raise ValueError(f'{displayed(value)} is no colour; it is [red, green, blue] from 0 to 255, or "#rrggbb"')
    return tuple(numbers)


def _code(colour: Sequence[int]) -> int:
    return int(colour[0]) + 256 * int(colour[1]) + 65536 * int(colour[2])


def _colour(code: int) -> list[int]:
    return [code & 255, code >> 8 & 255, code >> 16 & 255]


def is_colour_map(path: Path) -> bool:
    """Whether a file is a lossless picture in colours, by its header."""
    if path.suffix.lower() not in MAP_SUFFIXES:
        return False
    try:
        with Image.open(path) as image:
            return image.mode in ("RGB", "RGBA")
    except OSError:
        return False
