"""The doctor for annotated videos: frames, masks, classes and objects of each split, and of train against val."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from .findings import ERROR, WARNING, Finding
from .recognise import files_by_folder, split_of
from .text_files import read_json
from .videos import Video, VideoReader

MOST_VIDEOS = 5000  # of a split that are looked at, evenly spread
MOST_FRAMES = 8  # of an object whose masks are decoded, evenly spread


@dataclass
class VideoSurvey:
    """What the videos of a split are.

    Args:
        problems: of those that cannot be used.
        names: of the classes; `objects`: of each, those with a pixel in the frames looked at; `empty`: without one.
        seen: videos that were looked at.
        bare: ids of those without an object; `single`: of one frame.
    """

    split: str
    names: list[str]
    objects: np.ndarray
    seen: int = 0
    problems: list[str] = field(default_factory=list)
    empty: int = 0
    bare: list = field(default_factory=list)
    single: list = field(default_factory=list)


def recognise_videos(folder: str | Path) -> dict:
    """Settings for YouTube-VIS' jsons in a folder, as of `recognise.recognise`; {} if there is none.

    Frames are looked for beside and below a json, else in the whole folder.
    """
    folder, found = Path(folder), {}
    for place, names in files_by_folder(folder).items():
        for name in names:
            if not name.endswith(".json") or not _is_of_videos(place / name):
                continue
            split = split_of(*(place / name).relative_to(folder).parts) or "train"
            below = any(path.is_dir() for path in place.iterdir())
            found |= {f"{split}_annotations": place / name, f"{split}_images": place if below else folder}
    return found | {"data": "youtube-vis"} if found else {}


def _is_of_videos(path: Path) -> bool:
    """Whether a json has `videos`; others, which may be large, are searched for the word and not parsed."""
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if content.find(b'"videos"') < 0:
                return False
        content = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "videos" in content


def examine_videos(
    splits: dict[str, VideoReader],
    progress: Callable[[Iterable, str], Iterable] = lambda indices, split: indices,
) -> list[Finding]:
    """Findings of each split and, of "train" and "val", of both together.

    Args:
        splits: name -> reader.
        progress: wraps the numbers of the videos of a split, such as tqdm.
    """
    surveys = [survey(reader, split, progress) for split, reader in splits.items()]
    found = [finding for one in surveys for finding in findings_of(one)]
    return found + list(only_in_val(*surveys)) if len(surveys) == 2 else found


def survey(reader: VideoReader, split: str, progress) -> VideoSurvey:
    names = [row.name for row in reader.classes.rows]
    found = VideoSurvey(split, names, np.zeros(len(names), dtype=int))
    step = -(-len(reader) // MOST_VIDEOS)
    for index in progress(range(0, len(reader), step), split):
        found.seen += 1
        try:
            reader.check_header(index)
            video = reader[index]
            pixels = [_has_pixels(video, thing) for thing in video.objects]
        except (OSError, ValueError) as error:
            found.problems.append(str(error))
            continue
        for thing, has_pixels in zip(video.objects, pixels, strict=True):
            found.empty += not has_pixels
            found.objects[thing.label] += has_pixels and not thing.iscrowd
        found.bare += [video.id] if not video.objects else []
        found.single += [video.id] if video.length == 1 else []
    return found


def _has_pixels(video: Video, thing) -> bool:
    """Whether an object has a pixel in the frames that are looked at; raises ValueError for a mask that is none."""
    frames = [number for number, mask in enumerate(thing.segmentations) if mask is not None]
    step = -(-len(frames) // MOST_FRAMES) or 1
    return any([thing.mask(frame, video.size).any() for frame in frames[::step]])  # of a list: all are decoded


def findings_of(split: VideoSurvey) -> list[Finding]:
    """Of one split."""
    usable = split.seen - len(split.problems)
    absent = [name for name, count in zip(split.names, split.objects, strict=True) if not count]
    nothing = usable and len(absent) == len(split.names)
    rows = (
        (
            split.problems,
            ERROR,
            f"{len(split.problems)} of {split.seen} videos cannot be used. {''.join(split.problems[:1])}",
            "training stops before it begins, or at the first of them",
            "mend these files, or leave the videos out",
        ),
        (
            nothing,
            ERROR,
            "no object has a pixel that counts",
            "there is nothing to learn or to measure",
            "see whether all objects are crowds, or all masks empty",
        ),
        (
            absent and not nothing and not split.problems,
            WARNING,
            f"{len(absent)} of {len(split.names)} classes are never seen: {', '.join(absent[:5])}",
            "they cannot be learnt here, and their metric is undefined",
            "add videos that have them, or take the classes out",
        ),
        (
            split.empty,
            WARNING,
            f"{split.empty} objects have no pixel in the frames that were looked at",
            "a query is spent on each, and there is nothing to learn from them",
            "take them out of the annotations",
        ),
        (
            split.bare,
            WARNING,
            f"{len(split.bare)} of {usable} videos have no object, such as {split.bare[:1]}",
            "whatever is found there counts as wrong",
            "see whether their annotations are missing",
        ),
        (
            split.single,
            WARNING,
            f"{len(split.single)} of {usable} videos have one frame, such as {split.single[:1]}",
            "nothing can be followed in one frame",
            "give more frames, or train on images",
        ),
    )
    return [Finding(severity, split.split, *words) for applies, severity, *words in rows if applies]


def only_in_val(train: VideoSurvey, val: VideoSurvey) -> Iterator[Finding]:
    counts = zip(train.names, train.objects, val.objects, strict=True)
    new = [name for name, here, there in counts if there and not here]
    if new and train.objects.sum():
        yield Finding(
            WARNING,
            val.split,
            f"{len(new)} classes are only here, not in {train.split}: {', '.join(new[:5])}",
            "they cannot be learnt, and count as missed",
            "divide the videos anew, or take the classes out",
        )
