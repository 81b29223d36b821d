"""Masks → polygons with holes, and back.

Coordinates are those of the pixel grid: pixel (row, column) is the square from (column, row) to (column + 1, row + 1),
so that an outline of pixel edges has whole numbers and the area of its mask. Polygonising is shapely's (GEOS), which
takes 10 MB; rasterio is ten times as fast on large noisy masks and takes 110 MB, OpenCV's outlines (150 MB) run
through the centres of pixels and lose half of one on every side.
"""

from collections.abc import Iterable, Sequence

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

    Rings are joined by cuts of no width between points that are near, passed there and back, as Ultralytics joins the
    parts of COCO's objects. Filled by the even-odd rule the mask is the same. All cuts together are as short as they
    can be between neighbours of the Delaunay triangulation, which costs N log N for masks of any shape.
    """
    rings = [ring for polygon in polygons for ring in polygon]
    cuts = _cuts(rings) if len(rings) > 1 else {}
    pieces, path = [], [_walk(rings[0], 0, False, cuts.get(0, ()))]
    while path:  # around a ring up to a cut, around the ring beyond it, and on
        piece, beyond = next(path[-1], (None, None))
        if piece is None:
            path.pop()
            continue
        pieces.append(piece)
        if beyond is not None:
            number, entry = beyond
            path.append(_walk(rings[number], entry, True, cuts.get(number, ())))
    return np.concatenate(pieces)


def _walk(ring: np.ndarray, entry: int, back: bool, cuts: Iterable[tuple[int, int, int]]):
    """The pieces of a ring between its cuts, each with the ring that is beyond it and the position of its entry.

    Args:
        entry: position at which the ring is entered, and left if `back`.
        cuts: own position, other ring, position on that.
    """
    around = np.concatenate([ring[entry:], ring[: entry + back]])
    here = 0
    for own, number, position in sorted(((own - entry) % len(ring), *other) for own, *other in cuts):
        yield around[here : own + 1], (number, position)
        here = own
    yield around[here:], None


def _cuts(rings: Sequence[np.ndarray]) -> dict[int, list[tuple[int, int, int]]]:
    """A tree of cuts from the first ring to all: ring → own position, next ring, position on that."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
    from scipy.spatial import Delaunay

    lengths = [len(ring) for ring in rings]
    owner, position = np.repeat(np.arange(len(rings)), lengths), np.concatenate([np.arange(n) for n in lengths])
    points, first, place = np.unique(np.concatenate(rings), axis=0, return_index=True, return_inverse=True)
    triangles = Delaunay(points).simplices
    edges = first[np.concatenate([triangles[:, pair] for pair in ([0, 1], [1, 2], [2, 0])])]
    edges = np.concatenate([edges, np.stack([first[place.ravel()], np.arange(len(owner))], 1)])  # points of two rings
    edges = edges[owner[edges[:, 0]] != owner[edges[:, 1]]]
    corners = np.concatenate(rings)
    distance = 1 + np.hypot(*(corners[edges[:, 0]] - corners[edges[:, 1]]).T)  # csgraph takes 0 for no edge
    low, high = np.sort(owner[edges], axis=1).T
    order = np.lexsort((distance, high, low))
    best = order[np.r_[True, (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)]]  # of two rings the nearest
    graph = csr_array((distance[best], (low[best], high[best])), shape=(len(rings), len(rings)))
    order, parents = breadth_first_order(minimum_spanning_tree(graph), 0, directed=False)
    nearest = dict(zip(zip(low[best], high[best], strict=True), best, strict=True))
    cuts = {}
    for ring in order[1:].tolist():
        parent = int(parents[ring])
        here, there = edges[nearest[min(ring, parent), max(ring, parent)]].tolist()
        if owner[here] != parent:
            here, there = there, here
        cuts.setdefault(parent, []).append((int(position[here]), ring, int(position[there])))
    return cuts
