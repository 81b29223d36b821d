"""Annotated videos, as readers give them: frames read one at a time, and objects with a mask in some frames."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from .annotations import decode_mask
from .class_forms import class_table
from .classes import ClassTable
from .coco_json import BOX, IS_CROWD, MASK, categories_table, load_coco, same_id
from .example import check_size
from .fields import ID, PIXELS, Rule
from .images import IMAGE_SUFFIXES, read_image, read_map, read_size
from .paths import locate
from .reader import check_each


@dataclass(frozen=True, eq=False, slots=True)
class VideoObject:
    """One object of a video.

    Args:
        id: of the annotation, or its number.
        label: index of its class.
        segmentations: per frame its mask in a form of `annotations.decode_mask`, or an (H, W) bool array; None where
            it is not annotated. It may be annotated and have no pixel.
        iscrowd: a group that is not told apart.
    """

    id: int | str
    label: int
    segmentations: Sequence
    iscrowd: bool = False

    def mask(self, frame: int, size: tuple[int, int]) -> np.ndarray:
        """(H, W) bool of a frame; without a pixel where it is not annotated."""
        segmentation = self.segmentations[frame]
        if segmentation is None:
            return np.zeros(size, dtype=bool)
        if isinstance(segmentation, np.ndarray):
            return segmentation
        return decode_mask(segmentation, size, f"object {self.id}, frame {frame}")


@dataclass(frozen=True, eq=False, slots=True)
class Video:
    """An annotated video of one size.

    Args:
        id: of the video.
        size: (H, W) of its frames.
        length: number of frames.
        objects: crowds included.
        read: number of a frame → (H, W, 3) uint8 RGB.
    """

    id: int | str
    size: tuple[int, int]
    length: int
    objects: tuple[VideoObject, ...]
    read: Callable[[int], np.ndarray]

    def frame(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB.

        Raises:
            ValueError: for a frame of another size than the video's.
        """
        image = self.read(number)
        if image.shape[:2] != tuple(self.size):
            raise ValueError(
                f"frame {number} of video {self.id!r} is {image.shape[0]}x{image.shape[1]}, the video "
                f"{self.size[0]}x{self.size[1]} (height x width); the frames of a video have one size"
            )
        return image


class VideoReader(Dataset):
    """Videos by number. `classes` is the table of their classes."""

    classes: ClassTable
    task = "instance"

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Video:
        raise NotImplementedError

    def most_objects(self) -> int:
        """Of any video, crowds left out."""
        videos = (self[index] for index in range(len(self)))
        return max((sum(not thing.iscrowd for thing in video.objects) for video in videos), default=0)

    def check_headers(self, progress: bool = True):
        """Before a long run: whether each frame can be opened and has its video's size, by headers alone.

        Data that are not in files pass.

        Raises:
            ValueError: lists what is wrong with which frame, of the first 20 videos that cannot be used.
        """
        bar = tqdm(range(len(self)), desc="checking", unit="video", disable=not progress)
        check_each(self.check_header, bar, f"of {len(self)} videos cannot be used:")

    def check_header(self, index: int):
        """Of the frames of one video; raises ValueError for those that cannot be used."""


class YoutubeVis(VideoReader):
    """YouTube-VIS 2019 and 2021, OVIS, and others in their format.

    Masks are polygons or run-length codes per frame, null where an object is not to be seen. An entry whose mask and
    box are empty counts as null, as in the original's reader.

    Args:
        images: folder of the frames.
        annotations: the json, with `videos`, `annotations` and `categories`.
        classes: instead of the json's categories, a `ClassTable` or any form of `class_forms.class_table`.

    Raises:
        FileNotFoundError: for frames that are not there.
        ValueError: for an empty or inconsistent json.
    """

    def __init__(self, images: str | Path, annotations: str | Path, classes=None):
        self.images, self.source = Path(images), Path(annotations)
        data = load_coco(self.source, {"videos": _VIDEO, "annotations": _ANNOTATION})
        if not data["videos"]:
            raise ValueError(f"{self.source}: videos is empty, there is nothing to read")
        if classes is None:
            used = {same_id(entry["category_id"]) for entry in data["annotations"]}
            self.classes = categories_table(data["categories"], used, self.source, isthing=True)
        else:
            self.classes = class_table(classes)
        objects = {same_id(video["id"]): [] for video in data["videos"]}
        self._videos = data["videos"]
        names = [name for video in self._videos for name in video["file_names"]]
        located = iter(locate(self.images, "frames", names, self.source))
        for video in self._videos:
            video["file_names"] = [next(located) for _ in video["file_names"]]
        lengths = {same_id(video["id"]): len(video["file_names"]) for video in self._videos}
        for number, entry in enumerate(data["annotations"]):
            where, video = f"{self.source}: annotations[{number}]", same_id(entry["video_id"])
            if video not in objects:
                raise ValueError(
                    f"{where} is of video {entry['video_id']!r}, which videos lacks; remove or correct it"
                )
            if len(entry["segmentations"]) != lengths[video]:
                raise ValueError(
                    f"{where} has {len(entry['segmentations'])} segmentations, its video {lengths[video]} frames; "
                    "give one per frame, null where the object is not to be seen"
                )
            label = self._label(entry, where)
            if label is not None:
                objects[video].append(_object(entry, number, label))
        self._objects = {video: tuple(own) for video, own in objects.items()}

    def _label(self, entry: Mapping, where: str) -> int | None:
        try:
            return self.classes.to_index(same_id(entry["category_id"]))
        except ValueError as error:
            raise ValueError(f"{where}: category_id {error}") from None

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: int) -> Video:
        video = self._videos[range(len(self))[index]]
        files = [self.images / name for name in video["file_names"]]
        size, objects = (video["height"], video["width"]), self._objects[same_id(video["id"])]
        return Video(video["id"], size, len(files), objects, lambda frame: read_image(files[frame]))

    def check_header(self, index: int):
        video = self._videos[range(len(self))[index]]
        files = [self.images / name for name in video["file_names"]]
        _check_sizes(video["id"], files, (video["height"], video["width"]))


class DavisFolders(VideoReader):
    """DAVIS 2016 and 2017: a folder of frames per video, and one of PNGs whose colours number the objects.

    Objects have no classes there: all are of one, "object".

    Args:
        images: folder with a folder of frames per video, such as `JPEGImages/480p`.
        annotations: likewise of PNGs, such as `Annotations/480p`; 0 is the background, 255 is left out. A video
            without annotations here is left out.
        videos: their names, of a split; None for all.
    """

    classes = ClassTable.from_categories([{"id": 1, "name": "object", "isthing": 1}])

    def __init__(self, images: str | Path, annotations: str | Path, videos: Iterable[str] | None = None):
        self.images, self.annotations = Path(images), Path(annotations)
        for name, folder in (("images", self.images), ("annotations", self.annotations)):
            if not folder.is_dir():
                raise FileNotFoundError(f"{name}={str(folder)!r}: no such folder")
        found = sorted(path.name for path in self.images.iterdir() if path.is_dir())
        wanted = found if videos is None else list(videos)
        if missing := sorted(set(wanted) - set(found)):
            raise FileNotFoundError(f"{self.images}: no folders {', '.join(missing[:5])}, which videos names")
        self.names = [name for name in wanted if (self.annotations / name).is_dir()]
        if not self.names:
            raise ValueError(f"{self.annotations} has no folder of a video in {self.images}, such as {found[:1]}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Video:
        name = self.names[range(len(self))[index]]
        files = frame_files(self.images / name)
        maps = {path.stem: path for path in frame_files(self.annotations / name)}
        ids = [read_map(maps[file.stem]) if file.stem in maps else None for file in files]
        size = read_image(files[0]).shape[:2]
        numbers = sorted({int(n) for frame in ids if frame is not None for n in np.unique(frame)} - {0, 255})
        objects = tuple(
            VideoObject(n, 0, [None if frame is None or not (frame == n).any() else frame == n for frame in ids])
            for n in numbers
        )
        return Video(name, size, len(files), objects, lambda frame: read_image(files[frame]))

    def check_header(self, index: int):
        name = self.names[range(len(self))[index]]
        files, maps = frame_files(self.images / name), frame_files(self.annotations / name)
        if missing := [path.name for path in maps if path.stem not in {file.stem for file in files}]:
            raise ValueError(
                f"video {name!r}: {len(missing)} of {len(maps)} maps are of frames that are not there, such as "
                f"{missing[0]}; add the frames, or remove the maps"
            )
        _check_sizes(name, [*files, *maps], _size_of_first(files))


def _size_of_first(files: Sequence[Path]) -> tuple[int, int] | None:
    """(H, W) of the first file that has one; None if none has."""
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            return read_size(file)
    return None


def _check_sizes(video: int | str, files: Sequence[Path], size: tuple[int, int] | None):
    """Raise ValueError unless all files can be opened and, if there is one, have the video's (H, W)."""

    def check(file: Path):
        found = read_size(file)
        if size is not None:
            check_size(found, size, file)

    check_each(check, files, f"of {len(files)} files of video {video!r} cannot be used:", "\n  ")


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names.

    Raises:
        ValueError: if there are none.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _object(entry: Mapping, number: int, label: int) -> VideoObject:
    masks = entry["segmentations"]
    boxes = entry.get("bboxes") or [()] * len(masks)
    masks = [None if not mask or box is None else mask for mask, box in zip(masks, boxes, strict=True)]
    return VideoObject(entry.get("id", number), label, masks, bool(entry.get("iscrowd")))


def _file_names(value) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError
    return value


def _per_frame(convert: Callable) -> Callable:
    def of_list(value) -> list:
        if not isinstance(value, list):
            raise ValueError
        return [None if entry is None else convert(entry) for entry in value]

    return of_list


_VIDEO = {
    "id": ID,
    "file_names": Rule(_file_names, "a list of paths in the folder of the frames"),
    "height": PIXELS,
    "width": PIXELS,
}
_ANNOTATION = {
    "id": ID.optional(),
    "video_id": ID,
    "category_id": ID,
    "iscrowd": IS_CROWD.optional(),
    "segmentations": Rule(_per_frame(MASK.convert), f"a list with, per frame, {MASK.text} or null"),
    "bboxes": Rule(_per_frame(BOX.convert), f"a list with, per frame, {BOX.text} or null").optional(),
}
