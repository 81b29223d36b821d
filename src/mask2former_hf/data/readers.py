"""What all readers share: the example they give, checking, and finding and opening image files."""

import contextlib
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from .classes import ClassTable

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MAP_FILES = (".png", ".tif", ".tiff", ".bmp", ".gif")  # lossless
# Cityscapes names the files of one image <city>_<number>_<frame>_leftImg8bit.png, ..._gtFine_labelIds.png, ...
_CITYSCAPES = re.compile(r"_(leftImg8bit|gtFine|gtCoarse).*$")


class Reader(Dataset):
    """A map-style data set of annotated images.

    An example is a dict:
    - `image`: (H, W, 3) uint8 RGB, upright by its EXIF tag.
    - `segmentation`: int32 segment ids, (H, W), or (M, H, W) where segments overlap: every segment lies complete on
      one of the M layers. In panoptic and semantic data 0 is void, ignored in loss and metrics; in instance data
      pixels without an object are `BACKGROUND_ID`, a statement, and 0 does not occur.
    - `segments_info`: a dict per segment with `id` > 0, `category_id` (index in `classes`), `isthing`, `iscrowd`, and
      `area` in pixels. A segment may have no pixel. Crowds are segments with `iscrowd` 1.
    - `image_id`: the original id, or the file's path without extension; `file_name`: relative to the images' folder.

    Attributes:
        classes: the `ClassTable`.
        task: `"panoptic"`, `"instance"` or `"semantic"`.
    """

    classes: ClassTable
    task: str

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError

    def check(self, progress: bool = True):
        """Read every example once.

        Raises:
            ValueError: lists what is wrong with which file, for the first 20 examples that cannot be used.
        """
        problems = []
        for index in tqdm(range(len(self)), desc="checking", unit="image", disable=not progress):
            try:
                self[index]
            except (OSError, ValueError) as error:
                problems.append(str(error))
        if problems:
            more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
            count = f"{len(problems)} of {len(self)} examples cannot be used:"
            raise ValueError("\n- ".join([count, *problems[:20], *more]))

    def _check_index(self, index: int):
        if not 0 <= index < len(self):
            raise IndexError(f"index={index}: there are {len(self)} examples, 0 to {len(self) - 1}")


class FileReader(Reader):
    """A reader of image files; subclasses give the annotation of an image and the image's place."""

    images: Path

    def annotation(self, index: int) -> dict:
        """An example without its `image`, for counting and evaluation: the image file is not opened."""
        raise NotImplementedError

    def _image_path(self, index: int) -> Path:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        self._check_index(index)
        path = self._image_path(index)
        image, example = read_image(path), self.annotation(index)
        check_size(image, example["segmentation"].shape[-2:], path)
        return {"image": image, **example}


class PackedRecords(Sequence):
    """A list of plain objects in one buffer of bytes.

    Worker processes share the pages of an array; of a list of dicts each would make its own copy, because reading an
    object writes its reference count.
    """

    def __init__(self, records: Iterable):
        packed = [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([0, *map(len, packed)])
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int):
        return pickle.loads(self._bytes[self._ends[index] : self._ends[index + 1]].data)


def to_rgb(image: Image.Image, where: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 of an image in any 8-bit mode, turned upright by its EXIF tag.

    Raises:
        ValueError: for more than 8 bits per channel, whose scale only its owner knows.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"{where}: pixels of mode {image.mode} have more than 8 bits; scale the images to 8 bits first (which "
            "grey level becomes white depends on the data)"
        )
    return np.array(ImageOps.exif_transpose(image).convert("RGB"))  # a copy: as a view it is read-only


def to_map(image: Image.Image, where: str | Path) -> np.ndarray:
    """(H, W) integers of an image with one channel: 8 or 16 bits, or a palette, whose positions are the ids."""
    ids = np.asarray(image)
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise ValueError(
            f"{where}: mode {image.mode} is not a map of ids, which has one integer channel; convert colours to ids "
            "and save them as a PNG of mode L or I;16"
        )
    return ids.astype(np.uint8) if ids.dtype.kind == "b" else ids


def to_panoptic_ids(image: Image.Image, where: str | Path) -> np.ndarray:
    """(H, W) int32 ids of COCO's panoptic PNG: red + 256 green + 65536 blue, of a palette those of its colours."""
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(
            f"{where}: mode {image.mode} is not a panoptic map, which stores ids as red + 256 green + 65536 blue"
        )
    rgb = np.asarray(image.convert("RGB")).astype(np.int32)
    return rgb[..., 0] + (rgb[..., 1] << 8) + (rgb[..., 2] << 16)


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file, upright."""
    return _read(path, to_rgb)


def read_map(path: Path) -> np.ndarray:
    """(H, W) integers of an image file with one channel."""
    return _read(path, to_map)


def read_panoptic_ids(path: Path) -> np.ndarray:
    """(H, W) int32 ids of a panoptic PNG."""
    return _read(path, to_panoptic_ids)


def _read(path: Path, convert) -> np.ndarray:
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(path))
            image.load()
        except FileNotFoundError:
            raise
        except Exception as error:  # Pillow has no common class for what damaged files raise: SyntaxError, ...
            raise OSError(f"{path}: not a readable image ({error}); replace the file or leave it out") from error
        return convert(image, path)


def check_size(image: np.ndarray, size: tuple[int, int], where: str | Path):
    """Raise ValueError unless image and map have the same height and width."""
    if image.shape[:2] != tuple(size):
        height, width = size
        turned = " They agree if the EXIF rotation of the image is left out: save it upright, without the tag."
        hint = turned if image.shape[:2] == (width, height) else ""
        raise ValueError(
            f"{where}: the image is {image.shape[0]} x {image.shape[1]} (height x width) and its annotation {height} "
            f"x {width}; both must have the same size.{hint}"
        )


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
