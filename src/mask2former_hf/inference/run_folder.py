"""The folder of a run over many images: results in shards, each there as a whole or not at all.

A shard is a number of images that follow each other. Its results are written into a hidden folder, which is renamed
when they are complete: whatever stops a run, what it leaves is complete shards, and the same run again does the
others. Several processes on several machines may work in one folder without a word to each other. A folder with one
shard has its results directly in it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..data.errors import DataError
from ..data.file_lock import FileLock, Locked
from ..data.json_files import write_json
from .result_files import RESULTS

SHARD_SIZE = 500  # images, at most, unless the number of shards is given: 4 minutes at 2 images per second
RECORD, SHARDS, SUMMARY, UNREADABLE = "run.json", "shards", "summary.json", "unreadable.txt"
STAGING_OF_ONE = ".00000-of-00001"  # of a run with one shard
NAME_ONLY = "model"  # of the record: the same weights from another place are the same model


class OtherRun(ValueError):
    """The folder has the results of a run by other rules."""


def number_of_shards(images: int) -> int:
    """That of a run that was given none."""
    return max(1, -(-images // SHARD_SIZE))


class RunFolder:
    """Shards of a run.

    Args:
        output: folder of the run.
        images: how many there are.
        num_shards: into how many shards they are divided.
    """

    def __init__(self, output: Path, images: int, num_shards: int):
        self.output, self.images, self.num_shards = Path(output), images, num_shards
        self.root = self.output if num_shards == 1 else self.output / SHARDS

    def positions(self, shard: int) -> range:
        """The images of a shard; shards differ by one image at most."""
        bounds = (self.images * number // self.num_shards for number in (shard, shard + 1))
        return range(*bounds)

    def place(self, shard: int) -> Path:
        """Where the results of a shard are when they are complete."""
        return self.output if self.num_shards == 1 else self.root / self._name(shard)

    def is_done(self, shard: int) -> bool:
        return self._has_summary(self.place(shard))

    @staticmethod
    def _has_summary(folder: Path) -> bool:
        try:
            summary = read_mapping(folder / SUMMARY)
        except (OSError, ValueError):  # one of a disk that was full or without power
            return False
        return summary.keys() >= {"images", "segments", "unreadable"}

    def missing(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if not self.is_done(shard)]

    def summary(self, shard: int) -> dict:
        """What the `claim` of a shard that is done has left."""
        return read_mapping(self.place(shard) / SUMMARY)

    @contextmanager
    def claim(self, shard: int) -> Iterator[Path | None]:
        """An empty folder for the results of a shard, which are published when the block ends without an error.

        The block has to write `summary.json` as the last of its files. None is yielded if the shard is done, or if
        another process is at it.
        """
        staging = self.root / f".{self._name(shard)}"
        lock = FileLock(self.root / f".{self._name(shard)}.lock")
        try:
            lock.take()
        except Locked:
            yield None
            return
        try:
            if self._has_summary(staging):  # stopped while it was published
                self._publish(staging, shard)
            if self.is_done(shard):
                yield None
                return
            self._clear(staging, shard)
            staging.mkdir(parents=True)
            try:
                yield staging
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            self._publish(staging, shard)
        finally:
            lock.path.unlink(missing_ok=True)
            lock.release()

    def _clear(self, staging: Path, shard: int):
        """Remove what a run that was killed has left, and a shard of which files are missing."""
        shutil.rmtree(staging, ignore_errors=True)
        place = self.place(shard)
        if place != self.output:
            shutil.rmtree(place, ignore_errors=True)
        elif left := [name for name in RESULTS if (place / name).exists()]:
            raise DataError(
                f"{self.output}: has {', '.join(left)} of this run without {SUMMARY}, which would say that they are "
                "whole; name another folder, or add --overwrite to replace them"
            )

    def _publish(self, staging: Path, shard: int):
        place = self.place(shard)
        if place != self.output:
            staging.rename(place)
            return
        for path in sorted(staging.iterdir(), key=lambda path: path.name == SUMMARY):  # it says that all are there
            path.rename(place / path.name)
        staging.rmdir()

    def _name(self, shard: int) -> str:
        return f"{shard:05}-of-{self.num_shards:05}"


def read_mapping(path: Path) -> dict:
    """A json file of names and values.

    Raises:
        OSError, ValueError: for a file that cannot be read, and for one of something else.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: has no names and values")
    return content


def check_record(output: Path, record: Mapping):
    """Refuse a folder in which a run by other rules has begun.

    Raises:
        OtherRun: naming what differs.
    """
    path = output / RECORD
    if not path.is_file():
        return
    try:
        earlier = read_mapping(path)
    except ValueError as error:
        raise OtherRun(f"{RECORD} there is damaged ({error})") from error
    for name in dict.fromkeys([*record, *earlier]):
        before, now = earlier.get(name), record.get(name)
        if before != now and name != NAME_ONLY:
            raise OtherRun(f"{name} was {_shown(before)} and is {_shown(now)}")


def write_record(output: Path, record: Mapping):
    """Say by which rules the run is made; of several processes each says the same."""
    if not (output / RECORD).is_file():
        write_json(output / RECORD, record)
    check_record(output, record)


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def share_of(process: int, processes: int, num_shards: int) -> range:
    """The shards of one of several processes."""
    return range(process, num_shards, processes)
