"""Images of 1 to 16 bands in the image processor and the model: their numbers stay as they are."""

import numpy as np
import pytest
import torch
import transformers
from helpers import relative_difference, tiny_config, tiny_model
from PIL import Image

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.model.channels import image_channels

H, W, C = 32, 64, 5
MEAN, STD = [0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]
TOPS = {np.uint8: 256, np.uint16: 65536, np.int16: 9000, np.float32: 2, np.float64: 2}


def processor(**fields):
    given = {"num_channels": C, "image_mean": MEAN, "image_std": STD, "do_resize": False}
    return Mask2FormerImageProcessor(**given | fields)


def bands(dtype=np.uint16, channels=C, size=(H, W)):
    return (np.random.default_rng(0).random((*size, channels)) * TOPS[dtype]).astype(dtype)


def pixels(image, processor, **options):
    return processor(image, return_tensors="pt", **options)["pixel_values"]


@pytest.mark.parametrize("dtype, factor", [*zip(TOPS, [1 / 255, 1 / 65535, 1e-4, 1.0, 1.0], strict=True)])
def test_numbers_of_every_type_are_scaled_and_normalised_by_band_whatever_side_they_lie_on(dtype, factor):
    image = bands(dtype)
    wanted = ((image.astype(np.float64) * factor - MEAN) / STD).transpose(2, 0, 1)
    first = image.transpose(2, 0, 1).copy()
    made = processor(rescale_factor=factor)
    for form in (image, first, torch.from_numpy(first), [torch.from_numpy(image)]):
        assert np.allclose(pixels(form, made)[0], wanted, atol=1e-4, rtol=1e-5)


def test_a_side_as_short_as_the_bands_is_taken_for_them_only_without_input_data_format():
    image = bands(size=(C, W))
    made = processor()
    last = pixels(image, made, input_data_format="channels_last")
    assert last.shape == (1, C, 32, W) and pixels(image.transpose(2, 0, 1), made).equal(last)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_without_resizing_the_pixels_are_those_of_transformers_own_processor(dtype):
    fields = {"image_mean": MEAN, "image_std": STD, "do_resize": False}
    stock = transformers.Mask2FormerImageProcessor(**fields)
    image = bands(dtype).transpose(2, 0, 1)
    theirs = pixels(image, stock, input_data_format="channels_first")
    ours = pixels(image, Mask2FormerImageProcessor(**fields))  # the number of bands is that of the means
    assert relative_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("mode, channels", [("L", 1), ("I;16", 1), ("F", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_pictures_are_bands_if_they_have_so_many(mode, channels):
    dtype = {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)
    array = bands(dtype, channels)
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    assert picture.mode == mode
    made = processor(num_channels=channels, image_mean=0.0, image_std=1.0, do_rescale=False)
    assert pixels([picture, picture], made)[1].numpy().transpose(1, 2, 0).tolist() == array.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_every_band_is_resized_as_pillow_resizes_it(dtype):
    image = bands(dtype)
    made = processor(do_resize=True, size={"height": 20, "width": 30}, size_divisor=0, do_rescale=False)
    resized = [
        np.asarray(Image.fromarray(band if dtype == np.uint8 else band.astype(np.float32)).resize((30, 20), 2))
        for band in image.transpose(2, 0, 1)
    ]
    wanted = (np.stack(resized, -1) - np.array(MEAN)) / STD
    assert np.allclose(pixels(image, made)[0].numpy().transpose(1, 2, 0), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"num_channels": 5, "image_std": 1.0},
            r"image_mean=\[0.485.* has 3 numbers, but .* 5 channels; give 5 numbers",
        ),
        ({"image_mean": MEAN, "image_std": STD[:4]}, r"image_mean=.* has 5 numbers, but .* says 4 channels"),
        (
            {"num_channels": 17, "image_mean": 0.5, "image_std": 1.0},
            "num_channels=17 must be a whole number from 1 to 16",
        ),
    ],
)
def test_statistics_of_another_length_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Mask2FormerImageProcessor(**fields)


@pytest.mark.parametrize(
    "image, message",
    [
        (bands(channels=4), r"images\[0\] of shape \(32, 64, 4\) has 4 channels.* num_channels=5"),
        (Image.new("RGB", (W, H)), "has 3 channels .* num_channels=5"),
        (np.where(np.arange(C) == 2, np.nan, bands(np.float32)), "2048 pixels that are nan or infinite; replace them"),
        (np.full((H, W, C), 2**25), "int64 with values .* beyond what float32 holds"),
        (np.zeros((H, W, C), dtype=complex), "complex128; pixels are integers or floats"),
    ],
)
def test_an_image_of_other_bands_or_without_numbers_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        processor()(image)


def test_photos_are_still_red_green_and_blue():
    assert image_channels(Mask2FormerImageProcessor()) is None
    assert "num_channels" not in Mask2FormerImageProcessor().to_dict()
    with pytest.raises(ValueError, match="has 5 channels .* For bands give the processor num_channels"):
        Mask2FormerImageProcessor()(bands(np.uint8))


def test_the_file_says_how_many_bands_and_transformers_reads_it(tmp_path):
    made = processor(num_channels=3, image_mean=MEAN[:3], image_std=STD[:3])  # three bands are no photo
    made.save_pretrained(tmp_path)
    assert image_channels(Mask2FormerImageProcessor.from_pretrained(tmp_path)) == 3
    assert list(transformers.Mask2FormerImageProcessor.from_pretrained(tmp_path).image_mean) == MEAN[:3]


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_a_model_of_five_bands_is_the_same_network_in_transformers(backbone, tmp_path):
    config = tiny_config(backbone)
    config.backbone_config.num_channels = C
    model = Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    stock = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    image = torch.randn(1, C, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(image), stock(image)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert relative_difference(ours[name], theirs[name]) < 1e-4
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 96\): it must be \(batch, 5, height, width\)"):
        model(image[:, :3])


def test_a_model_of_photos_refuses_five_bands():
    with pytest.raises(ValueError, match=r"it must be \(batch, 3, height, width\)"):
        tiny_model("resnet")(torch.zeros(1, C, 64, 64))
