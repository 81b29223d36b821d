"""`mask2former-hf evaluate`: official metrics of a checkpoint on annotated images."""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

from ..data.json_files import write_json
from ..data.kinds import VIDEO_KINDS
from ..data.reader import read_bands_of
from ..evaluation.evaluator import KNOWN_METRICS, evaluate, headline
from ..evaluation.processes import process_group, process_rank
from ..evaluation.report import PAGE, check_matplotlib, write_evaluation
from ..inference.effort import at_effort
from ..inference.loading import default_device
from ..inference.rules import METHODS
from ..model.channels import image_channels
from ..training.settings import MOST_IMAGES, MOST_WORKERS
from . import evaluate_video
from .datasets import add_data_arguments, load_split
from .device import add_device_argument
from .loading import load
from .main import UserError, in_flags
from .precision import add_dtype_argument
from .settings import add_flag, check_numbers, read_settings
from .tiling import add_effort_argument, add_tile_arguments, overlap_of

DEFAULTS = {"batch_size": 4, "num_workers": 0, "device": default_device()}
OPTIONS = ("threshold", "overlap_threshold", "top_k", "refine", "max_detections")  # of `SegmentationEvaluator`


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("config", nargs="?", type=Path, help="YAML file whose keys are the flags below")
    parser.add_argument("--model", help="checkpoint folder or Hub id")
    add_data_arguments(parser)
    add_flag(parser, "no_check")
    parser.add_argument("--metrics", nargs="+", choices=KNOWN_METRICS, help="default: by the checkpoint's task")
    parser.add_argument("--threshold", type=float, help="lowest score of panoptic segments (default: mostly 0.8)")
    parser.add_argument("--overlap-threshold", type=float, help="of panoptic segments (default: likewise)")
    parser.add_argument("--top-k", type=int, help="instances per image (default: 100)")
    parser.add_argument("--max-detections", type=int, help="instances of a class and image in AP (default: 100)")
    add_tile_arguments(parser)
    add_effort_argument(parser)
    parser.add_argument("--refine", choices=METHODS, help="a threshold per mask (otsu), or a dense CRF (crf)")
    parser.add_argument("--class-agnostic", action="store_true", help="videos: take all classes for one, as of DAVIS")
    parser.add_argument("--tta", action="store_true", help="average over six sizes and their mirror images")
    parser.add_argument("--batch-size", type=int, help="images per forward pass (default: 4)")
    parser.add_argument("--num-workers", type=int, help="processes that read images (default: 0)")
    parser.add_argument("--json", type=Path, help="write the full summary to this file")
    parser.add_argument("--report", type=Path, help="write report.html and results.json into this folder (matplotlib)")
    add_dtype_argument(parser)
    parser.add_argument("--bf16", action="store_true", help="forward pass in bfloat16 autocast")
    add_device_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments, DEFAULTS)
    if settings.model is None:
        raise UserError("--model is missing: a checkpoint folder or Hub id")
    check_numbers(settings, 1, ("batch_size", "top_k", "max_detections"), most=MOST_IMAGES)
    check_numbers(settings, 0, ("num_workers",), most=MOST_WORKERS)
    check_numbers(settings, 0, ("threshold", "overlap_threshold"), most=1)
    if settings.bf16 and settings.dtype not in (None, "float32"):
        raise UserError(f"--bf16: autocast is of float32 weights; leave out it or --dtype {settings.dtype}")
    settings.overlap = overlap_of(settings.tile, settings.overlap)
    with process_group("gloo"):  # under a launcher the processes share the images, and only counts travel
        if settings.device == "cuda" and process_rank()[1] > 1:
            settings.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return _evaluate(settings)


def _evaluate(settings) -> int:
    if settings.data in VIDEO_KINDS:
        return evaluate_video.run(settings, DEFAULTS)
    if settings.class_agnostic:
        raise UserError("--class-agnostic: is for videos; leave it out")
    report = _report(settings)
    dataset = load_split(settings, "")
    model, processor = load(settings.model, settings.device, dtype=settings.dtype)
    read_bands_of(dataset, image_channels(processor))
    try:
        if not settings.no_check and process_rank()[0] == 0:
            dataset.check_headers()
        summary = evaluate(
            model if settings.effort is None else at_effort(model, settings.effort),
            processor,
            dataset,
            metrics=settings.metrics,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            autocast=torch.bfloat16 if settings.bf16 else None,
            tta=settings.tta,
            tile=settings.tile,
            overlap=settings.overlap,
            report=report,
            **{name: getattr(settings, name) for name in OPTIONS},
        )
    except (ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), (*OPTIONS, "metrics", "effort"))) from error
    if process_rank()[0] == 0:
        print_summary(summary)
        if settings.json is not None:
            write_json(settings.json, summary)
        if report is not None:
            print(f"\nReport: {settings.report / PAGE}")
    return 0


def _report(settings):
    """What writes the report, if one is wanted; refuses it now, and not after all images."""
    if settings.report is None:
        return None
    try:
        check_matplotlib()
    except ImportError as error:
        raise UserError(f"--report {settings.report}: {error}") from error
    settings.report.mkdir(parents=True, exist_ok=True)
    shown = {name: value for name, value in vars(settings).items() if value not in (None, False)}
    shown = {name: value if isinstance(value, str | int | float) else str(value) for name, value in shown.items()}
    return partial(write_evaluation, settings.report, title=f"Evaluation of {settings.model}", settings=shown)


def print_summary(summary: dict[str, dict]):
    """The usual figures in one block, then the classes that occur."""
    for name, value in headline(summary).items():
        print(f"{name:12}{100 * value:7.2f}")
    columns = {"pq": ("pq", "sq", "rq"), "ap": ("AP", "AP50"), "box_ap": ("AP", "AP50"), "miou": ("iou", "accuracy")}
    for metric, values in summary.items():
        rows = values["per_class"].values()
        seen = [row for row in rows if any(row[column] == row[column] for column in columns[metric])]
        seen = [row for row in seen if metric != "pq" or row["tp"] + row["fp"] + row["fn"]]
        print(f"\n{metric} per class" + "".join(f"{column:>10}" for column in columns[metric]))
        for row in seen:
            print(f"  {row['name'][:24]:24}" + "".join(f"{100 * row[column]:10.2f}" for column in columns[metric]))
