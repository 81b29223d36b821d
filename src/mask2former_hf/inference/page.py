"""A page in the browser that segments images and videos with a checkpoint, by Gradio."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from ..data.moving_scenes import MovingScenes
from ..data.scenes import ScenesDataset
from ..model.result_defaults import TASKS
from .loading import is_video_checkpoint
from .page_content import (
    COLUMNS,
    MOST_PIXELS,
    UnusableImage,
    hover_overlay,
    message,
    read_upload,
    table_rows,
    write_downloads,
)
from .page_video import MOST_FRAMES, NETWORK, add_video_tab
from .rules import rules_of
from .segmenter import Segmenter
from .tiles import MIN_TILE
from .video_files import VideoWriter
from .video_segmenter import VideoSegmenter

PACKAGES = ("gradio", "shapely", "scikit-image", "av")  # setup.cfg's extra `app`
NONE, AUTO = "none", "auto"
REFINEMENTS = (NONE, "otsu")
TILES = (NONE, AUTO, "512", "1024")
NOTHING = "No segment has a score above the threshold: lower it, or try another image."
FEW_EXAMPLES, EXAMPLE_SIDE, EXAMPLE_FRAMES, EXAMPLE_RATE = 3, 320, 16, 6


def load_gradio():
    """Gradio without its reports to its makers, which it would send at every start.

    Raises:
        ImportError: where it is not installed, with the command that installs it.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"the page needs gradio: pip install '.[app]' in a clone, elsewhere pip install {' '.join(PACKAGES)}"
        ) from error
    return gradio


def load_segmenter(checkpoint: str | os.PathLike, device: str | None = None) -> Segmenter | VideoSegmenter:
    """What a page is made of: a segmenter of images, which its page uses for videos as well, or one of clips.

    Raises:
        ValueError: as `Segmenter` and `VideoSegmenter`.
    """
    kind = VideoSegmenter if is_video_checkpoint(checkpoint) else Segmenter
    return kind(checkpoint, device=device)


def make_page(
    segmenter: Segmenter | VideoSegmenter,
    *,
    examples: Iterable[str | Path] | None = None,
    most_pixels: int = MOST_PIXELS,
    most_frames: int = MOST_FRAMES,
):
    """A `gradio.Blocks`; `launch()` it. It takes images and videos; of a model of clips, videos alone.

    Args:
        segmenter: of a checkpoint for photos; its task is the one that the page begins with.
        examples: files of images, or of videos for a model of clips, to choose from; None for generated scenes if the
            checkpoint knows their classes, else for none.
        most_pixels: of an image or a frame; larger ones get a message.
        most_frames: of a video that are segmented.

    Raises:
        ImportError: without gradio.
        ValueError: for a checkpoint whose images are no photos, and for an export.
    """
    of_clips = isinstance(segmenter, VideoSegmenter) and segmenter.of_clips
    if getattr(segmenter, "channels", None) is not None:
        raise ValueError(f"segmenter: its images have {segmenter.channels} bands, and browsers show photos alone")
    if not hasattr(segmenter.model, "parameters"):
        raise ValueError("segmenter: is of an export, whose task and rules are fixed; give that of its checkpoint")
    gradio = load_gradio()
    tasks = ["instance"] if of_clips else [task for task in TASKS if _is_possible(segmenter, task)]
    slider = partial(_threshold, segmenter)
    given = None if examples is None else list(map(str, examples))
    with gradio.Blocks(title="Mask2Former", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown("## Mask2Former")
        with gradio.Tabs():
            if not of_clips:
                with gradio.Tab("Image"):
                    _add_image_tab(gradio, segmenter, tasks, slider, given, most_pixels)
            with gradio.Tab("Video"):
                videos = given if of_clips and given is not None else _example_videos(segmenter)
                page.unload(add_video_tab(gradio, segmenter, tasks, slider, most_frames, most_pixels, videos))
    return page


def _add_image_tab(
    gradio,
    segmenter: Segmenter,
    tasks: list[str],
    slider: Callable[[str], dict],
    examples: list[str] | None,
    most_pixels: int,
):
    with gradio.Row():
        with gradio.Column(scale=1):
            image = gradio.Image(
                type="filepath", sources=["upload", "clipboard", "webcam"], label="Image", elem_id="image"
            )
            # Gradio's own opens the file, and of a damaged one it shows an error with the server's path.
            image.preprocess = lambda payload: None if payload is None else payload.path
            task = gradio.Radio(tasks, value=segmenter.task, label="Task", elem_id="task")
            threshold = gradio.Slider(0, 1, step=0.01, label="Threshold", **slider(segmenter.task))
            refinement = gradio.Radio(REFINEMENTS, value=NONE, label="Refinement", **_refinable(segmenter.task))
            tile = gradio.Dropdown(TILES, value=NONE, label="Tile (pixels)", allow_custom_value=True)
            button = gradio.Button("Segment", variant="primary", elem_id="segment")
            files = _example_files(segmenter) if examples is None else examples
            if files:
                gradio.Examples(files, image)
        with gradio.Column(scale=2):
            overlay = gradio.HTML(elem_id="overlay")
            table = gradio.Dataframe(
                headers=list(COLUMNS), datatype="str", interactive=False, label="Segments", elem_id="table"
            )
            downloads = gradio.File(file_count="multiple", interactive=False, label="Download", elem_id="files")

    def show(path, task, threshold, refinement, tile):
        yield from answer(segmenter, path, task, threshold, refinement, tile, most_pixels)

    asked = {
        "fn": show,
        "inputs": [image, task, threshold, refinement, tile],
        "outputs": [overlay, table, downloads],
        "concurrency_limit": 1,
        "concurrency_id": NETWORK,
    }
    gradio.on([button.click, image.change], **asked, api_name="segment")
    task.change(
        lambda task: (gradio.Slider(**slider(task)), gradio.Radio(value=NONE, **_refinable(task))),
        task,
        [threshold, refinement],
        api_name=False,
    ).then(**asked, api_name=False)


def answer(
    segmenter: Segmenter,
    path: str | None,
    task: str,
    threshold: float,
    refinement: str,
    tile: str,
    most_pixels: int = MOST_PIXELS,
) -> Iterator[tuple[str, list[list], list[str]]]:
    """Overlay, table and files of an upload, once; the files are there until the iterator goes on.

    Args:
        path: of the upload; None for none.
        refinement: "none" or "otsu".
        tile: "none", "auto", or a number of pixels.
    """
    if path is None:
        yield "", [], []
        return
    try:
        pixels = read_upload(path, most_pixels)
        chosen = Segmenter.of(
            segmenter.model,
            segmenter.processor,
            task=task,
            refine=None if refinement == NONE else refinement,
            tile=_tile(tile),
        )
        result = chosen(pixels, **({} if task == "semantic" else {"threshold": threshold}))
    except (UnusableImage, ValueError, ImportError) as error:
        yield message(str(error)), [], []
        return
    if not result.segments:
        yield message(NOTHING), [], []
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [str(file) for file in write_downloads(folder, result, pixels)]
        yield hover_overlay(result, pixels), table_rows(result), files


def _tile(text: str) -> int | str | None:
    if text in (NONE, AUTO):
        return None if text == NONE else AUTO
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Tile {text}: must be none, auto, or a number of pixels from {MIN_TILE}.") from error


def _is_possible(segmenter: Segmenter, task: str) -> bool:
    """Whether the checkpoint has such results; one that classifies pixels has semantic ones alone."""
    try:
        rules_of(segmenter.model.config, task, processor=segmenter.processor)
    except ValueError:
        return False
    return True


def _threshold(segmenter: Segmenter, task: str) -> dict:
    """The slider's value for a task: the checkpoint's own; semantic results have none."""
    rules = rules_of(segmenter.model.config, task, processor=segmenter.processor)
    return {"value": rules.threshold, "interactive": task != "semantic"}


def _refinable(task: str) -> dict:
    return {"interactive": task != "semantic"}  # which have no masks to find a threshold for


def _example_files(segmenter: Segmenter) -> list[str]:
    if _names(segmenter) != ScenesDataset.classes.id2label:
        return []
    folder = _folder_of_examples()
    files = [folder / f"scene_{number}.png" for number in range(FEW_EXAMPLES)]
    for file, scene in zip(files, ScenesDataset(FEW_EXAMPLES, size=EXAMPLE_SIDE, seed=7), strict=True):
        Image.fromarray(scene.image).save(file)
    return [str(file) for file in files]


def _example_videos(segmenter: Segmenter | VideoSegmenter) -> list[str]:
    if _names(segmenter) not in (ScenesDataset.classes.id2label, MovingScenes.classes.id2label):
        return []
    file = _folder_of_examples() / "moving_scene.mp4"
    video = MovingScenes(1, EXAMPLE_FRAMES, size=EXAMPLE_SIDE, seed=1, num_things=(3, 4), radius=(0.14, 0.26))[0]
    try:
        writer = VideoWriter(file, EXAMPLE_RATE)
    except ImportError:  # the page says so of the first video that it gets
        return []
    with writer:
        for number in range(video.length):
            writer.add(video.frame(number))
    return [str(file)]


def _folder_of_examples() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mask2former-examples-"))  # for as long as the page may be open
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _names(segmenter: Segmenter | VideoSegmenter) -> dict[int, str]:
    return {int(label): name for label, name in segmenter.model.config.id2label.items()}
