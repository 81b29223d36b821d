"""The page's part for videos: what it takes, and what it answers. `video_prediction` does the work."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event

from .page_content import TRACK_COLUMNS, message, track_rows
from .segmenter import Segmenter
from .video_files import VideoSource
from .video_prediction import OVERLAY, RESULTS, PredictedVideo, best_score, predict_video
from .video_segmenter import VideoSegmenter

MOST_FRAMES = 300  # ten seconds of a phone's video; minutes on a CPU
CAMERA = {"width": {"ideal": 640}, "height": {"ideal": 480}}  # of Gradio's 1920 x 1440 a busy browser records nothing
NETWORK = "network"  # of which one runs at a time, for images and videos
EMPTY = "", None, [], []  # what the page shows of no video
Answer = tuple[str, str | None, list[list], list[str]]


def add_video_tab(
    gradio,
    segmenter: Segmenter | VideoSegmenter,
    tasks: list[str],
    slider: Callable[[str], dict],
    most_frames: int,
    most_pixels: int,
    examples: list[str],
) -> Callable:
    """Fill the part of a page that takes videos; gives what is to be called when a page is closed.

    Args:
        gradio: the package.
        segmenter: whose model is used.
        tasks: that can be chosen.
        slider: value and more of the threshold's slider, by task.
        most_frames, most_pixels: as for `answer_video`.
        examples: files of videos.
    """
    with gradio.Row():
        with gradio.Column(scale=1):
            video = _video_input(gradio)
            task = gradio.Radio(tasks, value=segmenter.task, label="Task", elem_id="video-task")
            threshold = gradio.Slider(0, 1, step=0.01, label="Threshold", **slider(segmenter.task))
            gradio.Markdown(f"At most the first {most_frames} frames are segmented.")
            with gradio.Row():
                button = gradio.Button("Segment", variant="primary", elem_id="segment-video")
                stop = gradio.Button("Stop", interactive=False, elem_id="stop-video")
            if examples:
                gradio.Examples(examples, video)
        with gradio.Column(scale=2):
            shows = _answer_fields(gradio)

    runs = Runs()
    begin, mark, end, close = _handlers(gradio, runs)

    def show(path, task, threshold, request: gradio.Request, progress=gradio.Progress()):  # noqa: B008 (Gradio's way)
        bar = partial(progress.tqdm, desc="segmenting", unit="frames")
        with runs.run(request.session_hash) as stopped:
            yield from answer_video(segmenter, path, task, threshold, bar, most_frames, most_pixels, stopped)

    gradio.on([button.click, video.change], begin, None, stop, queue=False, api_name=False)
    shown = gradio.on(
        [button.click, video.change],
        show,
        [video, task, threshold],
        shows,
        show_progress_on=shows[1],
        concurrency_limit=1,
        concurrency_id=NETWORK,
        api_name="segment_video",
    )
    shown.then(end, None, stop, queue=False, api_name=False)
    stop.click(mark, None, stop, queue=False, api_name=False)
    task.change(lambda task: gradio.Slider(**slider(task)), task, threshold, api_name=False)
    return close


class Runs:
    """Videos that are being segmented, by the session of their page, and which of them are to end.

    Gradio's own `cancels` would leave the network running to the end, and show nothing of what was done.
    """

    def __init__(self):
        self._running: dict[str, list[Event]] = {}
        self._stopped_early: set[str] = set()  # sessions whose run waits for the network, and is not to begin

    @contextmanager
    def run(self, session: str) -> Iterator[Callable[[], bool]]:
        """A run, while it lasts; gives whether it is to end."""
        ends = Event()
        if session in self._stopped_early:
            self._stopped_early.discard(session)
            ends.set()
        self._running.setdefault(session, []).append(ends)
        try:
            yield ends.is_set
        finally:
            self._running[session].remove(ends)
            if not self._running[session]:
                del self._running[session]

    def is_running(self, session: str) -> bool:
        return session in self._running

    def ask(self, session: str):
        """Another run will begin; those that are there go on, or end, as they would."""
        self._stopped_early.discard(session)

    def stop(self, session: str):
        """Let all runs of a session end that are there, or the one that waits."""
        for ends in list(self._running.get(session, ())):
            ends.set()
        if not self.is_running(session):
            self._stopped_early.add(session)

    def close(self, session: str):
        """The page was closed."""
        self.stop(session)
        self._stopped_early.discard(session)


def _handlers(gradio, runs: Runs) -> tuple[Callable, Callable, Callable, Callable]:
    """Of a run's beginning, of the button *Stop*, of a run's end, and of a page that is closed."""

    def begin(request: gradio.Request):
        runs.ask(request.session_hash)
        return gradio.Button(interactive=True)

    def stop(request: gradio.Request):
        runs.stop(request.session_hash)
        return gradio.Button(interactive=False)

    def end(request: gradio.Request):
        return gradio.Button(interactive=runs.is_running(request.session_hash))

    def close(request: gradio.Request):
        runs.close(request.session_hash)

    return begin, stop, end, close


class Stopped(ValueError):
    """Somebody has seen enough of a video."""


def until_stopped(frames: Iterable, stopped: Callable[[], bool]) -> Iterator:
    """The frames, up to a `Stopped` error."""
    for frame in frames:
        if stopped():
            raise Stopped("Stopped")
        yield frame


def _answer_fields(gradio) -> list:
    """What shows an `Answer`."""
    look = {"interactive": False}
    return [
        gradio.HTML(elem_id="video-said"),
        gradio.Video(label="Result", elem_id="video-overlay", autoplay=True, loop=True, **look),
        gradio.Dataframe(headers=list(TRACK_COLUMNS), datatype="str", label="Objects", elem_id="tracks", **look),
        gradio.File(file_count="multiple", label="Download", elem_id="video-files", **look),
    ]


def _video_input(gradio):
    camera = gradio.WebcamOptions(mirror=False, constraints={"video": CAMERA})
    video = gradio.Video(
        sources=["upload", "webcam"], webcam_options=camera, include_audio=False, label="Video", elem_id="video"
    )
    video.preprocess = lambda payload: None if payload is None else payload.path  # Gradio's own runs ffmpeg
    return video


def answer_video(
    segmenter: Segmenter | VideoSegmenter,
    path: str | None,
    task: str,
    threshold: float,
    progress: Callable[[Iterable], Iterable],
    most_frames: int,
    most_pixels: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Answer]:
    """What is said, the overlay's file, rows of objects and the files of an upload; once, and there until it goes on.

    Args:
        path: of the upload; None for none.
        task: of the results; instance of a model of clips.
        progress: wraps the frames; takes `total`.
        most_frames: that are segmented, the first.
        most_pixels: of a frame.
        stopped: asked before every frame, whether it and those after it are left out.
    """
    if path is None:
        yield EMPTY
        return
    name = Path(path).name
    try:
        chosen = of_task(segmenter, task)
        source = VideoSource(path)
        _check_size(source, most_pixels)
        numbers = {} if task == "semantic" else {"threshold": threshold}
        stream = chosen.stream(**numbers)
    except (OSError, ValueError, ImportError) as error:
        yield message(_without_folder(error, path)), *EMPTY[1:]
        return
    total = min(source.length or most_frames, most_frames)
    with tempfile.TemporaryDirectory() as folder:
        found = predict_video(
            chosen,
            source,
            stream,
            Path(folder),
            video_id=name,
            progress=lambda frames: until_stopped(progress(frames, total=total), stopped),
            most_frames=most_frames,
        )
        if not found.length:
            yield message(_without_folder(found.problem, path)), *EMPTY[1:]
            return
        rows = track_rows(found.tracks, chosen.model.config.id2label)
        said = _said(found, most_frames, path)
        if not rows and task != "semantic":
            said.append(f"No object has a score above the threshold: lower it. {_best(chosen, source, numbers)}")
        files = [f"{folder}/{file}" for file in RESULTS]
        yield "".join(map(message, said)), f"{folder}/{OVERLAY}", rows, files


def of_task(segmenter: Segmenter | VideoSegmenter, task: str) -> VideoSegmenter:
    """A segmenter of videos with the model of another.

    Raises:
        ValueError: for a task that its checkpoint does not have.
    """
    kept = {}
    if isinstance(segmenter, VideoSegmenter):
        kept = {name: getattr(segmenter, name) for name in ("window", "overlap", "tracking")}
    return VideoSegmenter.of(segmenter.model, segmenter.processor, task=task, **kept)


def _check_size(source: VideoSource, most_pixels: int):
    if source.size is not None and source.size[0] * source.size[1] > most_pixels:
        H, W = source.size
        raise ValueError(
            f"The frames have {W} x {H} pixels, and this page takes {most_pixels / 1e6:g} million at most: make them "
            "smaller, or segment them by mask2former-hf predict, which has no such limit."
        )


def _said(found: PredictedVideo, most_frames: int, path: str) -> list[str]:
    """Lines about what was not segmented."""
    lines = []
    if found.problem:
        lines.append(f"{_without_folder(found.problem, path)}. Shown is what came before: {found.length} frames.")
    if found.cut:
        lines.append(
            f"The video is longer: these are its first {most_frames} frames. mask2former-hf predict takes all."
        )
    return lines


def _best(segmenter: VideoSegmenter, source: VideoSource, numbers: Mapping) -> str:
    return f"The best score of the first frames is {best_score(segmenter, source, **numbers):.2f}."


def _without_folder(error: Exception | str, path: str) -> str:
    """An error for whoever uploaded the file: no place on the server is named."""
    return str(error).replace(str(path), Path(path).name)
