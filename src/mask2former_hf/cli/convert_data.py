"""`mask2former-hf convert-data`: annotated images from one format into another."""

import argparse
import math
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from ..data.formats.convert import convert
from ..data.formats.data_sets import WRITERS
from ..data.kinds import KINDS, SHARED, load_both, load_split
from ..data.recognise import recognise
from ..training.settings import TrainingSettings
from .main import UserError, in_flags
from .settings import add_flag

SPLITS, PATHS = ("train", "val"), ("images", "annotations", "maps")


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "source",
        metavar="FROM",
        help="folder of annotated images, recognised as `train` does; scenes; or with --data hub an id",
    )
    parser.add_argument("target", metavar="TO", type=Path, help="folder to write, new or empty")
    parser.add_argument("--format", required=True, choices=WRITERS, help="what to write; see docs/formats.md")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="PIXELS",
        help="simplify polygons by less than so many pixels (default: 0, exact)",
    )
    section = parser.add_argument_group("FROM, where it is not recognised", "paths are looked for in FROM first")
    for name in ("data", *SHARED):
        add_flag(section, name)
    for split in SPLITS:
        for name in (*PATHS, "split"):
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
    """What FROM and the flags say; paths of flags are looked for in FROM first."""
    names = {entry.name for entry in fields(TrainingSettings)}
    flags = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    source = Path(arguments.source)
    if flags.get("data") == "hub":
        return TrainingSettings(**{"dataset": arguments.source, **flags})
    if arguments.source == "scenes" and not source.exists():
        return TrainingSettings(data="scenes")
    if not source.is_dir():
        raise UserError(f"FROM {source}: no such folder of data")
    given = [f"{split}_{name}" for split in SPLITS for name in PATHS if f"{split}_{name}" in flags]
    flags |= {name: source / flags[name] for name in given if (source / flags[name]).exists()}
    try:
        found = recognise(source, flags.get("data"))
    except ValueError as error:
        if not given:
            raise UserError(in_flags(str(error), names)) from error
        found = {}
    return TrainingSettings(**{**found, **flags})


def _splits(settings: TrainingSettings):
    """(name, reader) of the splits that are there, with one table of classes."""
    paths = KINDS[settings.data].paths if settings.data in KINDS else ()
    has_val = any(getattr(settings, f"val_{name}") for name in paths) or settings.val_split
    if not has_val:
        return [("train", load_split(settings, "train"))]
    train, val, _ = load_both(settings)
    return [("train", train), ("val", val)]
