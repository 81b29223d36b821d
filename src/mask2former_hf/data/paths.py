"""Finding the files that folders have and annotation files name."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# Cityscapes names the files of one image <city>_<number>_<frame>_leftImg8bit.png, ..._gtFine_labelIds.png, ...
_CITYSCAPES = re.compile(r"_(leftImg8bit|gtFine|gtCoarse).*$")


def files_by_name(folder: Path, kind: str, endings: tuple[str, ...], suffix: str = "") -> dict[str, str]:
    """All files below a folder: path without `suffix` and extension -> path, both relative to the folder.

    Raises:
        ValueError: if there are none, or two that differ only in their extension.
    """
    found, others = {}, 0
    for relative in _walk(folder, kind):
        stem, ending = os.path.splitext(relative)
        if ending.lower() not in endings or not stem.endswith(suffix):
            others += 1
            continue
        name = stem[: len(stem) - len(suffix)]
        if name in found:
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
    """The files that an annotation file names, relative to a folder.

    A file that is not directly there is looked for below the folder, by its name without Cityscapes' suffixes.

    Args:
        not_below: a folder of other files that may have the same names.

    Raises:
        FileNotFoundError: for files that are not there or not unique.
    """
    _check_folder(folder, kind)
    listed = {parent: _names(folder / parent) for parent in {os.path.dirname(name) for name in names}}
    missing = [name for name in names if os.path.basename(name) not in listed[os.path.dirname(name)]]
    if not missing:
        return list(names)
    below, wanted = {}, Counter(map(_key, names))
    other = None if not_below is None else not_below.resolve()
    for relative in _walk(folder, kind):
        if other in (None, folder.resolve()) or not (folder / relative).resolve().is_relative_to(other):
            below.setdefault(_key(relative), []).append(relative)
    moved = {
        name: below[_key(name)][0]
        for name in missing
        if len(below.get(_key(name), ())) == 1 and wanted[_key(name)] == 1
    }
    missing = [name for name in missing if name not in moved]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{folder}: {len(missing)} of {len(names)} {kind} that {source} names are not there: {shown}; add the "
            "files or take their entries out of the json"
        )
    return [moved.get(name, name) for name in names]


def _key(name: str) -> tuple[str, str]:
    stem, ending = os.path.splitext(os.path.basename(name))
    return _CITYSCAPES.sub("", stem), ending.lower()


def _names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _check_folder(folder: Path, kind: str):
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, where the {kind} should be")


def _walk(folder: Path, kind: str):
    """Paths of all files below a folder, relative to it, with forward slashes; hidden ones are left out."""
    _check_folder(folder, kind)
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()
