"""Reader of GeoJSON with an image for each file, as QuPath exports objects and this package writes results."""

import json
from pathlib import Path

import numpy as np

from .coco_json import SEGMENTS, read_entry
from .georeference import read_georeference
from .images import IMAGE_SUFFIXES
from .object_files import ObjectFiles, ObjectRecord, image_beside, missing_images
from .paths import files_by_name
from .polygons import fill_polygons

ENDINGS = (".geojson", ".json")
_FARTHEST = 1e9  # metres on a map, or pixels: what is larger is damaged
_COLLECTION = {"features": SEGMENTS._replace(text="a list of features")}


class GeoJsonFiles(ObjectFiles):
    """A folder of GeoJSON files, one per image, with equal names.

    A feature is an object; its label is the name of QuPath's `classification`, or the property "label" or "class".
    Polygons and MultiPolygons with holes are read; coordinates are pixels, or those of the map where the image is
    georeferenced. A pixel belongs to an object if its centre lies inside. See `Example`.

    Args:
        annotations: folder of the files, searched with its subfolders.
        images: folder of the images, with the same paths; None for beside the files.
        classes: any form of `class_forms.class_table`; None for all labels, by the alphabet.

    Raises:
        FileNotFoundError: for images that are not there.
        ValueError: for an empty folder, and for what is wrong with a file.
    """

    def __init__(self, annotations: str | Path, images: str | Path | None = None, classes=None):
        folder = Path(annotations)
        below = {} if images is None else files_by_name(Path(images), "images", IMAGE_SUFFIXES)
        records, missing = [], []
        for name, file in files_by_name(folder, "GeoJSON files", ENDINGS).items():
            objects = read_features(folder / file)
            if objects is None:
                continue
            image = Path(images) / below[name] if name in below else image_beside(folder / file, IMAGE_SUFFIXES)
            if image is None:
                missing.append(file)
                continue
            reference = read_georeference(image)
            if reference is not None:
                objects = [
                    (label, crowd, [reference.to_pixels(ring) for ring in rings]) for label, crowd, rings in objects
                ]
            records.append(ObjectRecord(name, image, None, objects, folder / file))
        if missing:
            raise missing_images(folder, missing, len(records) + len(missing))
        labels = {label for record in records for label, _, _ in record.objects}
        super().__init__(records, labels, classes, folder)

    def draw(self, objects, size, source):
        return [(label, is_crowd, fill_polygons(rings, size)) for label, is_crowd, rings in objects]


def read_features(path: Path) -> list[tuple[str, bool, list[np.ndarray]]] | None:
    """(label, is a crowd, rings) of each feature with an area; None for a json of something else.

    Raises:
        ValueError: names file and feature.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a json file ({error})") from None
    if isinstance(content, list):  # QuPath before 0.3
        content = {"type": "FeatureCollection", "features": content}
    if not isinstance(content, dict) or content.get("type") != "FeatureCollection":
        return None
    found = []
    for number, feature in enumerate(read_entry(content, _COLLECTION, str(path))["features"]):
        where = f"{path}: features[{number}]"
        rings = _rings(feature, where)
        if rings:
            properties = feature.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            found.append((_label(properties, where), bool(properties.get("iscrowd")), rings))
    return found


def _rings(feature, where: str) -> list[np.ndarray]:
    geometry = feature.get("geometry") if isinstance(feature, dict) else None
    if not isinstance(geometry, dict):
        raise ValueError(f"{where} has no geometry; remove it")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    polygons = {"Polygon": [coordinates], "MultiPolygon": coordinates}.get(kind, [])  # points and lines have no area
    try:
        rings = [np.array(ring, dtype=np.float64)[:, :2] for polygon in polygons for ring in polygon]
    except (TypeError, ValueError, IndexError):
        rings = [np.array([np.nan])]
    if not all((np.abs(ring) < _FARTHEST).all() for ring in rings):
        raise ValueError(f"{where}: the coordinates of its {kind} are no lists of rings of [x, y]; correct it")
    return rings


def _label(properties: dict, where: str) -> str:
    classification = properties.get("classification")
    name = classification.get("name") if isinstance(classification, dict) else classification
    label = name or properties.get("label") or properties.get("class")
    if not isinstance(label, str):
        raise ValueError(f"{where} has no class; give it a classification in QuPath, or the property label")
    return label
