"""Outlines of masks: exact, with holes and parts, the same under every tool's rule; against shapely and Pillow."""

import numpy as np
import pytest
from outlines import iou, ring_and_island, truncated_and_filled_with_its_outline
from scipy import ndimage, spatial

from mask2former_hf.data.polygons import INSET, fill_polygons, one_ring, polygons_of

shapely = pytest.importorskip("shapely")


def rings_of(polygons):
    return [ring for polygon in polygons for ring in polygon]


def random_masks(count=60):
    """Noise: every way in which pixels can touch, in corners, too."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.random(rng.integers(1, 20, 2)) < rng.random()


def blobs(least=32**2):
    """Smooth objects of at least so many pixels, some with holes."""
    rng, found = np.random.default_rng(0), []
    while len(found) < 12:
        parts, count = ndimage.label(np.pad(ndimage.gaussian_filter(rng.normal(size=(100, 100)), 6) > 0.01, 3))
        found += [parts == k for k in range(1, count + 1) if (parts == k).sum() >= least]
    return found


@pytest.mark.parametrize("inset", [0, INSET])
def test_outlines_fill_to_the_mask_that_they_were_made_of(inset):
    for mask in random_masks():
        polygons = polygons_of(mask, inset=inset)
        assert np.array_equal(fill_polygons(rings_of(polygons), mask.shape), mask)
        if polygons:
            assert np.array_equal(fill_polygons([one_ring(polygons)], mask.shape), mask)
        row, column = np.mgrid[0.5 : mask.shape[0], 0.5 : mask.shape[1]]
        shapes = [shapely.Polygon(polygon[0], polygon[1:]) for polygon in polygons]
        assert all(shape.is_valid for shape in shapes)
        inside = shapely.contains_xy(shapely.MultiPolygon(shapes), column, row) if shapes else np.zeros_like(mask)
        assert np.array_equal(inside, mask)
        if not inset:
            assert sum(shape.area for shape in shapes) == mask.sum()
            assert len(shapes) == ndimage.label(mask)[1]


def test_holes_and_parts_are_kept():
    polygons = polygons_of(ring_and_island())
    assert sorted(len(polygon) for polygon in polygons) == [1, 2]
    outer, hole = next(polygon for polygon in polygons if len(polygon) == 2)
    assert outer.min(0).tolist() == [10, 5] and outer.max(0).tolist() == [60, 50]
    assert hole.min(0).tolist() == [20, 12] and hole.max(0).tolist() == [50, 40]


def test_a_quarter_of_a_pixel_inside_the_edges_tools_that_fill_the_outline_see_the_same_mask():
    for mask in [ring_and_island(), *blobs()]:
        for inset in (INSET, 0):
            parts = [one_ring([polygon]) for polygon in polygons_of(mask, inset=inset)]
            seen = np.any([truncated_and_filled_with_its_outline(part, mask.shape) for part in parts], axis=0)
            assert np.array_equal(seen, mask) == bool(inset)


def test_opencv_sees_the_same_mask():
    cv2 = pytest.importorskip("cv2")
    for mask in blobs():
        seen = np.zeros(mask.shape, np.uint8)
        cv2.fillPoly(seen, [one_ring(polygons_of(mask, inset=INSET)).astype(np.int32)], 1)
        assert np.array_equal(seen > 0, mask)


def test_simplified_outlines_have_a_third_of_the_points_and_an_iou_of_98_percent():
    exact, simple = 0, 0
    for mask in blobs():
        polygons = polygons_of(mask, tolerance=0.5)
        assert iou(fill_polygons(rings_of(polygons), mask.shape), mask) >= 0.98
        exact += sum(map(len, rings_of(polygons_of(mask))))
        simple += sum(map(len, rings_of(polygons)))
    assert simple < exact / 2.5
    slope = np.tri(40, dtype=bool)  # steps become a line
    assert len(polygons_of(slope, tolerance=0.5)[0][0]) <= 5


def test_the_work_of_joining_thousands_of_rings_grows_with_their_points_alone(monkeypatch):
    """Counted are the elements that are copied, and the points that the search for neighbours sees."""
    counted, concatenate, delaunay = [], np.concatenate, spatial.Delaunay

    def counting(parts, *arguments, **options):
        joined = concatenate(parts, *arguments, **options)
        counted.append(joined.size)
        return joined

    def per_point(side):
        mask = np.random.default_rng(0).random((side, side)) < 0.5
        polygons = polygons_of(mask, inset=INSET)
        with monkeypatch.context() as patched:
            patched.setattr(np, "concatenate", counting)
            patched.setattr(spatial, "Delaunay", lambda points: counted.append(points.size) or delaunay(points))
            counted.clear()
            ring = one_ring(polygons)
        assert np.array_equal(fill_polygons([ring], mask.shape), mask)
        return sum(counted) / sum(map(len, rings_of(polygons)))

    assert per_point(160) < 1.2 * per_point(40)


def test_parts_that_are_far_apart_are_all_joined():
    corner = np.array([[0, 0], [0.5, 0], [0.5, 0.5], [0, 0.5]])
    places = [(0, 0), (0.75, 0), (99_999, 0), (0, 99_999), (0.75, 0.75), (99_999, 99_998.25)]
    ring = one_ring([[corner + place] for place in places])
    assert {tuple(point) for place in places for point in corner + place} == {tuple(point) for point in ring}


def test_a_wrong_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"tolerance=-1: must be 0 \(exact\) or more pixels"):
        polygons_of(np.ones((2, 2), bool), tolerance=-1)
