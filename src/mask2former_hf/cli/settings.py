"""Flags, a YAML file with the same keys, and defaults become one namespace whose numbers make sense."""

import argparse
import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Iterable
from pathlib import Path

import yaml

from ..training.setting_checks import check_numbers as check_settings
from ..training.setting_checks import kinds_of
from ..training.settings import TrainingSettings
from .main import UserError, in_flags

NOT_SETTINGS = {"command", "run", "parser"}  # what `main` adds to the flags
DEEPEST = 6  # levels of lists and mappings in a file: classes: categories: list: category: colour, and one to spare
STRUCTURED = {"classes"}  # keys whose value in a file may be a mapping or a list that no flag could say


def read_settings(arguments: argparse.Namespace, defaults: dict) -> argparse.Namespace:
    """Flags, where not given the keys of the YAML file `arguments.config`, where not there the defaults.

    Values of the file are read as if they were flags, so that they have the same types and choices.

    Raises:
        UserError: for a file that cannot be read, unknown keys, and values that the flag would not take.
    """
    flags = {name: value for name, value in vars(arguments).items() if name not in NOT_SETTINGS}
    from_file = {} if arguments.config is None else _read_file(arguments.config, arguments.parser)
    settings = {}
    for name, value in flags.items():
        if value is None or value is False:
            value = from_file.get(name)
            value = defaults.get(name, value) if value is None or value is False else value
        settings[name] = value
    return argparse.Namespace(**settings)


def _read_file(path: Path, parser: argparse.ArgumentParser) -> dict:
    content = _parse(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping such as 'data: coco-panoptic'")
    if not _is_flat(content, DEEPEST):
        raise UserError(f"{path}: values are nested more than {DEEPEST} deep, or contain themselves: write them flat")
    keys = [str(key).replace("-", "_") for key in content]
    if double := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"{path}: the keys {double} are there twice, with - and with _: keep one of each")
    content = {key: value for key, value in zip(keys, content.values(), strict=True) if value is not None}
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    unknown = sorted(set(content) - set(actions))
    if unknown:
        raise UserError(f"{path}: unknown keys {reprlib.repr(unknown)}; there are {', '.join(sorted(actions))}")
    structured = {name: content.pop(name) for name in STRUCTURED & set(content)}
    for name, value in structured.items():
        if not isinstance(value, str | list | dict):
            raise UserError(f"{path}: {name}: {value!r} must be a text, a list or a mapping, as `--help` says")
    words = [word for name, value in content.items() for word in _words(path, name, value, actions[name])]

    def refuse(message: str):
        raise UserError(f"{path}: {message}")

    usual, parser.error = parser.error, refuse
    try:
        return vars(parser.parse_args(words)) | structured
    finally:
        parser.error = usual


class _Loader(yaml.SafeLoader):
    """Of yaml, which would take the last of two equal keys."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if double := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"the keys {double} are there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse(path: Path):
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}  # noqa: S506, a SafeLoader
    except RecursionError:
        raise UserError(f"{path}: values are nested too deeply for a file of settings: write them flat") from None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such YAML file: correct the path") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: of dates such as 2020-13-45, and encodings
        raise UserError(f"{path}: {' '.join(str(error).split())}: correct the file") from error


def _is_flat(value, levels: int) -> bool:
    """Whether lists and mappings are nested no deeper than so many levels; one that contains itself is not."""
    if not isinstance(value, list | dict):
        return True
    inner = value if isinstance(value, list) else [*value, *value.values()]
    return levels > 0 and all(_is_flat(part, levels - 1) for part in inner)


def _words(path: Path, name: str, value, action: argparse.Action) -> list[str]:
    """A key and its value as they would stand on the command line."""
    flag = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {name}: {reprlib.repr(value)} must be true or false")
        return [flag] if value else []
    takes_several = action.nargs not in (None, "?")
    is_several = isinstance(value, list) and value and takes_several
    if any(isinstance(word, bool | list | dict | None) for word in (value if is_several else [value])):
        rule = "one value or a list of values" if takes_several else "one value"
        raise UserError(f"{path}: {name}: {reprlib.repr(value)} must be {rule}, as after {flag}")
    if is_several:
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def add_flag(parser, name: str):
    """The flag of a field of `TrainingSettings`, which says its type, help and choices."""
    entry = next(entry for entry in dataclasses.fields(TrainingSettings) if entry.name == name)
    kinds = [kind for kind in kinds_of(entry.type) if kind not in (types.NoneType, Path)]
    options = {"help": entry.metadata["help"], **entry.metadata["flag"]}
    flag = f"--{name.replace('_', '-')}"
    if kinds == [bool]:
        parser.add_argument(flag, action="store_true", **options)
        return
    kind = kinds[0]
    if typing.get_origin(kind) is list:
        kind, options = typing.get_args(kind)[0], {"nargs": "+"} | options
    parser.add_argument(flag, type=kind, **options)


def check_numbers(settings: argparse.Namespace, least: float, names: Iterable[str], most: float = math.inf):
    """`training.setting_checks.check_numbers` of flags.

    Raises:
        UserError: naming the flag, its value and the rule.
    """
    try:
        check_settings(settings, least, names, most)
    except ValueError as error:
        raise UserError(in_flags(str(error), names)) from error
