"""A valid file for every reader of annotations as plain data, and how it is written and read: to be damaged."""

import base64
import csv
import io
import json

import numpy as np
from PIL import Image
from wrong_values import VALUES

from mask2former_hf.data.coco import CocoInstances
from mask2former_hf.data.colour_maps import ColourMaps
from mask2former_hf.data.folders import InstanceMaps, LabelMaps
from mask2former_hf.data.formats.label_studio import brush_code
from mask2former_hf.data.geojson import GeoJsonFiles
from mask2former_hf.data.label_studio import LabelStudioTasks
from mask2former_hf.data.labelme import LabelmeFiles
from mask2former_hf.data.parquet import ParquetRows
from mask2former_hf.data.yolo import YoloSegments

H, W = 4, 6
# What tools, hands and attackers leave in a field, besides the usual mistakes.
HOSTILE = VALUES | {
    "huge": 10**400,
    "-huge": -(10**400),
    "1e308": 1e308,
    "-1e308": -1e308,
    "false as text": "false",
    "number as text": "5",
    "NUL": "a\0b",
    "long": "x" * 5000,
    "half a character": "\ud800",
    "address": "//[x",
    "list of null": [None],
    "list of lists": [[[[1, 2]]]],
    "mapping": {"a": [1]},
}


def _png(size=(H, W), mode="L") -> str:
    stored = io.BytesIO()
    Image.new(mode, size[::-1], 1 if mode == "1" else 200).save(stored, format="PNG")
    return base64.b64encode(stored.getvalue()).decode()


SQUARE = [[1, 1], [5, 1], [5, 3], [1, 3]]
LABELME = {
    "shapes": [
        {"label": "cat", "points": SQUARE, "shape_type": "polygon", "group_id": 1, "flags": {"crowd": False}},
        {"label": "cat", "points": [[1, 1], [2, 2]], "shape_type": "mask", "mask": _png((2, 2), "1")},
        {"label": "dog", "points": [[1, 1], [2, 2]], "shape_type": "circle"},
    ],
    "imagePath": "a.png",
    "imageHeight": H,
    "imageWidth": W,
}
EMBEDDED = {"shapes": LABELME["shapes"][:1], "imagePath": "gone.png", "imageData": _png(mode="RGB")}
GEOJSON = {
    "type": "FeatureCollection",
    "features": [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*SQUARE, SQUARE[0]]]},
            "properties": {"classification": {"name": "cat", "color": [1, 2, 3]}, "iscrowd": False},
        },
        {
            "type": "Feature",
            "geometry": {"type": "MultiPolygon", "coordinates": [[[*SQUARE, SQUARE[0]]]]},
            "properties": {"label": "dog"},
        },
    ],
}


def _result(kind, **value):
    return {"type": kind, "original_height": H, "original_width": W, "value": {kind: ["cat"], **value}}


LABEL_STUDIO = [
    {
        "data": {"image": "/data/local-files/?d=a.png"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    _result("brushlabels", rle=brush_code(np.array([7, 5, 12]))),
                    _result("polygonlabels", points=[[10, 10], [80, 10], [80, 80]]),
                    _result("rectanglelabels", x=1, y=2, width=50, height=50, rotation=0),
                ],
            }
        ],
    }
]
ROWS = [{"file_name": "a.png", "height": H, "width": W, "label": "cat", "counts": "52a0", "iscrowd": False}]
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": H, "width": W}],
    "annotations": [{"id": 5, "image_id": 1, "category_id": 7, "iscrowd": 0, "segmentation": [[1, 1, 5, 1, 5, 3]]}],
    "categories": [{"id": 7, "name": "cat"}],
}
COLOURS = {
    "lists": {"classes": ["road", "car"], "colors": [[200, 200, 200], [1, 2, 3]]},
    "entries": [{"name": "road", "color": "#c8c8c8"}, {"name": "car", "color": [1, 2, 3]}],
    "mapping": {"road": [200, 200, 200], "car": [1, 2, 3]},
}
CSV = [["name", "r", "g", "b"], ["road", "200", "200", "200"], ["car", "1", "2", "3"]]
NUMBERED = {"classes": ["road", "car"], "void_id": 5}
TABLES = {"numbered": NUMBERED, "rows": {"classes": [[1, "road", 0]], "ignored": [5]}, "ids": {"1": "road"}}


def _json(name, read):
    def write(folder, content):
        (folder / name).write_text(json.dumps(content))

    return name, write, read


def _write_csv(folder, content):
    with (folder / "class_dict.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        csv.writer(file).writerows(row if isinstance(row, list) else [row] for row in content)


def _write_lines(folder, content):
    lines = [" ".join(str(word) for word in line) if isinstance(line, list) else str(line) for line in content]
    (folder / "labels" / "a.txt").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")


def _write_rows(folder, content):
    import pyarrow
    from pyarrow import parquet

    try:
        parquet.write_table(pyarrow.Table.from_pylist(content), folder / "rows.parquet")
    except NotImplementedError as error:  # ArrowNotImplementedError, such as for an empty mapping
        raise ValueError from error


LINES = [["0", "0.1", "0.1", "0.5", "0.1", "0.5", "0.9"]]
# name -> valid content; the file's name, how it is written into a folder, and what reads it there.
FILES = {
    "labelme": (LABELME, *_json("a.json", lambda folder: LabelmeFiles(folder))),
    "labelme with its image": (EMBEDDED, *_json("b.json", lambda folder: LabelmeFiles(folder))),
    "geojson": (GEOJSON, *_json("a.geojson", lambda folder: GeoJsonFiles(folder))),
    "label-studio": (
        LABEL_STUDIO,
        *_json("export.json", lambda folder: LabelStudioTasks(folder, folder / "export.json")),
    ),
    "coco": (COCO, *_json("coco.json", lambda folder: CocoInstances(folder, folder / "coco.json"))),
    "parquet": (ROWS, "rows.parquet", _write_rows, lambda folder: ParquetRows(folder, folder / "rows.parquet")),
    "yolo": (LINES, "a.txt", _write_lines, lambda folder: YoloSegments(folder, folder / "labels", ["cat"])),
    "csv of colours": (CSV, "class_dict.csv", _write_csv, lambda folder: _colours(folder, "class_dict.csv")),
    **{
        f"colours, {name}": (content, *_json("classes.json", lambda folder: _colours(folder, "classes.json")))
        for name, content in COLOURS.items()
    },
    **{
        f"classes, {name}": (content, *_json("classes.json", lambda folder: _labels(folder)))
        for name, content in TABLES.items()
    },
    "table of ids": ({"1": "cat"}, *_json("table.json", lambda folder: _instances(folder))),
}


def _colours(folder, name):
    return ColourMaps(folder / "images", folder / "colours", folder / name)


def _labels(folder):
    return LabelMaps(folder / "images", folder / "maps", folder / "classes.json")


def _instances(folder):
    return InstanceMaps(folder / "images", folder / "maps", ["cat", "dog"], table=folder / "table.json")


def make_folder(folder):
    """The images and maps that the files are about."""
    for name in ("images", "colours", "maps", "labels"):
        (folder / name).mkdir(exist_ok=True)
    for path, mode in (("a.png", "RGB"), ("images/a.png", "RGB"), ("colours/a.png", "RGB"), ("maps/a.png", "L")):
        Image.new(mode, (W, H), (200, 200, 200) if mode == "RGB" else 1).save(folder / path)
    return folder


def write(folder, name, content):
    """Only this file in a folder of `make_folder`.

    Raises:
        ValueError, TypeError: for content that the format's own library cannot write.
    """
    for ending in ("*.json", "*.geojson", "*.parquet", "*.csv", "labels/*"):
        for path in folder.glob(ending):
            path.unlink()
    FILES[name][2](folder, content)
    return folder / ("labels" if name == "yolo" else "") / FILES[name][1]


def problem(folder, name) -> str | None:
    """What is wrong with how a damaged file is read: nothing if it gives examples, or one line that names a file."""
    try:
        dataset = FILES[name][3](folder)
        for index in range(len(dataset)):
            example = dataset[index]
            assert example.image.shape == (*example.size, 3)
        return None
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        named = FILES[name][1] in text or "a.png" in text or str(folder) in text
        good = named and "\n" not in text and len(text) < 700
        return None if good else f"{type(error).__name__}: {text[:700]!r}"
    except Exception as error:
        return f"not a ValueError, but {error!r:.700}"
