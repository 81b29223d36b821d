"""`mask2former-hf evaluate` of videos: average precision of tracks, or VPQ, and identity switches."""

from functools import partial

from tqdm import tqdm

from ..data.json_files import write_json
from ..data.kinds import VIDEO_KINDS
from ..evaluation.processes import process_rank
from ..evaluation.videos import evaluate_videos, headline_of_videos
from ..inference.loading import LoadingError
from ..inference.video_segmenter import VideoSegmenter
from .datasets import load_split
from .main import UserError, in_flags

OF_IMAGES = (
    "metrics",
    "max_detections",
    "tile",
    "refine",
    "tta",
    "bf16",
    "effort",
    "batch_size",
    "num_workers",
    "report",
)
NUMBERS = ("threshold", "overlap_threshold", "top_k")


def run(settings, defaults: dict) -> int:
    for name in OF_IMAGES:
        value = getattr(settings, name)
        if value is not None and value is not False and value != defaults.get(name):  # an effort of 0 is one
            raise UserError(f"--{name.replace('_', '-')}: is for images; leave it out for videos")
    videos = load_split(settings, "", VIDEO_KINDS)
    first = process_rank()[0] == 0
    numbers = {name: value for name in NUMBERS if (value := getattr(settings, name)) is not None}
    try:
        if not settings.no_check and first:
            videos.check_headers()
        task = "instance" if settings.class_agnostic or videos.task == "instance" else None
        segmenter = VideoSegmenter(settings.model, task=task, device=settings.device, dtype=settings.dtype)
        figures = evaluate_videos(
            segmenter,
            videos,
            class_agnostic=bool(settings.class_agnostic),
            progress=partial(tqdm, desc="evaluating", unit="video", disable=not first),
            **numbers,
        )
    except LoadingError as error:
        raise UserError(f"--model {error}") from error
    except (ValueError, ImportError) as error:
        raise UserError(in_flags(str(error), (*NUMBERS, "class_agnostic"))) from error
    if first:
        report(figures)
        if settings.json is not None:
            write_json(settings.json, figures)
    return 0


def report(figures: dict):
    """The usual figures, then the classes that occur."""
    for name, value in headline_of_videos(figures).items():
        print(f"{name:12}{value:7d}" if name == "switches" else f"{name:12}{100 * value:7.2f}")
    rows = figures.get("per_class", {}).values()
    if rows:
        print("\nap per class        AP      AP50")
    for row in rows:
        if row["AP"] == row["AP"]:
            print(f"  {row['name'][:16]:16}{100 * row['AP']:10.2f}{100 * row['AP50']:10.2f}")
