"""Images of bands from files of every form: all their numbers, or an error that says what is too many."""

import numpy as np
import pytest
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.augmentation import PadTo, Pipeline, SSDColour, augmentation_for
from mask2former_hf.data.bands import check_bands, read_pixels, to_bands
from mask2former_hf.data.example import Example
from mask2former_hf.data.folders import LabelMaps
from mask2former_hf.data.hub_dataset import HubDataset
from mask2former_hf.data.images import read_image, read_size
from mask2former_hf.data.pictures import picture, read_picture
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.data.statistics import measure_bands
from mask2former_hf.data.transforms import ResizeShortestEdge
from mask2former_hf.data.windows import last_level, open_raster
from mask2former_hf.model.image_bands import bands_of

H, W, C = 20, 30, 5
TYPES = [np.uint8, np.uint16, np.float32]


def bands(dtype=np.uint16, channels=C):
    return (np.random.default_rng(0).random((H, W, channels)) * 250).astype(dtype)


def write_raster(path, array, **profile):
    rasterio = pytest.importorskip("rasterio")
    height, width, count = array.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": count, "dtype": array.dtype} | profile
    with rasterio.open(path, "w", **profile) as file:
        file.write(array.transpose(2, 0, 1))
    return path


def write_pages(path, array):
    first, *others = (Image.fromarray(np.ascontiguousarray(band)) for band in array.transpose(2, 0, 1))
    first.save(path, save_all=True, append_images=others)
    return path


def save(path, array):
    np.save(path, array)
    return path


FORMS = {
    "rows.npy": save,
    "planes.npy": lambda path, array: save(path, array.transpose(2, 0, 1)),
    "pages.tif": write_pages,
    "pixels.tif": lambda path, array: write_raster(path, array, interleave="pixel", compress="lzw"),
    "planes.tif": lambda path, array: write_raster(path, array, interleave="band"),
}


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_five_bands_gives_all_their_numbers(form, dtype, tmp_path):
    path, array = tmp_path / form, bands(dtype)
    FORMS[form](path, array)
    check_bands(path, C)
    found = read_pixels(path, C)
    assert found.dtype == dtype and found.flags.writeable and np.array_equal(found, array)
    assert read_size(path) == (H, W)
    with pytest.raises(ValueError, match="5 bands.*but 4 are wanted.*channels="):
        read_pixels(path, 4)


@pytest.mark.parametrize("mode, channels", [("L", 1), ("I;16", 1), ("LA", 2), ("RGBA", 4)])
def test_pictures_with_so_many_bands_are_read_as_they_are(mode, channels, tmp_path):
    array = bands(np.uint16 if mode == "I;16" else np.uint8, channels)
    Image.fromarray(array[..., 0] if channels == 1 else array).save(tmp_path / "picture.png")
    assert np.array_equal(read_pixels(tmp_path / "picture.png", channels), array)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_what_a_file_declares_to_be_no_data_is_0_and_undeclared_nan_is_refused(tmp_path):
    array = bands(np.float32)
    array[:3, :4] = np.nan
    filled = read_pixels(write_raster(tmp_path / "declared.tif", array, nodata=np.nan), C)
    assert np.array_equal(filled, np.nan_to_num(array))
    array[np.isnan(array)] = -9999
    path = write_raster(tmp_path / "number.tif", array, nodata=-9999)
    assert np.array_equal(read_pixels(path, C), filled)
    assert np.array_equal(open_raster(path, C).read((0, 0, W, H)), filled)
    array[:3, :4] = np.nan
    np.save(tmp_path / "silent.npy", array)
    with pytest.raises(ValueError, match="silent.npy: 12 of 600 pixels are nan or infinite: replace them"):
        read_pixels(tmp_path / "silent.npy", C)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_windows_of_a_raster_are_those_of_its_array(tmp_path):
    array = bands()
    windows = open_raster(write_raster(tmp_path / "five.tif", array), C)
    assert np.array_equal(windows.read((4, 2, 24, 18)), array[2:18, 4:24])
    assert windows.read((4, 2, 24, 18), 2).shape == (8, 10, C)
    assert open_raster(tmp_path / "five.tif") is None  # no photo: the whole file is asked for, and refused
    with pytest.raises(OSError, match="more bands or bits than a photo"):
        read_image(tmp_path / "five.tif")


@pytest.mark.parametrize("path", ["https://example.org/map.tif", "HTTP://example.org/map.tif", "s3://maps/map.tif"])
def test_no_level_of_an_address_is_looked_for(path, monkeypatch):
    monkeypatch.setattr("mask2former_hf.data.windows.load_rasterio", None)  # GDAL opens addresses
    assert last_level(path) == last_level(f"/vsicurl/{path}") == 0


def test_more_bands_or_pages_than_a_photo_has_are_refused_or_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("mask2former_hf.data.images._SAID", set())
    with pytest.raises(ValueError, match="five.npy: .* is no image"):
        read_image(save(tmp_path / "five.npy", bands(np.uint8)))
    array = bands(np.uint8)
    assert np.array_equal(read_image(write_pages(tmp_path / "pages.tif", array)), array[..., [0, 0, 0]])
    assert "pages.tif has 5 pages, of which the first is used" in caplog.text
    monkeypatch.setattr("mask2former_hf.data.images._SAID", set())
    open_raster(tmp_path / "pages.tif")
    assert caplog.text.count("pages.tif has 5 pages, of which the first is used") == 2
    read_image(write_raster(tmp_path / "two.tif", array[..., :2], interleave="pixel"))
    assert "two.tif has 2 bands, of which the first 1 are used" in caplog.text


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_pages_that_are_no_bands_are_refused(tmp_path):
    small, large = Image.new("L", (8, 8)), Image.new("L", (9, 8))
    small.save(tmp_path / "pyramid.tif", save_all=True, append_images=[large])
    with pytest.raises(ValueError, match="2 pages that are no bands"):
        read_pixels(tmp_path / "pyramid.tif", 2)


@pytest.mark.parametrize("shape", [(H, W), (H, W, 4), (0, W, C), (H, W, C, 1)])
def test_arrays_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="x.npy: has .*, but 5 are wanted"):
        to_bands(np.zeros(shape, np.uint8), C, "x.npy")


def test_a_reader_is_told_how_many_bands_to_read_and_checks_headers_for_them(tmp_path):
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "images" / "a.npy", bands())
    Image.fromarray(np.ones((H, W), np.uint8)).save(tmp_path / "maps" / "a.png")
    reader = LabelMaps(tmp_path / "images", tmp_path / "maps", {1: "field"})
    reader.channels = C
    reader.check_headers(progress=False)
    assert np.array_equal(reader[0].image, bands())
    reader.channels = 4
    with pytest.raises(ValueError, match=r"shape \(20, 30, 5\), but 4 are wanted"):
        reader.check_headers(progress=False)


def test_an_array_beside_a_picture_of_its_name_is_no_second_image(tmp_path):
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (W, H)).save(tmp_path / "images" / "a.png")
    np.save(tmp_path / "images" / "a.npy", np.zeros(3))
    Image.new("L", (W, H)).save(tmp_path / "maps" / "a.png")
    assert LabelMaps(tmp_path / "images", tmp_path / "maps", {0: "x"}).file_names() == ["a.png"]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int16, np.uint32, np.int64, np.float16, np.float64])
def test_numbers_of_every_type_are_those_that_the_processor_sees(dtype):
    array = (np.random.default_rng(0).random((H, W, C)) * 250).astype(dtype)
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False, "size_divisor": 1}
    processor = Mask2FormerImageProcessor(num_channels=C, image_mean=0.0, image_std=1.0, **plain)
    seen = processor(array, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.array_equal(to_bands(array, C, "x"), seen)


@pytest.mark.parametrize("shape", [(6, 9), (1, 6, 9), (6, 9, 1), (5, 6, 9), (6, 9, 5), (6, 5, 9), (5, 6, 5)])
def test_readers_and_processor_take_arrays_alike_but_where_both_outer_sides_fit(shape):
    """Files and rows have bands last; what comes to the processor may be transformers', which takes the first."""
    channels = 1 if len(shape) == 2 or 1 in shape else 5
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)

    def taken(rule, *more):
        try:
            return rule(array, channels, *more)
        except ValueError:
            return None

    read, seen = taken(to_bands, "a row"), taken(bands_of, "images[0]", None)
    if shape == (5, 6, 5):
        assert (read == array).all() and (seen == array.transpose(1, 2, 0)).all()
    elif shape == (6, 5, 9):
        assert read is None and seen is None
    else:
        assert (read == seen).all() and read.shape == (6, 9, channels)


def test_rows_of_a_hub_data_set_have_bands_as_arrays():
    rows = [{"image": bands().transpose(2, 0, 1).tolist(), "label": np.ones((H, W), np.uint8)}]
    reader = HubDataset(rows, {1: "field"}, label="label")
    reader.channels = C
    assert np.array_equal(reader[0].image, bands())
    reader.channels = None
    with pytest.raises(ValueError, match="row 0, image: .* is no image"):
        reader[0]


def example(dtype=np.uint16, channels=C):
    return Example(bands(dtype, channels), np.ones((H, W), np.int32), [{"id": 1, "category_id": 0}])


@pytest.mark.parametrize("dtype", TYPES)
def test_augmentation_treats_every_band_as_it_treats_a_grey_image(dtype):
    pipeline = Pipeline(
        (*augmentation_for("semantic", 16, "resize-crop").without_colour().steps, PadTo(64, padding_id=0))
    )
    whole = pipeline(example(dtype), np.random.default_rng(3)).image
    assert whole.dtype == dtype and whole.shape == (64, 64, C)
    for band in range(C):
        grey = Example(example(dtype).image[..., band : band + 1], example().segmentation, example().segments)
        assert np.array_equal(pipeline(grey, np.random.default_rng(3)).image[..., 0], whole[..., band])
    assert np.array_equal(whole[-1, -1], whole[-1, -2]) and whole[-1, -1].any()  # the padding: a mean of each band


@pytest.mark.parametrize("dtype", TYPES)
def test_a_band_is_resized_as_pillow_resizes_it(dtype):
    found = ResizeShortestEdge((10,), 99)(example(dtype), np.random.default_rng(0)).image
    band = bands(dtype)[..., 3]
    band = Image.fromarray(band if dtype == np.uint8 else band.astype(np.float32))
    wanted = np.asarray(band.resize((15, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(found[..., 3], np.rint(wanted) if dtype == np.uint16 else wanted)


def test_colours_are_jittered_of_photos_alone():
    steps = augmentation_for("semantic", 16, "resize-crop").without_colour().steps
    assert not any(isinstance(step, SSDColour) for step in steps)
    with pytest.raises(ValueError, match="has 5 channels of uint8: colours are jittered of 8-bit RGB alone"):
        SSDColour()(example(np.uint8), np.random.default_rng(0))


def test_pictures_show_the_bands_that_are_chosen(tmp_path):
    array = bands(np.uint8)
    assert np.array_equal(picture(array), array[..., :3])
    assert np.array_equal(picture(array, (5, 1, 2)), array[..., [4, 0, 1]])
    assert np.array_equal(picture(array, (4,)), array[..., [3, 3, 3]])
    assert np.array_equal(picture(array[..., :2]), array[..., [0, 0, 0]])
    stretched = picture(array.astype(np.uint16) * 7)  # whatever black and white are
    assert (stretched == 0).any() and (stretched == 255).any()
    assert np.corrcoef(stretched[..., 1].ravel(), array[..., 1].ravel())[0, 1] > 0.99
    np.save(tmp_path / "five.npy", array)
    assert np.array_equal(read_picture(tmp_path / "five.npy", (3, 2, 1)), array[..., 2::-1])
    with pytest.raises(ValueError, match=r"show_bands=\[6\]: must be three bands.* from 1 to 5"):
        picture(array, [6])


def test_scenes_have_further_bands_that_tell_classes_apart_beside_the_same_colours():
    scenes = ScenesDataset(2, 32)
    photo = scenes[1].image
    scenes.channels = C
    found = scenes[1]
    assert np.array_equal(found.image[..., :3], photo)
    means = [found.image[..., 4][mask].mean() for mask in found.masks()]
    spread = [found.image[..., 4][mask].std() for mask in found.masks()]
    assert np.std(means) > 2 * max(spread)
    scenes.channels = 1
    assert scenes[1].image.shape == (32, 32, 1)


def test_means_and_deviations_are_those_of_all_pixels():
    examples = [example(), Example(bands() // 2, example().segmentation, example().segments)]
    found = measure_bands(examples, 100)
    pixels = np.stack([item.image for item in examples]).reshape(-1, C)
    assert np.allclose(found.mean, pixels.mean(0)) and np.allclose(found.std, pixels.std(0)) and found.images == 2
    with pytest.raises(ValueError, match="5 bands of uint16 and .* 5 bands of uint8: one scale does not fit both"):
        measure_bands([example(), example(np.uint8)], 100)
