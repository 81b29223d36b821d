"""Finding the files that folders have and annotation files name."""

import os
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from .images import ARRAY_SUFFIX

# Cityscapes names the files of one image <city>_<number>_<frame>_leftImg8bit.png, ..._gtFine_labelIds.png, ...
_CITYSCAPES = re.compile(r"_(leftImg8bit|gtFine|gtCoarse).*$")


def files_by_name(folder: Path, kind: str, endings: tuple[str, ...], suffix: str = "") -> dict[str, str]:
    """All files below a folder: path without `suffix` and extension -> path, both relative to the folder.

    The keys are in Unicode's composed form, in which accents are equal however a file system writes them. An array
    (.npy) beside a picture of its name is of the picture, and left out.

    Raises:
        ValueError: if there are none, or two that differ only in their extension.
    """
    found, others = {}, 0
    for relative in _walk(folder, kind):
        stem, ending = os.path.splitext(relative)
        if ending.lower() not in endings or not stem.endswith(suffix):
            others += 1
            continue
        name = unicodedata.normalize("NFC", stem[: len(stem) - len(suffix)])
        if name in found and ending.lower() == ARRAY_SUFFIX:
            continue
        if name in found and not found[name].lower().endswith(ARRAY_SUFFIX):
            raise ValueError(
                f"{folder} has {found[name]} and {relative}: remove one, and keep images and maps in two folders"
            )
        found[name] = relative
    if not found:
        raise ValueError(
            f"{folder}: no {kind} here; looked for *{suffix}({' '.join(endings)}), there are {others} other files"
        )
    return dict(sorted(found.items()))


def locate(folder: Path, kind: str, names: Sequence[str], source: Path, not_below: Path | None = None) -> list[str]:
    """The files that an annotation file names, relative to a folder and never outside it.

    A file that is not directly there is looked for below the folder by the end of its path, the longest that fits:
    `images/cat/0.jpg` and `C:\\data\\cat\\0.jpg` are `cat/0.jpg` or `0.jpg` in the folder, and `0.jpg` is `cat/0.jpg`.
    Backslashes, %-codes, the Unicode form of accents, the case of the extension and Cityscapes' suffixes make no
    difference.

    Args:
        not_below: a folder of other files that may have the same names.

    Raises:
        FileNotFoundError: for files that are not there, that several files may be, or that are another name's file.
    """
    _check_folder(folder, kind)
    listed = {parent: _names(folder / parent) for parent in {os.path.dirname(name) for name in names if _inside(name)}}
    direct = [name for name in names if _inside(name) and os.path.basename(name) in listed[os.path.dirname(name)]]
    found = {name: PurePosixPath(name).as_posix() for name in direct}
    if len(direct) == len(names):
        return [found[name] for name in names]
    below, owner = _index(folder, kind, not_below), {file: _parts(file) for file in found.values()}
    problems = []
    for name in dict.fromkeys(names):
        if name in found:
            continue
        parts = _parts(name)
        candidates = _best(parts, below.get(parts[-1], ()) if parts else ())
        if len(candidates) != 1:
            outside = "it points out of the folder, and no file in it ends so"
            reason = " or ".join(candidates[:4]) + "?" if candidates else "" if _inside(name) else outside
            problems.append(f"{name} ({reason})" if reason else name)
        elif owner.setdefault(candidates[0], parts) != parts:
            problems.append(f"{name} ({candidates[0]} is the file of another entry)")
        else:
            found[name] = candidates[0]
    if problems:
        shown = ", ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise FileNotFoundError(
            f"{folder}: {len(problems)} of {len(names)} {kind} that {source} names are not there: {shown}; add the "
            "files, give the folder that the names begin in, or take their entries out of the json"
        )
    return [found[name] for name in names]


def _inside(name: str) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _parts(name: str) -> tuple[str, ...]:
    """What is compared of a path: its folders, and its file's name without what may differ in spelling."""
    parts = []
    for part in unicodedata.normalize("NFC", unquote(name)).replace("\\", "/").split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", ".") and not part.endswith(":"):
            parts.append(part)
    if parts:
        stem, ending = os.path.splitext(parts[-1])
        parts[-1] = _CITYSCAPES.sub("", stem) + ending.lower()
    return tuple(parts)


def _index(folder: Path, kind: str, not_below: Path | None) -> dict[str, list[tuple]]:
    """Last part -> (parts, path) of each file below a folder."""
    index, other = {}, None if not_below is None else not_below.resolve()
    for relative in _walk(folder, kind):
        if other in (None, folder.resolve()) or not (folder / relative).resolve().is_relative_to(other):
            parts = _parts(relative)
            index.setdefault(parts[-1] if parts else "", []).append((parts, relative))
    return index


def _best(parts: tuple[str, ...], files: Iterable[tuple]) -> list[str]:
    """The files of which the path is the end of the name's, or the other way round; of those the longest ends."""
    ends = {}
    for own, relative in files:
        common = min(len(own), len(parts))
        if own[-common:] == parts[-common:]:
            ends.setdefault(common, []).append(relative)
    return sorted(ends[max(ends)]) if ends else []


def _names(folder: Path) -> set[str]:
    """Files of a folder; pipes, sockets and devices are none."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_file()}


def _check_folder(folder: Path, kind: str):
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, where the {kind} should be")


def _walk(folder: Path, kind: str) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, with forward slashes; hidden ones are left out.

    Links are followed, after all real folders and into each folder once: they may form loops.
    """
    _check_folder(folder, kind)
    real, linked, seen = deque([folder]), deque(), set()
    while real or linked:
        parent = real.popleft() if real else linked.popleft()
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(parent) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    (linked if entry.is_symlink() else real).append(Path(entry.path))
                elif entry.is_file() or not os.path.exists(entry.path):  # a broken link is named when it is read
                    yield Path(entry.path).relative_to(folder).as_posix()
