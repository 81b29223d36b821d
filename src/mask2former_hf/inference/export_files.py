"""The json files of an exported folder, and whether they fit each other and the graph."""

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from types import SimpleNamespace

from .known_labels import task_of

REPORT = "export.json"  # by which an exported folder is known
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
SIZES = (("height", "width"), ("shortest_edge",), ("longest_edge",), ("max_height", "max_width"))  # each is enough
RESAMPLING = range(6)  # Pillow's filters
AGAIN = "use the file of the export itself"


class Sides(SimpleNamespace):
    """A size dict whose lengths are attributes, None where it has none; `dict` gives those that it has."""

    def __init__(self, size: Mapping):
        super().__init__(**(dict.fromkeys(SIDES) | dict(size)))

    def __reduce__(self):
        return type(self), (dict(self),)

    def __iter__(self):
        return ((name, length) for name, length in vars(self).items() if length is not None)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the exported folder is not complete") from error
    except ValueError as error:
        raise ValueError(f"{path}: not json ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: has no fields; {AGAIN}")
    return content


def read_config(path: Path) -> SimpleNamespace:
    """What results need of a config."""
    fields = read_json(path)
    try:
        names = {int(label): name for label, name in fields["id2label"].items()}
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: id2label must have a name for each label; {AGAIN}") from error
    task, stuff = fields.get("task"), fields.get("stuff_label_ids")
    config = SimpleNamespace(task=task, stuff_label_ids=stuff, id2label=names, num_labels=len(names))
    config.task = task_of(config)
    return config


def read_processor(path: Path, channels: int) -> dict:
    """The fields of an image processor, of which none can fail at the first image.

    Args:
        channels: that the graph takes.
    """
    fields = read_json(path)
    for name, holds, rule in _rules(fields, channels):
        if not holds(fields.get(name)):
            raise ValueError(f"{path}: {name}={fields.get(name)!r}: must be {rule}; {AGAIN}")
    return fields


def _rules(fields: Mapping, channels: int):
    """What each field that will be read must be: its name, whether a value is that, and the words for it."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        yield name, lambda value: isinstance(value, bool), "true or false"
    yield "size_divisor", lambda value: value is None or (_is_whole(value) and value >= 0), "null, or 0 or more"
    yield "pad_size", lambda value: value is None or _has_sides(value, SIZES[:1]), "null, or height and width"
    if fields["do_resize"]:
        sizes = ", or ".join(" and ".join(names) for names in SIZES)
        yield "size", lambda value: _has_sides(value, SIZES), f"lengths in pixels: {sizes}"
        yield "resample", lambda value: _is_whole(value) and value in RESAMPLING, "a filter of Pillow, 0 to 5"
    if fields["do_rescale"]:
        yield "rescale_factor", lambda value: _is_number(value) and value != 0, "a finite number, not 0"
    if fields["do_normalize"]:
        words = f"a number, or {channels} of them"
        yield "image_mean", lambda value: _are_numbers(value, channels), words
        yield (
            "image_std",
            lambda value: _are_numbers(value, channels) and 0 not in (value if isinstance(value, list) else [value]),
            f"{words}, none of them 0",
        )


def _has_sides(size, choices) -> bool:
    if not isinstance(size, dict) or set(size) - set(SIDES):
        return False
    lengths = {name: length for name, length in size.items() if length is not None}
    whole = all(_is_whole(length) and length > 0 for length in lengths.values())
    return whole and any(set(names) <= set(lengths) for names in choices)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value, channels: int) -> bool:
    if isinstance(value, list):
        return len(value) in (1, channels) and all(_is_number(entry) for entry in value)
    return _is_number(value)
