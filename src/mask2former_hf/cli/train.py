"""`mask2former-hf train`: fine-tune or train on your own data, with official metrics. Also under torchrun."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..data.errors import DataError
from ..data.kinds import VIDEO_KINDS
from ..data.pictures import shown_bands
from ..evaluation.processes import process_group
from ..evaluation.report import INSTALL, PAGE
from ..training.run import TrainingRun
from ..training.run_folder import how_to_go_on, steps_with_results
from ..training.run_lock import FolderInUse
from ..training.run_report import CURVES
from ..training.settings import TrainingSettings
from ..training.threads import fewer_threads
from ..training.video_run import VideoRun
from . import train_video
from .main import UserError, in_flags
from .settings import add_flag, read_settings
from .training_output import AdviceAtZero, LossProgress, draw_batch, headline_names, summary

GROUPS = {
    "run": "the run and what it leaves",
    "model": "what is trained",
    "data": "data",
    "images": "training images",
    "training": "training",
    "teacher": "a teacher",
    "machine": "the machine",
}


def add_arguments(parser: argparse.ArgumentParser):
    parser.usage = "%(prog)s [FILE or FOLDER] --output FOLDER (--model NAME | --backbone NAME | --recipe NAME) ..."
    parser.add_argument(
        "config", nargs="?", type=Path, help="YAML file whose keys are the flags below, or a folder of data"
    )
    for group, title in GROUPS.items():
        section = parser.add_argument_group(title)
        for entry in fields(TrainingSettings):
            if entry.metadata["group"] == group:
                add_flag(section, entry.name)


def settings_of(arguments: argparse.Namespace) -> TrainingSettings:
    """Flags over the YAML file over the defaults."""
    known = {entry.name: entry.default for entry in fields(TrainingSettings)}
    if arguments.config is not None and not arguments.config.exists():
        raise UserError(
            f"{arguments.config}: there is no such folder of data, and no such YAML file: correct the path"
        )
    if arguments.config is not None and arguments.config.is_dir():
        if arguments.folder is not None:
            raise UserError(f"{arguments.config} and --folder {arguments.folder}: give one folder")
        arguments.folder, arguments.config = str(arguments.config), None
    given = vars(read_settings(arguments, known))
    return TrainingSettings(**{name: given[name] for name in known})


def run(arguments: argparse.Namespace) -> int:
    transformers_logging.disable_progress_bar()
    settings = settings_of(arguments)
    with process_group():
        return _train(settings)


def _train(settings: TrainingSettings) -> int:
    try:
        training = VideoRun(settings) if settings.data in VIDEO_KINDS else TrainingRun(settings)
    except (OSError, ValueError, ImportError) as error:
        names = [entry.name for entry in fields(TrainingSettings)]
        raise UserError(in_flags(str(error), names)) from error
    trainer = training.trainer
    if training.finished:
        if trainer.is_world_process_zero():
            done = steps_with_results(training.settings.output)
            print(f"{training.settings.output} is complete, all {done} steps are done, and stays as it is.")
            print("To go on, give more --steps; for another run, another --output.")
        return 0
    if trainer.is_world_process_zero():
        text = train_video.summary(training) if isinstance(training, VideoRun) else summary(training)
        print(text)
        training.log.write(text)
        if settings.resume and training.last is None:
            print("--resume: no checkpoint was complete yet, so the run starts from the beginning")
        _draw_first_batch(training)
    trainer.replace_progress(LossProgress)
    trainer.add_callback(AdviceAtZero(training))
    try:
        with fewer_threads(training.model, training.side, training.settings.batch_size) as said:
            if said and trainer.is_world_process_zero():
                print(said)
            figures = training.train()
    except FolderInUse as error:
        raise UserError(in_flags(str(error), ["output"])) from error
    except DataError as error:
        print(file=sys.stderr)  # the progress bar ends its line
        raise UserError(f"{error}. {how_to_go_on(training.settings.output)}") from error
    except OSError as error:
        if error.errno is None:
            raise
        place = error.filename or training.settings.output
        raise UserError(f"{place}: {error.strerror}. {how_to_go_on(training.settings.output)}") from error
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            step, output = trainer.state.global_step, training.settings.output
            print(f"\nInterrupted at step {step}. {how_to_go_on(output)}")
        raise
    if trainer.is_world_process_zero():
        for name in headline_names(figures):
            print(f"{name:12}{100 * figures[name]:7.2f}")
        if "switches" in figures:  # of the ids of videos, a number
            print(f"{'switches':12}{figures['switches']:7.0f}")
        output = training.settings.output
        print(f"Model, processor and results.json: {output}")
        if (output / PAGE).exists():
            print(f"What it finds and what it misses: {output / PAGE}")
        else:
            print(f"{PAGE} and {CURVES} need matplotlib: {INSTALL}")
    return 0


def _draw_first_batch(training: TrainingRun):
    folder, images = training.settings.output, training.augmented
    folder.mkdir(parents=True, exist_ok=True)
    first = [images[index] for index in range(min(training.settings.batch_size, len(images)))]
    if isinstance(training, VideoRun):
        picture = train_video.draw_clips(first, training.model.config.id2label)
    else:
        show = None if training.channels is None else shown_bands(training.channels, training.settings.show_bands)
        picture = draw_batch(first, training.model.config.id2label, show)
    picture.save(folder / "first_batch.png")
    print(f"The first augmented images with their masks: {folder / 'first_batch.png'}")
