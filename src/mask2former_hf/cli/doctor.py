"""`mask2former-hf doctor`: what is wrong with data, a checkpoint or a run, why it matters, and what mends it."""

import argparse
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from ..data.checks import Plan
from ..data.doctor import examine_data
from ..data.findings import ADVICE, ERROR, WARNING, Finding
from ..data.kinds import KINDS, VIDEO_KINDS, load_both
from ..data.recognise import recognise
from ..data.video_doctor import examine_videos, recognise_videos
from ..data.wrong_ids import explain_json
from ..evaluation.doctor import examine_checkpoint
from ..inference.video_files import is_video
from ..training.data_advice import advice
from ..training.doctor import examine_run
from ..training.settings import DEFAULT_CROP, TrainingSettings
from .main import UserError, in_flags
from .settings import add_flag, check_numbers, read_settings

OF_TRAINING = ("crop", "queries")
KIND_NAMES = ", ".join((*KINDS, *VIDEO_KINDS))


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("config", nargs="?", type=Path, help="YAML file whose keys are the flags below")
    parser.add_argument("--model", help="checkpoint to look at: folder or Hub id")
    parser.add_argument("--run", dest="run_folder", type=Path, help="folder of a run to look at", metavar="DIR")
    section = parser.add_argument_group("data to look at, as `train` takes them")
    section.add_argument(
        "--data", help=f"folder of data, or the kind of those that the paths below name: {KIND_NAMES}"
    )
    for entry in fields(TrainingSettings):
        if entry.metadata["group"] == "data" and entry.name not in ("data", "no_check"):
            add_flag(section, entry.name)
    for name in OF_TRAINING:
        add_flag(parser, name)


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments, {"held_out": TrainingSettings.held_out})
    check_numbers(settings, 1, OF_TRAINING)
    if settings.data is not None and Path(settings.data).is_dir():
        if settings.folder is not None:
            raise UserError(f"--data {settings.data} and --folder {settings.folder}: give one folder")
        settings.data, settings.folder = None, settings.data
    if settings.data is not None and is_video(settings.data):
        raise UserError(
            f"--data {settings.data}: is a video without annotations, of which `predict` says what cannot be read. "
            "Annotated are a folder with YouTube-VIS' json, and --data youtube-vis or davis with the paths"
        )
    has_data = settings.data is not None or settings.folder is not None
    if not (has_data or settings.model or settings.run_folder):
        raise UserError("give --data FOLDER (or a kind of data with its paths), --model NAME, or --run DIR")
    found = [*(_data(settings) if has_data else [])]
    found += examine_checkpoint(settings.model) if settings.model else []
    found += examine_run(settings.run_folder) if settings.run_folder else []
    return report(found)


def report(found: list[Finding]) -> int:
    """Print findings, the worst first; the exit code: 1 if anything would fail."""
    counts = {severity: sum(one.severity == severity for one in found) for severity in (ERROR, WARNING, ADVICE)}
    for severity in counts:
        for finding in found:
            if finding.severity == severity:
                print(finding)
    print(
        f"{counts[ERROR]} errors, {counts[WARNING]} warnings"
        + ("" if counts[ERROR] + counts[WARNING] else ": nothing looks wrong")
    )
    return 1 if counts[ERROR] else 0


def _data(settings: argparse.Namespace) -> list[Finding]:
    names = {entry.name for entry in fields(TrainingSettings)}
    given = {name: value for name, value in vars(settings).items() if name in names}
    training = TrainingSettings(output="", **given)
    try:
        if training.folder is not None:
            videos = recognise_videos(training.folder) if training.data in (None, "youtube-vis") else {}
            taken = (videos or recognise(training.folder, training.data)).items()
            vars(training).update({name: value for name, value in taken if getattr(training, name) is None})
        of_videos = training.data in VIDEO_KINDS
        train, val, held_out = load_both(training, VIDEO_KINDS if of_videos else KINDS)
    except ImportError as error:
        raise UserError(in_flags(str(error), names)) from error
    except (OSError, ValueError) as error:
        return [_unread(training, in_flags(str(error), names))]
    if held_out:
        print(f"nothing to measure on was given: held out are {held_out}")
    splits = {"train": train, "val": val}
    if of_videos:
        return examine_videos(splits, lambda indices, split: tqdm(indices, desc=f"reading {split} videos"))
    plan = Plan(settings.crop or DEFAULT_CROP, settings.queries)
    found, surveys = examine_data(
        splits, plan, lambda indices, split: tqdm(indices, desc=f"reading {split} annotations")
    )
    return found + advice(surveys[0])


def _unread(training: TrainingSettings, text: str) -> Finding:
    paths = [Path(path) for path in (training.train_annotations, training.val_annotations) if path]
    repairs = [repair for path in paths if path.is_file() and (repair := explain_json(path))]
    where = training.folder or training.data
    return Finding(ERROR, where, text, "nothing can be trained on it", (repairs or ["mend it as the line says"])[0])
