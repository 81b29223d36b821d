"""Damaged annotation files: every field of every format with every wrong value; and what reads them says which."""

import pytest
from annotation_files import FILES, GEOJSON, HOSTILE, SQUARE, make_folder, problem, write
from wrong_values import changed, places

from mask2former_hf.data.recognise import recognise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("name", FILES)
def test_the_valid_file_is_read(folder, name):
    write(folder, name, FILES[name][0])
    assert len(FILES[name][3](folder)[0].segments) >= 1


@pytest.mark.parametrize("name", FILES)
def test_every_field_with_every_wrong_value_is_read_or_refused_in_one_line_that_names_the_file(folder, name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    content, problems = FILES[name][0], []
    for path in ((), *places(content)):
        for value in HOSTILE.values():
            try:
                write(folder, name, changed(content, path, value) if path else value)
            except (LookupError, ValueError, TypeError, OverflowError, AttributeError):
                continue  # nothing that this format's file can hold
            if (found := problem(folder, name)) is not None:
                problems.append((path, repr(value)[:40], found))
    assert problems == []


@pytest.mark.parametrize("name", [name for name in FILES if name != "parquet"])
def test_a_byte_order_mark_is_no_content_and_what_is_no_text_is_named(folder, name):
    path = write(folder, name, FILES[name][0])
    sound = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + sound)
    assert len(FILES[name][3](folder)[0].segments) >= 1
    for damaged in (b"\xff\xfe\x00", sound[: len(sound) // 2], b"", b"[" * 10**5, b"null", b"[]", b"1" * 10**4):
        path.write_bytes(damaged)
        assert problem(folder, name) is None


@pytest.mark.parametrize("name", ["labelme", "geojson", "label-studio", "coco", "yolo"])
def test_a_folder_with_a_damaged_file_is_recognised_or_not(folder, name):
    for path in ((), *places(FILES[name][0])):
        for value in ([], {}, None, float("nan"), "x" * 5000, [None]):
            try:
                write(folder, name, changed(FILES[name][0], path, value) if path else value)
            except TypeError:
                continue
            try:
                recognise(folder)
            except (ValueError, FileNotFoundError) as error:
                assert str(folder) in str(error) and "\n" not in str(error), (path, value, error)


RING = [*SQUARE, SQUARE[0]]


@pytest.mark.parametrize(
    "kind, coordinates, rule",
    [
        ("Polygon", [[RING]], "a list of rings"),
        ("Polygon", RING, "a list of rings"),
        ("Polygon", [RING[:2]], "a list of rings, each of at least three points"),
        ("Polygon", [[RING[0], RING[1], RING[0]]], "a list of rings, each of at least three points"),
        ("Polygon", [[[x, 10**400] for x, _ in RING]], "a list of rings"),
        ("MultiPolygon", [RING], "a list of polygons"),
        ("MultiPolygon", [[[RING]]], "a list of polygons"),
    ],
)
def test_rings_of_another_depth_or_without_an_area_are_refused_by_name(folder, kind, coordinates, rule):
    geometry = {"type": kind, "coordinates": coordinates}
    write(folder, "geojson", changed(GEOJSON, ("features", 1, "geometry"), geometry))
    said = rf"a\.geojson: features\[1\], a {kind}, has coordinates=.*it must be {rule}"
    with pytest.raises(ValueError, match=said):
        FILES["geojson"][3](folder)


@pytest.mark.parametrize("lines", ["0 0 0 0 0 0", "1 2 2 4 0 0", "nan 0 0 -1 0 0", "1 0 0 -1 inf 0", "1 0 0", "a b"])
def test_a_place_on_the_map_where_no_pixel_can_be_found_is_refused(folder, lines):
    write(folder, "geojson", GEOJSON)
    (folder / "a.pgw").write_text(lines.replace(" ", "\n"))
    try:
        with pytest.raises(ValueError, match=r"a\.(pgw|png): (not a world file|the transform)"):
            FILES["geojson"][3](folder)
    finally:
        (folder / "a.pgw").unlink()


def test_text_is_no_flag(folder):
    for name, path in (
        ("labelme", ("shapes", 0, "flags", "crowd")),
        ("geojson", ("features", 0, "properties", "iscrowd")),
        ("label-studio", (0, "annotations", 0, "was_cancelled")),
        ("parquet", (0, "iscrowd")),
    ):
        if name == "parquet":
            pytest.importorskip("pyarrow")
        write(folder, name, changed(FILES[name][0], path, "false"))
        with pytest.raises(ValueError, match=f"{path[-1]}='false'; it must be true or false"):
            FILES[name][3](folder)
