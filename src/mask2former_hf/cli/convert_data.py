"""`mask2former-hf convert-data`: annotated images from one format into another."""

import argparse
import math
from pathlib import Path

from tqdm import tqdm

from ..data.formats.convert import convert
from ..data.formats.data_sets import WRITERS
from ..data.kinds import NEEDED, load_both, load_split
from ..data.recognise import recognise
from ..training.settings import TrainingSettings
from .datasets import COMMON
from .main import UserError
from .settings import add_flag, in_flags


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("source", metavar="FROM", help="folder of annotated images, recognised as `train` does")
    parser.add_argument("target", metavar="TO", type=Path, help="folder to write, new or empty")
    parser.add_argument("--format", required=True, choices=WRITERS, help="what to write; see docs/formats.md")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="PIXELS",
        help="simplify polygons by less than so many pixels (default: 0, exact)",
    )
    section = parser.add_argument_group("FROM, where it is not recognised", "what a flag says counts")
    for name in COMMON:
        add_flag(section, name)
    for split in ("train", "val"):
        for name in ("images", "annotations", "maps", "split"):
            add_flag(section, f"{split}_{name}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.target.exists() and (not arguments.target.is_dir() or any(arguments.target.iterdir())):
        raise UserError(f"TO {arguments.target}: exists already and is not empty; name another folder")
    if not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance {arguments.tolerance}: must be 0 (exact) or more pixels")
    settings = _settings(arguments)
    try:
        for split, dataset in _splits(settings):
            lost = convert(
                dataset,
                arguments.target,
                arguments.format,
                split,
                arguments.tolerance,
                lambda numbers, split=split: tqdm(numbers, desc=split, unit="image"),
            )
            print(f"{split}: {len(dataset)} images, {len(dataset.classes)} classes: {arguments.target}")
            for text, count in lost.items():
                print(f"  {count} {text}")
    except (OSError, ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), vars(settings))) from error
    return 0


def _settings(arguments: argparse.Namespace) -> TrainingSettings:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    flags = {name: value for name, value in given.items() if name in TrainingSettings.__dataclass_fields__}
    found = {}
    if Path(arguments.source).is_dir() and not any(f"train_{name}" in flags for name in ("images", "annotations")):
        try:
            found = recognise(arguments.source, flags.get("data"))
        except ValueError as error:
            raise UserError(in_flags(str(error), TrainingSettings.__dataclass_fields__)) from error
    elif flags.get("data") not in ("hub", "scenes") and not Path(arguments.source).exists():
        raise UserError(f"FROM {arguments.source}: no such folder of data")
    return TrainingSettings(**{**found, **flags})


def _splits(settings: TrainingSettings):
    """(name, reader) of the splits that are there, with one table of classes."""
    has_val = any(getattr(settings, f"val_{name}") for name in NEEDED.get(settings.data, ())) or settings.val_split
    if not has_val:
        return [("train", load_split(settings, "train"))]
    train, val, _ = load_both(settings)
    return [("train", train), ("val", val)]
