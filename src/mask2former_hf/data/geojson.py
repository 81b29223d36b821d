"""Reader of GeoJSON with an image for each file, as QuPath exports objects and this package writes results."""

import logging
from pathlib import Path

import numpy as np

from .fields import FARTHEST, FLAG, LIST, MAPPING, NAME, Rule, points, read_entry
from .georeference import read_georeference
from .object_files import FileContent, FoundObject, ObjectFiles, records_of_files
from .polygons import fill_polygons
from .text_files import read_json

ENDINGS = (".geojson", ".json")
logger = logging.getLogger(__name__)


def _ring(value) -> np.ndarray:
    """(N, 2); RFC 7946, 3.1.6: the first point once more at the end. A position may have a height."""
    found = points(value, coordinates=4)
    closed = len(found) and (found[0] == found[-1]).all()
    if len(found) < 3 + closed:
        raise ValueError
    return found


def _polygon(value) -> list[np.ndarray]:
    if not isinstance(value, list):
        raise ValueError
    return [_ring(ring) for ring in value]


def _polygons(value) -> list[np.ndarray]:
    if not isinstance(value, list):
        raise ValueError
    return [ring for polygon in value for ring in _polygon(polygon)]


_COLLECTION = {"features": LIST._replace(text="a list of features")}
_FEATURE = {"geometry": MAPPING._replace(text="a geometry, or remove the feature"), "properties": MAPPING.optional()}
_GEOMETRY = {"type": NAME}
_RINGS = {
    "Polygon": {"coordinates": Rule(_polygon, "a list of rings, each of at least three points [x, y]")},
    "MultiPolygon": {"coordinates": Rule(_polygons, "a list of polygons, each of rings of at least three points")},
}
_PROPERTIES = {"iscrowd": FLAG.optional()}
_CLASS = {"class": NAME}


class GeoJsonFiles(ObjectFiles):
    """A folder of GeoJSON files, one per image, with equal names.

    A feature is an object; its label is the name of QuPath's `classification`, or the property "label" or "class".
    Polygons and MultiPolygons with holes are read; coordinates are pixels, or those of the map where the image is
    georeferenced. Points and other geometries are left out with a warning. A pixel belongs to an object if its centre
    lies inside. See `Example`.

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
        records = records_of_files(folder, images, "GeoJSON files", ENDINGS, read_features)
        super().__init__([record._replace(objects=_in_pixels(record)) for record in records], classes, folder)

    def draw(self, outline, size, where):
        return fill_polygons(outline, size)


def read_features(path: Path) -> FileContent | None:
    """The rings of each feature with an area; None for a json of something else.

    Raises:
        ValueError: names file and feature.
    """
    content = read_json(path)
    if isinstance(content, list):  # QuPath before 0.3
        content = {"type": "FeatureCollection", "features": content}
    if not isinstance(content, dict) or content.get("type") != "FeatureCollection":
        return None
    found = []
    for number, entry in enumerate(read_entry(content, _COLLECTION, str(path))["features"]):
        where = f"{path}: features[{number}]"
        feature = read_entry(entry, _FEATURE, where)
        kind = read_entry(feature["geometry"], _GEOMETRY, f"{where}, geometry,")["type"]
        if kind not in _RINGS:
            logger.warning("%s is a %s, which has no area or is not read: left out", where, kind)
            continue
        rings = read_entry(feature["geometry"], _RINGS[kind], f"{where}, a {kind},")["coordinates"]
        properties = feature.get("properties", {})
        is_crowd = bool(read_entry(properties, _PROPERTIES, f"{where}, properties,").get("iscrowd"))
        if rings:
            found.append(FoundObject(_label(properties, where), is_crowd, rings, f"features[{number}]"))
    return FileContent(found)


def _label(properties: dict, where: str) -> str:
    classification = properties.get("classification")
    name = classification.get("name") if isinstance(classification, dict) else classification
    given = next((name for name in (name, properties.get("label"), properties.get("class")) if name), None)
    if given is None:
        raise ValueError(f"{where} has no class; give it a classification in QuPath, or the property label")
    return read_entry({"class": given}, _CLASS, where)["class"]


def _in_pixels(record) -> list[FoundObject]:
    """Objects whose coordinates are those of the map where the image has a place on it."""
    reference = read_georeference(record.image)
    if reference is None:
        return record.objects
    moved = []
    for found in record.objects:
        rings = [reference.to_pixels(ring) for ring in found.outline]
        if not all((np.abs(ring) < FARTHEST).all() for ring in rings):
            raise ValueError(
                f"{record.source}: {found.where} lies beyond {FARTHEST:g} pixels of {record.image}; correct the "
                "coordinates or the image's place on the map"
            )
        moved.append(found._replace(outline=rings))
    return moved
