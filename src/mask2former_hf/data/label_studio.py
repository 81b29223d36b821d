"""Reader of what Label Studio exports as JSON: annotations, and predictions where nobody annotated."""

from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from .fields import FILE_NAME, FLAG, LIST, MAPPING, NAME, PIXELS, Rule, number, points, read_entry, whole
from .object_files import FoundObject, ObjectFiles, ObjectRecord
from .paths import locate
from .polygons import fill_polygons
from .text_files import read_json

_FARTHEST = 1000  # hundredths of a side: outlines may leave the image, as far as those of COCO (`rle.read_polygons`)


def _bytes(value) -> bytes:
    if not isinstance(value, list) or not {int}.issuperset(map(type, value)):
        raise ValueError
    return bytes(value)  # ValueError for other numbers than 0 to 255


def _corners(value) -> np.ndarray:
    found = points(value, most=_FARTHEST)
    if len(found) < 3:
        raise ValueError
    return found


def _first(value) -> str:
    if not isinstance(value, list) or not value:
        raise ValueError
    return NAME.convert(value[0])


_TASK = {"data": MAPPING, "annotations": LIST.optional(), "predictions": LIST.optional()}
_ANSWER = {"result": LIST._replace(text="a list of results"), "was_cancelled": FLAG.optional()}
_SIZE = {"original_height": PIXELS, "original_width": PIXELS}
_PART = Rule(lambda value: number(value, _FARTHEST), "a number in hundredths of the image's side, 0 to 100")
_NOT_TURNED = Rule(lambda value: whole(value, 0, 1), "0: draw a turned rectangle as a polygon")
_LABEL = Rule(_first, "a list of labels, of which the first counts")
_VALUES = {  # kind of result -> what its value holds
    "brushlabels": {"rle": Rule(_bytes, "a list of bytes")},
    "polygonlabels": {"points": Rule(_corners, "a list of three or more points [x, y] in hundredths, 0 to 100")},
    "rectanglelabels": {
        **dict.fromkeys(("x", "y", "width", "height"), _PART),
        "rotation": _NOT_TURNED.optional(),
    },
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
        names = [file_name_of(task["data"], f"{source}: task {k}") for k, task in enumerate(tasks)]
        found = locate(Path(images), "images", names, source)
        records = []
        for k, (task, name) in enumerate(zip(tasks, found, strict=True)):
            objects, size = _objects(task, f"task {k}", source)
            stem = str(PurePosixPath(name).with_suffix(""))
            records.append(ObjectRecord(stem, Path(images) / name, size, objects, source))
        super().__init__(records, classes, source)

    def draw(self, outline, size, where):
        kind, value = outline
        if kind == "brushlabels":
            return decode_brush(value["rle"], size, where)
        H, W = size
        return fill_polygons([_ring(kind, value) * (W / 100, H / 100)], size)


def _tasks(source: Path) -> list[dict]:
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such export of Label Studio")
    content = read_json(source)
    if not is_export(content):
        raise ValueError(f"{source}: not Label Studio's export as JSON, a list of tasks with data and annotations")
    return [read_entry(task, _TASK, f"{source}: task {k}") for k, task in enumerate(content)]


def is_export(content) -> bool:
    """Whether a json's content looks like Label Studio's tasks."""
    first = content[0] if isinstance(content, list) and content else None
    return (
        isinstance(first, dict) and isinstance(first.get("data"), dict) and {"annotations", "predictions"} & {*first}
    )


def file_name_of(data: dict, where) -> str:
    """The path of the image in its address: of local files after ?d=, of uploads without the number before it.

    Args:
        data: of a task.
        where: for errors.

    Raises:
        ValueError: if it has no address, or one that cannot be a file's.
    """
    address = next((value for value in data.values() if isinstance(value, str) and value), None)
    if address is None:
        raise ValueError(f"{where}: its data name no image; remove the task")
    return read_entry({"data": address}, {"data": Rule(_file_name, "the address of an image")}, where)["data"]


def _file_name(address: str) -> str:
    parts = urlsplit(address)
    name = parse_qs(parts.query).get("d", [unquote(parts.path)])[0].lstrip("/")
    folder, _, last = name.rpartition("/")
    return FILE_NAME.convert(last[9:] if "data/upload" in folder and last[8:9] == "-" else name)


def _objects(task: dict, place: str, source: Path) -> tuple[list[FoundObject], tuple[int, int] | None]:
    """The objects of a task, and (H, W) if one says it."""
    where = f"{source}: {place}"
    made = [read_entry(entry, _ANSWER, where) for entry in task.get("annotations", ())]
    made = [entry for entry in made if not entry.get("was_cancelled")]
    made = made or [read_entry(entry, _ANSWER, where) for entry in task.get("predictions", ())]
    objects, sizes = [], set()
    for position, result in enumerate(made[-1]["result"] if made else ()):
        kind = result.get("type") if isinstance(result, dict) else None
        if not isinstance(kind, str) or kind not in _VALUES:
            continue  # of text, of relations between results, ...
        problem = f"{where}, result {position}, of {kind},"
        size = read_entry(result, _SIZE, problem)
        value = read_entry(result.get("value"), {kind: _LABEL, **_VALUES[kind]}, f"{problem} its value")
        sizes.add((size["original_height"], size["original_width"]))
        objects.append(FoundObject(value[kind], False, (kind, value), f"{place}, result {position}"))
    if len(sizes) > 1:
        raise ValueError(f"{where}: has results for images of the sizes {sorted(sizes)}; export it anew")
    return objects, sizes.pop() if sizes else None


def _ring(kind: str, value: dict) -> np.ndarray:
    """(N, 2) in hundredths of width and height."""
    if kind == "polygonlabels":
        return value["points"]
    left, top, width, height = (value[name] for name in ("x", "y", "width", "height"))
    return np.array([[left, top], [left + width, top], [left + width, top + height], [left, top + height]])


def decode_brush(code: bytes, size: tuple[int, int], where) -> np.ndarray:
    """(H, W) bool: where the alpha of a brush's mask (`formats.label_studio.brush_code`) is not 0.

    Raises:
        ValueError: for a code that does not fill the mask.
    """
    H, W = size
    damaged = ValueError(f"{where}: a brush whose code does not fill {H} x {W} pixels; the mask is damaged")
    bits = np.unpackbits(np.frombuffer(code, dtype=np.uint8))
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
