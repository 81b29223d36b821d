"""GeoJSON (RFC 7946) with the properties that QuPath reads; in pixels, or in the coordinates of a map."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..georeference import Georeference
from ..polygons import Polygon
from .labelled_mask import LabelledMask


def feature_collection(
    masks: Iterable[LabelledMask],
    tolerance: float = 0.0,
    georeference: Georeference | None = None,
    colours: Sequence[Sequence[int]] | None = None,
) -> dict:
    """A feature per segment: Polygon or MultiPolygon with holes.

    `properties` are QuPath's: `objectType`, `classification` (name and colour), `measurements` (score and area in
    pixels).

    Args:
        tolerance: as in `data.polygons.polygons_of`.
        georeference: of the image; None for pixels, x to the right and y down, as QuPath has them.
        colours: (R, G, B) of each class; QuPath chooses some by default.
    """
    features = []
    for mask in masks:
        polygons = mask.polygons(tolerance)
        if not polygons:
            continue
        classification = {"name": mask.label}
        if colours is not None:
            classification["color"] = [int(level) for level in colours[mask.label_id]]
        score = {} if mask.score is None else {"score": mask.score}
        features.append(
            {
                "type": "Feature",
                "geometry": _geometry(polygons, georeference),
                "properties": {
                    "objectType": "annotation",
                    "classification": classification,
                    "measurements": {**score, "area": mask.area},
                    **({"iscrowd": True} if mask.iscrowd else {}),
                },
            }
        )
    collection = {"type": "FeatureCollection", "features": features}
    if georeference is not None and georeference.epsg not in (None, 4326):  # RFC 7946 knows WGS 84 alone
        name = f"urn:ogc:def:crs:EPSG::{georeference.epsg}"  # the form of 2008, which GDAL, QGIS and ArcGIS read
        collection["crs"] = {"type": "name", "properties": {"name": name}}
    return collection


def _geometry(polygons: list[Polygon], georeference: Georeference | None) -> dict:
    parts = [[_ring(ring, k > 0, georeference) for k, ring in enumerate(polygon)] for polygon in polygons]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def _ring(ring: np.ndarray, is_hole: bool, georeference: Georeference | None) -> list[list[float]]:
    """Closed, and turning as RFC 7946 (3.1.6) wants: the outer one against the clock, holes with it."""
    if georeference is not None:
        ring = georeference.to_map(ring)
    x, y = ring.T
    twice = np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)  # > 0 against the clock where y points up
    if (twice > 0) == is_hole:
        ring = ring[::-1]
    return [[_plain(value) for value in point] for point in np.concatenate([ring, ring[:1]])]


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else float(value)
