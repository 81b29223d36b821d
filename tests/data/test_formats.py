"""What is written for other tools, loaded by their own libraries where they are installed, else by their own rules."""

import json
import sys

import numpy as np
import pytest
from outlines import iou, ring_and_island, truncated_and_filled_with_its_outline
from PIL import Image, TiffImagePlugin

from mask2former_hf.data.formats.label_studio import brush_code, label_config
from mask2former_hf.data.formats.labelled_mask import cut_out
from mask2former_hf.data.formats.parquet import RowFile
from mask2former_hf.data.formats.yolo import data_yaml
from mask2former_hf.data.georeference import Georeference, read_georeference
from mask2former_hf.inference.segmentation import instance_result, panoptic_result, semantic_result

shapely = pytest.importorskip("shapely")
ID2LABEL = {0: "disc", 1: "box & co", 2: "sky"}


def masks_of_two():
    """(2, 60, 80): a ring with a hole and an island in it, and a disc that overlaps it."""
    row, column = np.mgrid[:60, :80]
    return np.stack([ring_and_island(), (row - 40) ** 2 + (column - 55) ** 2 <= 17**2])


def seen(mask, size):
    """A `LabelledMask` in its image."""
    whole = np.zeros(size, bool)
    mask.paint(whole)
    return whole


def code_of(mask):
    return brush_code(cut_out(mask, label_id=0, label="").row_counts(mask.shape))


@pytest.fixture(scope="module")
def result():
    masks = masks_of_two()
    return instance_result(masks, [0.9, 0.75], [1, 0], ID2LABEL, (2,))


def test_every_kind_of_result_gives_its_segments_cut_out(result):
    for mask, whole, segment in zip(result.labelled_masks(), masks_of_two(), result.segments, strict=True):
        assert np.array_equal(seen(mask, result.size), whole) and mask.area == segment.area
        assert (mask.label, mask.score, mask.isthing) == (segment.label, segment.score, True)
    segments = [{"id": 1, "label_id": 1, "score": 0.9, "area": 0}, {"id": 2, "label_id": 2, "score": 0.8, "area": 0}]
    panoptic = list(panoptic_result(result.map, segments, ID2LABEL, (2,)).labelled_masks())
    semantic = list(semantic_result(result.map, ID2LABEL, (2,)).labelled_masks())
    assert [mask.isthing for mask in panoptic] == [True, False] and [mask.score for mask in semantic] == [None] * 3
    for masks, first in ((panoptic, 1), (semantic, 0)):
        assert all(np.array_equal(seen(mask, result.size), result.map == k) for k, mask in enumerate(masks, first))


# GeoJSON


def test_geojson_has_valid_polygons_with_the_area_of_the_masks_and_qupath_s_properties(result):
    collection = json.loads(json.dumps(result.to_geojson()))
    assert collection["type"] == "FeatureCollection" and "crs" not in collection
    for feature, segment, mask in zip(collection["features"], result.segments, masks_of_two(), strict=True):
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.is_valid and shape.area == segment.area
        row, column = np.mgrid[0.5:60, 0.5:80]
        assert np.array_equal(shapely.contains_xy(shape, column, row), mask)
        assert all(part.exterior.is_ccw for part in shapely.get_parts(shape))  # RFC 7946, 3.1.6
        assert not any(hole.is_ccw for part in shapely.get_parts(shape) for hole in part.interiors)
        assert feature["properties"] == {
            "objectType": "annotation",
            "classification": {"name": segment.label},
            "measurements": {"score": segment.score, "area": segment.area},
        }
    kinds = [feature["geometry"]["type"] for feature in collection["features"]]
    assert kinds == ["MultiPolygon", "Polygon"]


def geotiff(path, size=(60, 80), point=False):
    """Half-metre pixels from (300000, 5000000) of UTM zone 33 N."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[33550], tags[33922] = (0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 300000.0, 5000000.0, 0.0)
    tags[34735] = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2 if point else 1, 3072, 0, 1, 32633)
    tags.tagtype |= {33550: 12, 33922: 12, 34735: 3}
    Image.new("RGB", size[::-1]).save(path, tiffinfo=tags)
    return path


def test_georeferenced_images_give_the_coordinates_of_the_map(result, tmp_path):
    reference = read_georeference(geotiff(tmp_path / "a.tif"))
    assert reference == Georeference((0.5, 0.0, 300000.0, 0.0, -0.5, 5000000.0), 32633)
    points = np.array([[0, 0], [80, 60], [3.5, 7]])
    assert reference.to_map(points).tolist() == [[300000, 5000000], [300040, 4999970], [300001.75, 4999996.5]]
    np.testing.assert_allclose(reference.to_pixels(reference.to_map(points)), points, atol=1e-9)
    centred = read_georeference(geotiff(tmp_path / "b.tif", point=True))
    assert (centred.transform[2], centred.transform[5]) == (299999.75, 5000000.25)
    Image.new("RGB", (8, 8)).save(tmp_path / "c.png")
    assert read_georeference(tmp_path / "c.png") is None
    (tmp_path / "c.pgw").write_text("0.5\n0\n0\n-0.5\n100.25\n199.75\n")  # the centre of the first pixel
    assert read_georeference(tmp_path / "c.png").transform == (0.5, 0, 100, 0, -0.5, 200)
    collection = result.to_geojson(georeference=reference)
    assert collection["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    for feature, segment in zip(collection["features"], result.segments, strict=True):
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.area == segment.area / 4 and all(part.exterior.is_ccw for part in shapely.get_parts(shape))
        assert shape.bounds[0] == 300000 + segment.box[0] / 2 and shape.bounds[3] == 5000000 - segment.box[1] / 2


def test_rasterio_places_geotiffs_at_the_same_coordinates(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    for point in (False, True):
        with rasterio.open(geotiff(tmp_path / f"{point}.tif", point=point)) as image:
            ours = read_georeference(tmp_path / f"{point}.tif")
            assert tuple(image.transform)[:6] == ours.transform and image.crs.to_epsg() == ours.epsg


def test_geopandas_reads_geometries_with_the_masks_areas_in_the_map_s_coordinate_system(result, tmp_path):
    geopandas = pytest.importorskip("geopandas")
    path = tmp_path / "a.geojson"
    path.write_text(
        json.dumps(result.to_geojson(georeference=Georeference((0.5, 0, 300000, 0, -0.5, 5000000), 32633)))
    )
    table = geopandas.read_file(path)  # through GDAL, as QGIS
    assert table.crs.to_epsg() == 32633 and table.is_valid.all()
    assert table.area.tolist() == [segment.area / 4 for segment in result.segments]


# YOLO


def test_a_yolo_label_file_has_a_line_per_object_in_parts_of_the_size(result):
    for line, segment, mask in zip(result.to_yolo().splitlines(), result.segments, masks_of_two(), strict=True):
        label, *numbers = line.split()
        points = np.array(numbers, dtype=float).reshape(-1, 2)
        assert int(label) == segment.label_id and 0 <= points.min() and points.max() <= 1
        # OpenCV's fillPoly of whole numbers, as in ultralytics' polygon2mask; cuts to parts are lines of a pixel
        assert iou(truncated_and_filled_with_its_outline(points * (80, 60), (60, 80)), mask) > 0.98


def test_ultralytics_reads_what_is_written(result, tmp_path):
    tools = pytest.importorskip("ultralytics.data.utils")
    for folder in ("images/train", "labels/train"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (80, 60)).save(tmp_path / "images/train/a.png")
    (tmp_path / "labels/train/a.txt").write_text(result.to_yolo())
    (tmp_path / "data.yaml").write_text(
        data_yaml(list(ID2LABEL.values()), {"train": "images/train", "val": "images/train"})
    )
    data = tools.check_det_dataset(tmp_path / "data.yaml", autodownload=False)
    assert data["names"] == ID2LABEL
    images = [data["train"] + "/a.png"]
    arguments = (images[0], tools.img2label_paths(images)[0], "", False, 3, 0, 0, False)
    _, boxes, size, polygons, _, missing, _, _, corrupt, _ = tools.verify_image_label(arguments)
    assert size == (60, 80) and not missing and not corrupt and boxes[:, 0].tolist() == [1, 0]
    for polygon, mask in zip(polygons, masks_of_two(), strict=True):
        assert iou(tools.polygon2mask(size, [polygon * (80, 60)]) > 0, mask) > 0.98


# labelme


def test_labelme_shapes_are_the_parts_of_objects_with_their_holes_cut_in(result):
    content = json.loads(json.dumps(result.to_labelme("../photos/a.jpg")))
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("../photos/a.jpg", 60, 80)
    shapes = content["shapes"]
    assert [shape["label"] for shape in shapes] == ["box & co", "box & co", "disc"]
    assert shapes[0]["group_id"] == shapes[1]["group_id"] is not None and shapes[2]["group_id"] is None
    assert shapes[2]["description"] == "score 0.750" and {shape["shape_type"] for shape in shapes} == {"polygon"}
    drawn = [truncated_and_filled_with_its_outline(shape["points"], (60, 80)) for shape in shapes]
    assert np.array_equal(np.stack([drawn[0] | drawn[1], drawn[2]]), masks_of_two())


def test_labelme_s_own_code_draws_the_same_masks(result, tmp_path):
    shape_tools = pytest.importorskip("labelme.utils.shape")
    content = result.to_labelme("a.png")
    labels, numbers = shape_tools.shapes_to_label((60, 80), content["shapes"], {"disc": 1, "box & co": 2})
    masks = masks_of_two()
    assert np.array_equal(labels, np.where(masks[1], 1, np.where(masks[0], 2, 0)))  # what is drawn last lies on top
    assert numbers.max() == 2


def test_labelme_s_own_reader_of_label_files_loads_what_is_written(result, tmp_path):
    reader = pytest.importorskip("labelme._label_file")  # of labelme 6; it checks the kind of every field
    Image.new("RGB", (80, 60)).save(tmp_path / "a.png")
    content = result.to_labelme("a.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = reader.read_label_file(str(tmp_path / "a.json"))
    assert found.image_path == "a.png"
    for name in ("label", "points", "group_id", "description", "shape_type", "flags"):
        assert [shape[name] for shape in found.shapes] == [shape[name] for shape in content["shapes"]]


# Label Studio


def unpacked(code):
    """@thi.ng/rle-pack's decoder, which Label Studio runs in the browser, bit by bit."""
    bits, place = "".join(f"{byte:08b}" for byte in code), 0

    def read(count):
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    count, word = read(32), read(5) + 1
    sizes, out = [read(4) + 1 for _ in range(4)], []
    while len(out) < count:
        is_run, length = read(1), read(sizes[read(2)]) + 1
        out += [read(word)] * length if is_run else [read(word) for _ in range(length)]
    return np.array(out)


def test_label_studio_s_brushes_hold_the_masks(result):
    task = json.loads(json.dumps(result.to_label_studio("/data/local-files/?d=a.jpg", "tiny")))
    (prediction,) = task["predictions"]
    assert task["data"] == {"image": "/data/local-files/?d=a.jpg"} and prediction["model_version"] == "tiny"
    assert prediction["score"] == pytest.approx(0.825)
    for entry, segment, mask in zip(prediction["result"], result.segments, masks_of_two(), strict=True):
        assert (entry["type"], entry["original_width"], entry["original_height"]) == ("brushlabels", 80, 60)
        assert entry["value"]["brushlabels"] == [segment.label] and entry["score"] == segment.score
        pixels = unpacked(entry["value"]["rle"]).reshape(60, 80, 4)
        assert np.array_equal(pixels, np.repeat(255 * mask[..., None], 4, axis=-1))
    assert '<Label value="box &amp; co"/>' in label_config(list(ID2LABEL.values()))


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.ones((300, 400), bool)], ids=["empty", "long runs"])
def test_brushes_of_one_run(mask):
    assert np.array_equal(unpacked(code_of(mask)).reshape(*mask.shape, 4)[..., 3] > 0, mask)


def test_label_studio_s_own_code_decodes_the_brushes():
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    for mask in masks_of_two():
        assert np.array_equal(brush.decode_rle(code_of(mask)).reshape(60, 80, 4)[..., 3] > 0, mask)


# Tables and libraries


def test_a_parquet_table_holds_run_lengths_that_pycocotools_decodes(result, tmp_path):
    tools, parquet = pytest.importorskip("pycocotools.mask"), pytest.importorskip("pyarrow.parquet")
    table = RowFile(tmp_path / "a.parquet")
    table.GROUP = 3
    for number in range(2):
        table.add(result.to_rows(number, f"{number}.jpg"))
    table.close()
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["file_name"] for row in rows] == ["0.jpg"] * 2 + ["1.jpg"] * 2
    assert [row["label"] for row in rows[:2]] == ["box & co", "disc"]
    assert [row["score"] for row in rows[:2]] == pytest.approx([0.9, 0.75])
    for row, mask in zip(rows, [*masks_of_two()] * 2, strict=True):
        assert np.array_equal(tools.decode({"size": [row["height"], row["width"]], "counts": row["counts"]}), mask)
        left, top, right, bottom = row["box"]
        assert mask[top:bottom, left:right].sum() == row["area"] == mask.sum()


def test_supervision_takes_boxes_masks_classes_and_scores(result):
    supervision = pytest.importorskip("supervision")
    found = result.to_supervision()
    assert isinstance(found, supervision.Detections) and np.array_equal(found.mask, masks_of_two())
    assert found.xyxy.tolist() == [list(segment.box) for segment in result.segments]
    assert found["class_name"].tolist() == ["box & co", "disc"] and found.confidence.tolist() == [
        np.float32(0.9),
        0.75,
    ]
    assert found.class_id.tolist() == [1, 0] and found.area.tolist() == [segment.area for segment in result.segments]
    assert len(semantic_result(result.map, ID2LABEL).to_supervision()) == 3
    empty = instance_result(masks_of_two()[:0], [], [], ID2LABEL)
    assert len(empty.to_supervision()) == 0


def test_fiftyone_takes_boxes_in_parts_of_the_size_with_the_masks_inside(result):
    fiftyone = pytest.importorskip("fiftyone")
    found = result.to_fiftyone()
    assert isinstance(found, fiftyone.Detections)
    for detection, segment, mask in zip(found.detections, result.segments, masks_of_two(), strict=True):
        left, top, right, bottom = segment.box
        expected = [left / 80, top / 60, (right - left) / 80, (bottom - top) / 60]
        assert detection.bounding_box == pytest.approx(expected) and detection.label == segment.label
        assert np.array_equal(detection.mask, mask[top:bottom, left:right])


@pytest.mark.parametrize("package", ["supervision", "fiftyone", "shapely"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(package, result, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    method = {"shapely": "geojson"}.get(package, package)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        getattr(result, f"to_{method}")()
