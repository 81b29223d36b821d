"""Processes that read images and write results while the network runs. They import no torch."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

from ..data.errors import DataError, data_errors
from ..data.image_lists import Found
from .photos import Photo, Resizing
from .result_files import OutputSettings, ResultFolder
from .segmentation import Segmentation
from .segmenter import Opening, read


class WorkerDied(RuntimeError):
    """A process was ended from outside, as systems do that run out of memory."""


class Workers:
    """Runs functions in other processes, or here at once if there are none.

    Args:
        count: of processes; 0 for none.
    """

    def __init__(self, count: int):
        self.count = count
        # Not forked: the threads of torch, and a GPU that is in use, are not there in a forked process.
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin) if count else None

    def submit(self, function: Callable, *arguments) -> Future:
        if self._pool is not None:
            try:
                return self._pool.submit(function, *arguments)
            except BrokenProcessPool as error:
                raise WorkerDied("a worker process was ended from outside") from error
        done = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    def result(self, future: Future):
        """What the function returned or raised."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise WorkerDied("a worker process was ended from outside") from error

    def stop(self):
        """End the processes after what they are doing; what waits is not done."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _begin():
    """Ctrl-C is for the process that began this one, and so is its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    wait([parent_process().sentinel])
    os._exit(1)  # a process of a pool would wait for work for ever


def read_photo(found: Found, resizing: Resizing | None, keep: bool, channels: int | None) -> Photo:
    """An image, resized if that can be done.

    Args:
        keep: whether to hold what is drawn on; not where the photo travels to another process.
        channels: bands of the image; None for a photo.

    Raises:
        DataError: for one that cannot be read.
    """
    with data_errors("" if isinstance(found.source, str) else found.name):
        try:
            image = read(found.source, channels=channels)
        except FileNotFoundError as error:
            raise DataError(f"{found.source}: no such file") from error
    pixels = image if resizing is None else resizing(image)
    return Photo(pixels, image.shape[:2], resizing is not None, image if keep else None)


def write_result(
    folder: Path,
    settings: OutputSettings,
    place: Path,
    found: Found,
    result: Segmentation,
    image,
    opening: Opening,
) -> list:
    """The files of an image; returns what `ResultFolder.collect` takes.

    Args:
        image: what to draw on; None to open it again, which costs less than its way from one process to another.
        opening: how.

    Raises:
        DataError: for files of the image that cannot be read.
    """
    if image is None and settings.overlays:
        with data_errors():
            image = opening(found.source)
    return ResultFolder(folder, settings, place).write(found, result, image)
