"""Reader of what Label Studio exports as JSON: annotations, and predictions where nobody annotated."""

import json
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from .coco_json import SEGMENTS, Rule, read_entry
from .object_files import ObjectFiles, ObjectRecord
from .paths import locate
from .polygons import fill_polygons

KINDS = ("brushlabels", "polygonlabels", "rectanglelabels")


def _mapping(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError
    return value


_ANSWERS = SEGMENTS._replace(text="a list").optional()
_TASK = {"data": Rule(_mapping, "a mapping"), "annotations": _ANSWERS, "predictions": _ANSWERS}
_ANSWER = {
    "result": SEGMENTS._replace(text="a list of results"),
    "was_cancelled": Rule(bool, "true or false").optional(),
}


class LabelStudioTasks(ObjectFiles):
    """Tasks of Label Studio with the images of a folder.

    Brushes, polygons and upright rectangles are objects, each with the first of its labels. Of several annotations of
    a task the last that was not cancelled counts. See `Example`.

    Args:
        images: folder of the images.
        annotations: the exported json (JSON or JSON_MIN's full form, "JSON").
        classes: any form of `class_forms.class_table`; None for all labels, by the alphabet.

    Raises:
        FileNotFoundError: for images that are not there.
        ValueError: for what is wrong with the file.
    """

    def __init__(self, images: str | Path, annotations: str | Path, classes=None):
        source = Path(annotations)
        tasks = _tasks(source)
        names = [file_name_of(task, f"{source}: task {number}") for number, task in enumerate(tasks)]
        found = locate(Path(images), "images", names, source)
        records = []
        for number, (task, name) in enumerate(zip(tasks, found, strict=True)):
            objects, size = _results(task, f"{source}: task {number}")
            stem = str(PurePosixPath(name).with_suffix(""))
            records.append(ObjectRecord(stem, Path(images) / name, size, objects, source))
        labels = {label for record in records for label, _, _ in record.objects}
        super().__init__(records, labels, classes, source)

    def draw(self, objects, size, source):
        H, W = size
        for label, kind, value in objects:
            if kind == "brushlabels":
                mask = decode_brush(value.get("rle"), size, source)
            else:
                mask = fill_polygons([np.array(_points(kind, value, source)) * (W / 100, H / 100)], size)
            yield label, False, mask


def _tasks(source: Path) -> list[dict]:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such export of Label Studio")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a json file ({error})") from None
    if not is_export(content):
        raise ValueError(f"{source}: not Label Studio's export as JSON, a list of tasks with data and annotations")
    return [read_entry(task, _TASK, f"{source}: task {number}") for number, task in enumerate(content)]


def is_export(content) -> bool:
    """Whether a json's content looks like Label Studio's tasks."""
    first = content[0] if isinstance(content, list) and content else None
    return (
        isinstance(first, dict) and isinstance(first.get("data"), dict) and {"annotations", "predictions"} & {*first}
    )


def file_name_of(task: dict, where) -> str:
    """The path of the image in its address: of local files after ?d=, of uploads without the number before it."""
    address = next((value for value in task["data"].values() if isinstance(value, str) and value), None)
    if address is None:
        raise ValueError(f"{where}: its data name no image; remove the task")
    parts = urlsplit(address)
    name = parse_qs(parts.query).get("d", [unquote(parts.path)])[0].lstrip("/")
    folder, _, last = name.rpartition("/")
    if "data/upload" in folder and last[8:9] == "-":
        return last[9:]
    return name


def _results(task: dict, where: str) -> tuple[list[tuple[str, str, dict]], tuple[int, int] | None]:
    """(label, kind, value) of each object, and (H, W) if an object says it."""
    made = [read_entry(entry, _ANSWER, where) for entry in task.get("annotations", ())]
    made = [entry for entry in made if not entry.get("was_cancelled")]
    made = made or [read_entry(entry, _ANSWER, where) for entry in task.get("predictions", ())]
    objects, size = [], None
    for number, result in enumerate(made[-1]["result"] if made else ()):
        kind, value = (result.get("type"), result.get("value")) if isinstance(result, dict) else (None, None)
        if kind not in KINDS:
            continue
        problem = f"{where}, result {number}"
        labels = value.get(kind) if isinstance(value, dict) else None
        if not isinstance(labels, list) or not labels or not isinstance(labels[0], str):
            raise ValueError(f"{problem}: a {kind} without a label; give it one")
        if value.get("rotation"):
            raise ValueError(f"{problem}: a turned rectangle; draw it as a polygon")
        try:
            size = int(result["original_height"]), int(result["original_width"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{problem}: has no original_width and original_height; export it anew") from None
        objects.append((labels[0], kind, value))
    return objects, size


def _points(kind: str, value: dict, source: Path) -> list[list[float]]:
    """Points in hundredths of width and height."""
    try:
        if kind == "polygonlabels":
            return [[float(x), float(y)] for x, y in value["points"]]
        left, top, width, height = (float(value[name]) for name in ("x", "y", "width", "height"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: a {kind} whose coordinates cannot be read ({error}); remove it") from None
    return [[left, top], [left + width, top], [left + width, top + height], [left, top + height]]


def decode_brush(code: list[int], size: tuple[int, int], where) -> np.ndarray:
    """(H, W) bool: where the alpha of a brush's mask (`formats.label_studio.brush_code`) is not 0.

    Raises:
        ValueError: for a code that does not fill the mask.
    """
    H, W = size
    damaged = ValueError(f"{where}: a brush whose code does not fill {H} x {W} pixels; the mask is damaged")
    try:
        bits = np.unpackbits(np.frombuffer(bytes(code), dtype=np.uint8))
    except (TypeError, ValueError):  # no list of bytes
        raise damaged from None
    bits, place = (bits + ord("0")).tobytes().decode("ascii"), 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    lengths, values, filled = [], [], 0
    try:
        total, word = read(32), read(5) + 1
        sizes = [read(4) + 1 for _ in range(4)]
        while filled < total == 4 * H * W:
            is_run = read(1)
            length = read(sizes[read(2)]) + 1
            parts = [(length, read(word))] if is_run else [(1, read(word)) for _ in range(length)]
            lengths += [part for part, _ in parts]
            values += [value for _, value in parts]
            filled += length
    except ValueError:  # of int(""): the code ends inside a number
        filled = -1
    if filled != 4 * H * W:
        raise damaged
    return np.repeat(np.array(values) > 0, lengths).reshape(H, W, 4)[..., 3]
