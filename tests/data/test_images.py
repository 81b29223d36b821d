"""One meaning of pixels: images in every mode and type become the RGB that the image processor makes of them."""

import logging
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageMode

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data import images
from mask2former_hf.data.images import read_image, read_map, read_size, to_rgb

H, W = 6, 8
PLAIN = Mask2FormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, size_divisor=1)
MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBa", "RGBX"]
DEEP = ["I;16", "I;16L", "I;16B", "I"]


def of_processor(image):
    pixels = PLAIN(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    return pixels.transpose(1, 2, 0)


def noise(mode):
    rng = np.random.default_rng(0)
    if mode in DEEP:
        values = rng.integers(0, 65536, (H, W))
        values[0, 0] = 65535
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.uint16))
        return (
            image
            if image.mode == mode
            else Image.frombytes(mode, (W, H), values.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
        )
    colours = Image.fromarray(rng.integers(0, 256, (H, W, 4), dtype=np.uint8))
    if mode in ("LAB", "HSV", "CMYK", "YCbCr"):
        bands = colours.split()[: len(ImageMode.getmode(mode).bands)]
        return Image.merge(mode, bands)
    if mode == "PA":
        return colours.convert("RGB").convert("P").convert("PA")
    if mode == "RGBX":
        return Image.frombytes("RGBX", (W, H), colours.tobytes())
    return colours.convert(mode)


@pytest.mark.parametrize("mode", MODES + DEEP)
def test_a_pil_image_of_every_mode_is_what_the_processor_sees(mode):
    image = noise(mode)
    assert image.mode == mode
    found = to_rgb(image, "here")
    assert found.dtype == np.uint8 and found.shape == (H, W, 3) and found.flags.writeable
    assert np.array_equal(found, of_processor(image))
    assert len(np.unique(found)) > (1 if mode == "1" else 5)


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int16, np.int32, np.int64, np.uint32, np.uint64])
def test_an_array_of_every_type_is_what_the_processor_sees(dtype, channels):
    top = {np.dtype(bool): 2, np.dtype(np.uint16): 65536}.get(np.dtype(dtype), 256)
    shape = (H, W) if channels is None else (H, W, channels)
    array = np.random.default_rng(0).integers(0, top, shape).astype(dtype)
    assert np.array_equal(to_rgb(array, "here"), of_processor(array))
    assert np.array_equal(to_rgb(torch.from_numpy(array), "here"), of_processor(array))
    before = array.copy()
    to_rgb(array, "here")[:] = 7
    assert np.array_equal(array, before) or array.dtype == np.uint8


def test_every_exif_orientation_is_turned_upright_as_in_the_processor(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(pixels).save(path, exif=exif)
        found = read_image(path)
        assert np.array_equal(found, of_processor(str(path)))
        assert found.shape[:2] == read_size(path) == ((W, H) if orientation > 4 else (H, W))


@pytest.mark.parametrize(
    "image, rule",
    [
        (np.zeros((H, W, 3)), "float64 from 0.0 to 0.0.*scale it first"),
        (np.full((H, W), 256), "int64 from 256 to 256"),
        (np.full((H, W), -1), "from -1 to -1"),
        (Image.new("F", (W, H), 0.5), "float32 from 0.5 to 0.5"),
        (Image.new("I", (W, H), 70000), "int32 from 70000"),
        (np.zeros((H, W, 5), np.uint8), r"shape \(6, 8, 5\) is no image"),
        (np.zeros((0, W, 3), np.uint8), "has pixels"),
        ("photo.jpg", "is no image"),
    ],
)
def test_pixels_without_a_known_scale_and_what_is_no_image_are_refused(image, rule):
    with pytest.raises(ValueError, match=f"here: .*{rule}"):
        to_rgb(image, "here")


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(images, "_SAID", set())
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def test_pages_and_transparency_that_are_not_used_are_said_once_with_the_file(tmp_path, said):
    pages = [Image.new("RGB", (W, H), (n, 0, 0)) for n in range(3)]
    glass, opaque = (Image.new("RGBA", (W, H), (9, 9, 9, alpha)) for alpha in (0, 255))
    for name in ("a", "b"):
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:])
        glass.save(tmp_path / f"{name}.png")
    opaque.save(tmp_path / "opaque.png")
    assert (read_image(tmp_path / "opaque.png") == 9).all() and said() == []
    for path in ("a.tif", "b.tif", "a.png", "b.png"):
        read_image(tmp_path / path)
    first, second = said()
    assert "a.tif has 3 pages, of which the first is used" in first and "a.png has transparent pixels" in second


def test_bands_beyond_three_are_said(tmp_path, said):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "five.tif", np.zeros((H, W, 5), np.uint8), photometric="rgb", planarconfig="contig")
    assert read_image(tmp_path / "five.tif").shape == (H, W, 3)
    assert "five.tif has 5 bands, of which the first 3 are used" in said()[0]


def test_grey_in_three_equal_channels_is_a_map_and_colours_or_pages_are_none(tmp_path):
    ids = np.arange(H * W, dtype=np.uint8).reshape(H, W)
    Image.fromarray(np.stack([ids] * 3, -1)).save(tmp_path / "grey.png")
    assert np.array_equal(read_map(tmp_path / "grey.png"), ids)
    Image.fromarray(np.stack([ids, ids, ids + 1], -1)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match="colour.png: mode RGB is not a map of ids"):
        read_map(tmp_path / "colour.png")
    Image.fromarray(ids).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.fromarray(ids)])
    with pytest.raises(ValueError, match="pages.tif: has 2 pages; a map of ids has one"):
        read_map(tmp_path / "pages.tif")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_no_image_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_image, read_map, read_size):
        with pytest.raises(OSError, match="pipe.png: not a readable image .*neither a file"):
            read(tmp_path / "pipe.png")


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_is_turned_by_a_tag_on_either_side_of_its_pixels(tmp_path, place):
    exif, path = Image.Exif(), tmp_path / "turned.png"
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(path, **({"exif": exif} if place == "before" else {}))
    if place == "after":
        content = path.read_bytes()
        end = content.rindex(b"IEND") - 4
        path.write_bytes(content[:end] + png_chunk(b"eXIf", exif.tobytes()) + content[end:])
    assert read_size(path) == read_image(path).shape[:2] == (60, 40)


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_size(path) == (40, 60)
    with pytest.raises(OSError, match="half.png: not a readable image"):
        read_image(path)


def test_an_image_beyond_pillows_limit_is_refused_with_the_way_out(tmp_path, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "slide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(OSError, match="slide.png: has more than 2000 pixels, which Pillow refuses; make a TIFF"):
        read_image(tmp_path / "slide.png")
