"""Masks → polygons with holes, and back.

Coordinates are those of the pixel grid: pixel (row, column) is the square from (column, row) to (column + 1, row + 1),
so that an outline of pixel edges has whole numbers and the area of its mask. Polygonising is shapely's (GEOS), which
takes 10 MB; rasterio is ten times as fast on large noisy masks and takes 110 MB, OpenCV's outlines (150 MB) run
through the centres of pixels and lose half of one on every side.
"""

from collections.abc import Sequence

import numpy as np

# Truncated to whole pixels and filled with its outline, as labelme and Ultralytics do, an outline on the pixel edges
# covers a row and a column too many. A quarter of a pixel inside them no centre of a pixel changes sides, and all
# three rules give the same mask.
INSET = 0.25

Polygon = list[np.ndarray]  # rings (N, 2) of x, y, the outer one first, then the holes; the last point is not repeated


def polygons_of(mask: np.ndarray, tolerance: float = 0.0, inset: float = 0.0) -> list[Polygon]:
    """The outlines of a mask, a polygon for each part; pixels that touch in a corner alone are two parts.

    Args:
        mask: (H, W) bool.
        tolerance: 0 for the edges of the pixels, exactly. Above 0 the outline runs through the middles of the edges,
            which makes steps slopes, and points are left out as long as it moves by less than so many pixels (Douglas
            and Peucker, 1973).
        inset: of exact outlines, pixels by which they lie inside the edges, below 0.5.

    Raises:
        ImportError: without shapely.
        ValueError: for a tolerance below 0.
    """
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance={tolerance}: must be 0 (exact) or more pixels")
    shapely = _shapely()
    mask = np.asarray(mask, dtype=bool)
    lines = shapely.linestrings(_pixel_edges(mask))
    faces = shapely.get_parts(shapely.polygonize(lines))  # of holes, too
    x, y = shapely.get_coordinates(shapely.point_on_surface(faces)).T
    faces = faces[mask[y.astype(int), x.astype(int)]]
    if tolerance:
        faces = shapely.simplify(np.array([_through_middles(face) for face in faces], dtype=object), tolerance)
    elif inset:
        faces = shapely.get_parts(shapely.buffer(faces, -inset, join_style="mitre"))
    faces = shapely.normalize(faces)
    return [[_ring(face.exterior), *map(_ring, face.interiors)] for face in faces if not face.is_empty]


def _shapely():
    try:
        import shapely
    except ImportError as error:
        raise ImportError("outlines of masks need shapely: pip install shapely") from error
    return shapely


def _pixel_edges(mask: np.ndarray) -> np.ndarray:
    """(N, 2, 2) x, y of the ends of all straight lines between inside and outside; they meet at their ends alone."""
    rows, left, right = _edges_between_rows(mask)
    columns, top, bottom = _edges_between_rows(mask.T)
    starts = np.concatenate([np.stack([left, rows], -1), np.stack([columns, top], -1)])
    ends = np.concatenate([np.stack([right, rows], -1), np.stack([columns, bottom], -1)])
    return np.stack([starts, ends], axis=1).astype(np.float64)


def _edges_between_rows(mask: np.ndarray):
    """(row, first column, last column) of the edges, cut where inside and outside change sides."""
    step = np.diff(mask.astype(np.int8), axis=0, prepend=0, append=0)  # (H + 1, W)
    change = np.diff(step, axis=1, prepend=0, append=0) != 0  # (H + 1, W + 1)
    rows, left = np.nonzero(change[:, :-1] & (step != 0))
    right = np.nonzero(change[:, 1:] & (step != 0))[1] + 1
    return rows, left, right


def _through_middles(face):
    shapely = _shapely()
    face = shapely.segmentize(face, 1.0)
    outer, *holes = (_ring(ring) for ring in (face.exterior, *face.interiors))
    middles = [(ring + np.roll(ring, -1, axis=0)) / 2 for ring in (outer, *holes)]
    return shapely.Polygon(middles[0], middles[1:])


def _ring(ring) -> np.ndarray:
    return np.asarray(ring.coords)[:-1, :2]


def fill_polygons(rings: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: the pixels whose centres lie inside an odd number of rings.

    Holes are rings like others, and a cut that is passed there and back changes nothing.

    Args:
        rings: (N, 2) of x, y each.
        size: (H, W).
    """
    H, W = size
    crossings = np.zeros((H, W + 1), dtype=np.int32)
    for ring in rings:
        x, y = np.asarray(ring, dtype=np.float64).reshape(-1, 2).T
        to_x, to_y = np.roll(x, -1), np.roll(y, -1)
        first = np.ceil(np.minimum(y, to_y) - 0.5).clip(0, H).astype(int)  # the rows whose centres an edge passes
        count = np.ceil(np.maximum(y, to_y) - 0.5).clip(0, H).astype(int) - first
        edge = np.repeat(np.arange(len(x)), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
        at = x[edge] + (row + 0.5 - y[edge]) * (to_x - x)[edge] / (to_y - y)[edge]
        np.add.at(crossings, (row, np.ceil(at - 0.5).clip(0, W).astype(int)), 1)
    return np.cumsum(crossings, axis=1)[:, :W] % 2 == 1


def one_ring(polygons: Sequence[Polygon]) -> np.ndarray:
    """(N, 2): all rings as one, for formats that have no holes or no parts.

    Rings are joined by cuts of no width between their nearest points, passed there and back, as Ultralytics joins the
    parts of COCO's objects. Filled by the even-odd rule the mask is the same.
    """
    rings = [ring for polygon in polygons for ring in polygon]
    joined = rings[0]
    for ring in rings[1:]:
        here, there = _nearest(joined, ring)
        loop = np.concatenate([ring[there:], ring[: there + 1]])
        joined = np.concatenate([joined[: here + 1], loop, joined[here:]])
    return joined


def _nearest(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Positions of the nearest points of two rings."""
    from scipy.spatial import cKDTree

    distances, positions = cKDTree(one).query(other)
    there = int(np.argmin(distances))
    return int(positions[there]), there
