"""Frames out of video files, folders and cameras, and video files of frames; decoded and written through PyAV."""

import os
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from ..data.images import read_image

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
CAMERA = "webcam:"
FOLDER_RATE = 10  # frames per second of what is written for a folder, and where nothing says it
PACKETS_ASKED = 100
CODECS = ("libx264", "mpeg4")  # the first that the installed PyAV has


def is_video(source: str | os.PathLike) -> bool:
    """Whether a name is that of a video file or a camera."""
    return str(source).startswith(CAMERA) or Path(source).suffix.lower() in VIDEO_SUFFIXES


class VideoSource:
    """A video file, a folder of frames in the order of their names, or a camera, `webcam:0`.

    Frames are decoded one at a time; a second iteration starts anew.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: for a file that is no video, and a folder without images.
        ImportError: for files and cameras without PyAV.
    """

    def __init__(self, source: str | os.PathLike):
        self.name = str(source)
        self.length, self.rate = None, Fraction(FOLDER_RATE)  # length: as far as known
        self.size = None  # (H, W) of a file's frames as they are stored, which may be turned
        self.files = None
        if not self.name.startswith(CAMERA) and not os.path.exists(source):
            raise FileNotFoundError(f"{source}: no such file or folder")
        if os.path.isfile(source) and not os.path.getsize(source):
            raise ValueError(_unreadable(self.name, "the file is empty"))
        if os.path.isdir(source):
            from ..data.videos import frame_files  # imports torch, and `is_video` is asked without

            self.files = frame_files(Path(source))
            self.length = len(self.files)
            return
        with self._open() as container:
            stream = container.streams.video[0]
            self.length = stream.frames or None
            self.size = stream.height, stream.width
            rate = stream.average_rate
            if not rate and not self.name.startswith(CAMERA):
                rate = _rate_of_packets(container, stream)
            self.rate = rate or self.rate

    def _open(self):
        av = load_av()
        try:
            if self.name.startswith(CAMERA):
                container = av.open(f"/dev/video{self.name.removeprefix(CAMERA)}", format="v4l2")
            else:
                container = av.open(self.name)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(_unreadable(self.name, error.strerror or str(error))) from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{self.name}: has no video stream")
        return container

    def __iter__(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB, upright.

        Raises:
            ValueError: where the file is damaged, after the frames before.
        """
        if self.files is not None:
            yield from map(read_image, self.files)
            return
        av = load_av()
        number = 0
        with self._open() as container:
            try:
                for frame in container.decode(video=0):
                    image = frame.to_ndarray(format="rgb24")
                    yield np.rot90(image, frame.rotation // 90).copy() if frame.rotation % 360 else image
                    number += 1
            except av.FFmpegError as error:
                raise ValueError(f"{self.name}: damaged after {number} frames ({error})") from error
        if not number:
            raise ValueError(f"{self.name}: has no frames")


def _unreadable(name: str, reason: str) -> str:
    repair = "is it there, and free?" if name.startswith(CAMERA) else "give a whole mp4, mov, mkv or webm"
    return f"{name}: cannot be read as a video ({reason}); {repair}"


def _rate_of_packets(container, stream) -> Fraction | None:
    """Frames per second of a file that does not say it, as a browser's recording of a webcam: by its first packets."""
    times = [packet.pts for packet in islice(container.demux(stream), PACKETS_ASKED) if packet.pts is not None]
    span = (max(times) - min(times)) * stream.time_base if times else 0
    return (len(times) - 1) / span if span else None


class VideoWriter:
    """Writes an mp4 as frames come; a context manager.

    Args:
        path: of the file.
        rate: frames per second.
    """

    def __init__(self, path: str | os.PathLike, rate: float | Fraction):
        av = load_av()
        self.container, self.stream = av.open(str(path), "w"), None
        self.codec = next(name for name in CODECS if name in av.codecs_available)
        self.rate = Fraction(rate).limit_denominator(1000)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()

    def add(self, image: np.ndarray):
        """An (H, W, 3) uint8 frame; sides that are odd lose a pixel, as the codec needs even ones."""
        image = np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
        if self.stream is None:
            self.stream = self.container.add_stream(self.codec, rate=self.rate)
            self.stream.height, self.stream.width, self.stream.pix_fmt = *image.shape[:2], "yuv420p"
        frame = load_av().VideoFrame.from_ndarray(image, format="rgb24")
        self.container.mux(self.stream.encode(frame))


def load_av():
    """PyAV.

    Raises:
        ImportError: with the line that installs it.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("video files need PyAV: pip install av") from error
    return av
