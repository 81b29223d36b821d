"""Data sets named by flags or by the keys of a YAML file; shared by `evaluate` and `verify`."""

import argparse

from ..data import kinds
from ..training.settings import VIDEO_KINDS
from .main import UserError, in_flags
from .settings import add_flag


def add_data_arguments(parser: argparse.ArgumentParser, split: str = ""):
    """Flags for the kind of data, its classes, and the paths of a split ("" for flags without prefix)."""
    for name in ("data", *kinds.SHARED):
        add_flag(parser, name)
    for name, text in kinds.OF_A_SPLIT.items():
        kind = int if name == "limit" else str
        parser.add_argument(f"--{split}-{name}" if split else f"--{name}", type=kind, help=text)


def load_split(settings, split: str):
    """A reader of a split of the data set that the settings describe.

    Raises:
        UserError: for missing settings, and for what the reader finds wrong with the files.
    """
    if settings.data in VIDEO_KINDS:
        raise UserError(f"--data {settings.data}: is of videos, which `train` alone takes (docs/video.md)")
    try:
        return kinds.load_split(settings, split)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), vars(settings))) from error
