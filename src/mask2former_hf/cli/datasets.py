"""Data sets named by flags or by the keys of a YAML file; shared by `evaluate` and `verify`."""

import argparse

from ..data import kinds
from .main import UserError, in_flags
from .settings import add_flag


def add_data_arguments(parser: argparse.ArgumentParser, split: str = ""):
    """Flags for the kind of data, its classes, and the paths of a split ("" for flags without prefix)."""
    for name in ("data", *kinds.SHARED):
        add_flag(parser, name)
    for name, text in kinds.OF_A_SPLIT.items():
        kind = int if name == "limit" else str
        parser.add_argument(f"--{split}-{name}" if split else f"--{name}", type=kind, help=text)


def load_split(settings, split: str, table=kinds.KINDS):
    """A reader of a split of the data set that the settings describe.

    Args:
        table: of the kinds of data, `KINDS` or `VIDEO_KINDS`.

    Raises:
        UserError: for missing settings, and for what the reader finds wrong with the files.
    """
    try:
        return kinds.load_split(settings, split, table)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), vars(settings))) from error
