"""Which images there are to segment: files, folders, patterns, lists, COCO's jsons, data sets of the Hub."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .coco_json import load_coco, same_id
from .fields import FILE_NAME, ID
from .images import ARRAY_SUFFIX, IMAGE_SUFFIXES

HUB = "hf://datasets/"
SAVED = ("state.json", "dataset_dict.json")  # by which what `save_to_disk` wrote is known


class Found(NamedTuple):
    """An image that is to be segmented.

    Args:
        image_id: number or text.
        name: in results, with its extension; with its folder where two have the same name.
        stem: of the files that belong to it, unique in the list.
        source: path, or the content of an image file.
    """

    image_id: int | str
    name: str
    stem: str
    source: str | bytes

    @property
    def path(self) -> Path:
        """Of its file; of one that has none, its name."""
        return Path(self.name if isinstance(self.source, bytes) else self.source)

    @property
    def address(self) -> str:
        """The same from every folder."""
        return self.name if isinstance(self.source, bytes) else os.path.abspath(self.source)


class ImageList(Sequence):
    """Images in an order that every process finds.

    Args:
        names: one for each image, with its extension.
        image_ids: one for each image; by default 1, 2, ...
    """

    def __init__(self, names: Sequence[str], image_ids: Sequence[int | str] | None = None):
        self.names, self.image_ids = names, range(1, len(names) + 1) if image_ids is None else image_ids
        self._stems = _unique_stems(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Found:
        name = self.names[index]
        stem = self._stems.get(index, PurePosixPath(name).stem)
        return Found(self.image_ids[index], name, stem, self._source(index))

    def digest(self) -> str:
        """What two lists share only if they name the same images in the same order."""
        total = hashlib.sha256()
        for image_id, key in zip(self.image_ids, self._keys(), strict=True):
            total.update(f"{image_id!r} {key}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def _source(self, index: int) -> str | bytes:
        raise NotImplementedError

    def _keys(self) -> Iterator[str]:
        raise NotImplementedError


class ImageFiles(ImageList):
    """Files.

    Args:
        paths: of the files.
        names, image_ids: as in `ImageList`; names are by default those of the files, with the folder where two files
            have the same.
    """

    def __init__(self, paths: Sequence[str], names=None, image_ids=None):
        self.paths = paths
        if names is None:
            names = [os.path.basename(path) for path in paths]
            counts = Counter(names)
            names = [
                name if counts[name] == 1 else Path(path).as_posix() for name, path in zip(names, paths, strict=True)
            ]
        super().__init__(names, image_ids)

    def _source(self, index):
        return self.paths[index]

    def _keys(self):
        return map(os.path.abspath, self.paths)


class HubImages(ImageList):
    """The images of a `datasets.Dataset`, with the numbers of their rows, from 0.

    Args:
        dataset: with an index.
        column: of the images.
    """

    def __init__(self, dataset, column: str):
        from datasets import Image

        self.fingerprint, self.column = dataset._fingerprint, column  # datasets' own name of its content
        self.dataset = dataset.select_columns(column).cast_column(column, Image(decode=False))
        super().__init__([f"{row:08}.png" for row in range(len(dataset))], range(len(dataset)))

    def _source(self, index):
        value = self.dataset[index][self.column]
        return value["path"] if value["bytes"] is None else value["bytes"]

    def _keys(self):
        return (f"{self.fingerprint} {self.column}" for _ in range(len(self)))


def find_images(
    inputs: Sequence[str], root: str | os.PathLike | None = None, split: str | None = None, column: str | None = None
) -> tuple[ImageList, list[str]]:
    """The images that some words name.

    Args:
        inputs: files; folders, of which the images directly in them; patterns such as "photos/**/*.jpg"; lists, a .txt
            with a path in each line. Or one of: a COCO json, whose `images` are taken with their ids; a data set
            that `datasets` saved in a folder, or of the Hub, "hf://datasets/USER/NAME".
        root: folder in which the paths of lists and jsons begin; by default that of the list or the json.
        split: of a data set that has several.
        column: of a data set's images; by default the only one of that kind.

    Returns:
        The images, each file once, and a line for each path that leads nowhere.

    Raises:
        ValueError: for lists, jsons and data sets that cannot be read, naming what is wrong.
        ImportError: for a data set without the package `datasets`.
    """
    alone = [name for name in inputs if _is_whole(name)]
    if alone and len(inputs) > 1:
        raise ValueError(
            f"{alone[0]}: has ids of its own, so it is taken alone; leave out the other {len(inputs) - 1}"
        )
    if alone:
        return (_of_json if alone[0].endswith(".json") else _of_dataset)(alone[0], root, split, column), []
    _refuse(split=split, column=column)
    if root is not None and not any(_is_list(name) for name in inputs):
        _refuse(root=root)
    return find_files(inputs, root)


def find_files(inputs: Iterable[str], root: str | os.PathLike | None = None) -> tuple[ImageFiles, list[str]]:
    """`find_images` of files, folders, patterns and lists."""
    paths, problems = [], []
    for name in inputs:
        found, problem = _files(name, root)
        paths += found
        problems += [problem] if problem else []
    return ImageFiles(list(dict.fromkeys(paths))), problems


def _is_whole(name: str) -> bool:
    saved = any(os.path.isfile(os.path.join(name, file)) for file in SAVED)
    return name.startswith(HUB) or saved or (name.endswith(".json") and not os.path.isdir(name))


def _is_list(name: str) -> bool:
    return name.endswith(".txt") and not os.path.isdir(name)


def _refuse(**unread):
    for name, value in unread.items():
        if value is not None:
            kind = "data sets" if name in ("split", "column") else "lists and jsons"
            raise ValueError(f"{name}={os.fspath(value)!r}: is for {kind}, of which none is given; leave it out")


def _files(name: str, root) -> tuple[list[str], str | None]:
    """The paths that a word stands for, or what is wrong with it."""
    if os.path.isdir(name):
        with os.scandir(name) as entries:
            names = without_copies(sorted(e.name for e in entries if _suffix(e.name) in IMAGE_SUFFIXES))
        if not names:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            return [], f"{name}: the folder has no images ({kinds}); those of its subfolders are {name}/*/*.jpg"
        return [os.path.join(name, file) for file in names], None
    if not os.path.exists(name):
        if not glob.has_magic(name):
            return [], f"{name}: no such file"
        found = sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        return found, None if found else f"{name}: no file fits this pattern"
    return (_lines(name, root), None) if _is_list(name) else ([name], None)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def without_copies(names: list[str]) -> list[str]:
    """File names without arrays of NumPy that lie beside a picture of the same stem, as maps of ids do."""
    pictures = {os.path.splitext(name)[0] for name in names if _suffix(name) != ARRAY_SUFFIX}
    return [name for name in names if _suffix(name) != ARRAY_SUFFIX or os.path.splitext(name)[0] not in pictures]


def _lines(name: str, root) -> list[str]:
    """The paths of a list."""
    try:
        lines = Path(name).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: not a list of paths ({error}); a list is text, a path in each line") from error
    paths = [line.strip() for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"{name}: the list is empty; write a path in each line")
    folder = os.path.dirname(name) if root is None else os.fspath(root)
    return [os.path.join(folder, path) for path in paths]


def _of_json(name: str, root, split, column) -> ImageFiles:
    _refuse(split=split, column=column)
    try:
        entries = load_coco(Path(name), {"images": {"id": ID, "file_name": FILE_NAME}})["images"]
    except OSError as error:
        raise ValueError(str(error)) from error
    if not entries:
        raise ValueError(f"{name}: images is empty; there is nothing to segment")
    ids = [entry["id"] for entry in entries]
    counts = Counter(map(same_id, ids))
    if twice := [image_id for image_id, count in counts.items() if count > 1]:
        raise ValueError(f"{name}: {len(twice)} ids are of several images, such as {twice[0]!r}; give each its own")
    names = [entry["file_name"] for entry in entries]
    folder = os.path.dirname(name) if root is None else os.fspath(root)
    return ImageFiles([os.path.join(folder, file) for file in names], names, ids)


def _of_dataset(name: str, root, split: str | None, column: str | None) -> HubImages:
    _refuse(root=root)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name}: a data set needs the package datasets: pip install datasets") from error
    try:
        if name.startswith(HUB):
            found = datasets.load_dataset(name.removeprefix(HUB))
        else:
            found = datasets.load_from_disk(name)
    except Exception as error:  # of the network, the Hub, Arrow and the file system: datasets has no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: no data set that can be read ({reason})") from error
    if isinstance(found, dict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            raise ValueError(f"split={split!r}: the data set {name} has the splits {', '.join(found)}; name one")
        found = found[split]
    elif split is not None:
        raise ValueError(f"split={split!r}: the data set {name} has one split; leave it out")
    images = [key for key, kind in found.features.items() if isinstance(kind, datasets.Image)]
    if column is None and len(images) == 1:
        column = images[0]
    if column not in images:
        shown = ", ".join(images) or f"none among {', '.join(found.column_names)}"
        raise ValueError(f"column={column!r}: the data set {name} has the columns of images {shown}; name one")
    if not len(found):
        raise ValueError(f"{name}: the data set has no rows; choose another split")
    return HubImages(found, column)


def _unique_stems(names: Sequence[str]) -> dict[int, str]:
    """Of images whose names without extension are not unique: position → stem."""
    stems = [PurePosixPath(name).stem for name in names]
    used, numbers, changed = set(stems), Counter(), {}
    if len(used) == len(stems):
        return changed
    for index, stem in enumerate(stems):
        numbers[stem] += 1
        if numbers[stem] == 1:
            continue
        while (unique := f"{stem}_{numbers[stem]}") in used:
            numbers[stem] += 1
        used.add(unique)
        changed[index] = unique
    return changed
