"""Images without number into shards of results: reading, resizing and writing beside the network."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

from ..data.errors import DataError, data_errors
from ..data.image_lists import Found, ImageList
from ..data.json_files import write_json
from .photos import Photo, canvas_of, in_batches
from .result_files import OutputSettings, ResultFolder
from .rules import Rules
from .run_folder import SUMMARY, RunFolder
from .segmenter import Segmenter
from .workers import Workers, read_photo, write_result

logger = logging.getLogger(__name__)


class ManyImages:
    """Segments the images of a list, shard by shard.

    Args:
        segmenter: with tiles or without.
        rules: of the results.
        images: all images of the run.
        folder: of the run.
        settings: what is written.
        batch_size: images, or tiles of an image, that go through the network at a time.
        workers: processes that read and write.
        on_image: called after every image.
        on_problem: called with what is wrong with an image that is left out.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        rules: Rules,
        images: ImageList,
        folder: RunFolder,
        settings: OutputSettings,
        batch_size: int = 1,
        workers: int = 0,
        on_image: Callable[[], object] = lambda: None,
        on_problem: Callable[[str], object] = lambda problem: None,
    ):
        self.segmenter, self.rules, self.images, self.folder = segmenter, rules, images, folder
        self.settings, self.batch_size = settings, batch_size
        self.on_image, self.on_problem = on_image, on_problem
        self.workers = Workers(workers)
        self._resizing, self._keep = segmenter.resizing(rules), settings.overlays and not workers
        self._divisor = segmenter.processor.size_divisor

    def run(self, shards: Iterable[int]) -> list[int]:
        """Do those of some shards that nobody has done or is doing; returns them."""
        done = []
        try:
            for shard in shards:
                with self.folder.claim(shard) as staging:
                    if staging is not None:
                        try:
                            self._shard(shard, staging)
                        except BaseException:
                            self.workers.stop()  # they would write into a folder that is removed
                            raise
                        done.append(shard)
        finally:
            self.workers.stop()
        return done

    def _shard(self, shard: int, staging: Path):
        place = self.folder.place(shard)
        results, problems, writing = ResultFolder(staging, self.settings, place), {}, {}
        running, segments = deque(), {}
        for index, found, result, image in self._results(self.folder.positions(shard), problems):
            arguments = staging, self.settings, place, found, result, image, self.segmenter.opening
            writing[index] = self.workers.submit(write_result, *arguments)
            running.append(writing[index])
            segments[index] = len(result.segments)
            if len(running) > 2 * (self.workers.count + self.batch_size):  # results that wait are held in memory
                self._parts(running.popleft())
            self.on_image()
        for index in sorted(writing):  # batches of equal canvas have another order
            parts = self._parts(writing[index])
            if isinstance(parts, DataError):
                self._leave_out(index, parts, problems)
                results.remove(self.images[index])
            else:
                results.collect(parts)
        results.close()
        summary = {
            "images": len(set(writing) - set(problems)),
            "segments": sum(count for index, count in segments.items() if index not in problems),
            "unreadable": [
                {"image": self.images[index].address, "problem": problems[index]} for index in sorted(problems)
            ],
        }
        write_json(staging / SUMMARY, summary)

    def _parts(self, future: Future) -> list | DataError:
        """What an image adds to the files of all; or what is wrong with a file beside it, as of its georeference."""
        try:
            return self.workers.result(future)
        except DataError as error:
            return error

    def _results(self, positions: range, problems: dict[int, str]) -> Iterator[tuple]:
        """Position, image, result, and what to draw on if it is at hand; what is wrong goes into `problems`."""
        if self.segmenter.tile is not None:
            yield from self._results_of_windows(positions, problems)
            return
        photos = self._photos(positions, problems)
        for batch in in_batches(photos, self.batch_size, lambda item: canvas_of(item[2], self._divisor)):
            results = self.segmenter.segment_photos([photo for *_, photo in batch], self.rules)
            for (index, found, photo), result in zip(batch, results, strict=True):
                yield index, found, result, photo.image

    def _results_of_windows(self, positions: range, problems: dict[int, str]) -> Iterator[tuple]:
        """The same with tiles, whose windows are read by this process, one image at a time."""
        for index in positions:
            found = self.images[index]
            try:
                with data_errors():
                    image = self.segmenter.open(found.source)
                result = self.segmenter.segment_windows(image, self.rules, self.batch_size, progress=True)
            except DataError as error:  # windows of a file are read with the tiles
                self._leave_out(index, error, problems)
                self.on_image()
                continue
            yield index, found, result, image if self._keep else None

    def _photos(self, positions: range, problems: dict[int, str]) -> Iterator[tuple[int, Found, Photo]]:
        """Images in their order, some of them read ahead."""
        ahead, waiting = (2 * self.batch_size + self.workers.count if self.workers.count else 0), deque()
        for index in positions:
            found = self.images[index]
            waiting.append((index, found, self._read(found)))
            if len(waiting) > ahead:
                yield from self._next(waiting, problems)
        while waiting:
            yield from self._next(waiting, problems)

    def _read(self, found: Found) -> Future:
        return self.workers.submit(read_photo, found, self._resizing, self._keep, self.segmenter.channels)

    def _next(self, waiting: deque, problems: dict[int, str]):
        index, found, future = waiting.popleft()
        try:
            yield index, found, self.workers.result(future)
        except DataError as error:
            self._leave_out(index, error, problems)
            self.on_image()

    def _leave_out(self, index: int, error: DataError, problems: dict[int, str]):
        problems[index] = str(error)
        self.on_problem(str(error))
