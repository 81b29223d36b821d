"""What a field of someone else's file must be, and entries that are read by such rules: the only way they are read.

Files are written by other programs and edited by hand. A rule gives the value that the package works with, or the
entry is refused with file, place, field, value and rule.
"""

import math
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

FARTHEST = 1e9  # pixels, or metres on a map: a coordinate beyond is damaged
LONGEST_NAME = 255  # characters of a label or an id, and bytes of one part of a path, as on all usual file systems
LONGEST_SHOWN = 100  # characters of a value in an error
_NESTED = frozenset((list, dict))
_NUMBERS = frozenset((int, float))
_REFUSED = (ValueError, TypeError, OverflowError)  # what Python says of a value of another kind, or beyond a float


class Rule(NamedTuple):
    """How a field is read: `convert` gives its value or raises ValueError, `text` says what it must be."""

    convert: Callable
    text: str
    needed: bool = True

    def optional(self) -> "Rule":
        """For a field that may be absent or null."""
        return self._replace(needed=False)


def read_entry(entry, rules: Mapping[str, Rule], where: str) -> dict:
    """The fields of an entry that have rules and are there, converted.

    Raises:
        ValueError: for missing fields and values that break their rule.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {displayed(entry)}; it must have the fields {', '.join(rules)}")
    missing = [field for field, rule in rules.items() if rule.needed and field not in entry]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}; add it")
    found = {}
    for field, rule in rules.items():
        value = entry.get(field)
        if value is None and not rule.needed:
            continue
        try:
            value = rule.convert(value)
        except _REFUSED:
            raise ValueError(f"{where} has {field}={displayed(value)}; it must be {rule.text}: correct it") from None
        if value is not None:
            found[field] = value
    return found


def displayed(value) -> str:
    """A value in an error: whatever a file holds, a part of a line."""
    text = reprlib.repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def whole(value, least: float = -math.inf, below: float = math.inf) -> int:
    """A whole number, 7 or 7.0, of some range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        raise ValueError
    if value != int(value) or not least <= value < below:
        raise ValueError
    return int(value)


def number(value, most: float) -> float:
    """A number of at most that absolute value."""
    if type(value) not in _NUMBERS or not abs(value) <= most:
        raise ValueError
    return float(value)


def points(value, coordinates: int = 2, most: float = FARTHEST) -> np.ndarray:
    """(N, 2) of a list of points, each a list of 2 to `coordinates` numbers, of which the first two are x and y."""
    good = isinstance(value, list) and all(
        isinstance(point, list) and 2 <= len(point) <= coordinates and _NUMBERS.issuperset(map(type, point))
        for point in value
    )
    if not good:
        raise ValueError
    found = np.array([point[:2] for point in value], dtype=np.float64).reshape(-1, 2)
    if not (np.abs(found) <= most).all():
        raise ValueError
    return found


def is_flat(value: list | dict, levels: int) -> bool:
    """Whether lists and dicts in it are nested no deeper than so many levels; pickling fails on thousands."""
    values = value.values() if isinstance(value, dict) else value
    if _NESTED.isdisjoint(map(type, values)):  # the types that json makes
        return True
    return levels > 0 and all(is_flat(inner, levels - 1) for inner in values if type(inner) in _NESTED)


def _id(value) -> int | str:
    if type(value) is int:  # nearly all of a million annotations
        return value
    return name(value) if isinstance(value, str) else whole(value)


def name(value) -> str:
    """A text of 1 to 255 characters; half of a pair of surrogates, which json may hold, can be written nowhere."""
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
        raise ValueError
    value.encode()
    return value


def _path(value) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in value.split("/")):
        raise ValueError
    return value


def _flag(value) -> int:
    if not isinstance(value, int | float) or value not in (0, 1):
        raise ValueError
    return int(value)


def _of_kind(kind: type) -> Callable:
    def convert(value):
        if not isinstance(value, kind):
            raise ValueError
        return value

    return convert


ID = Rule(_id, "a whole number or a text")
NAME = Rule(name, f"a text of up to {LONGEST_NAME} characters")
FILE_NAME = Rule(_path, "a path in the folder of the files")
FLAG = Rule(_flag, "true or false")
PIXELS = Rule(lambda value: whole(value, 1), "a whole number of pixels, 1 or more")
TEXT = Rule(_of_kind(str), "a text")
LIST = Rule(_of_kind(list), "a list")
MAPPING = Rule(_of_kind(dict), "a mapping of names to values")
