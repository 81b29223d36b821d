"""The image processor, against detectron2's rules, PIL, transformers' own class and literal NumPy."""

import numpy as np
import pytest
import torch
from helpers import GOLDEN, needs_golden
from helpers import noise_image as photo
from PIL import Image
from safetensors.torch import load_file
from transformers.image_utils import SizeDict
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil as StockProcessor,
)

from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def raw(images, **kwargs):
    """Pixels as they are: only loading, colour conversion and padding."""
    kwargs = {"do_resize": False, "do_rescale": False, "do_normalize": False, "size_divisor": 0} | kwargs
    return Mask2FormerImageProcessor()(images, return_tensors="np", **kwargs)["pixel_values"]


# --- geometry and values ---------------------------------------------------------------------------------------------


def shortest_edge(height, width, short, longest):
    """detectron2's ResizeShortestEdge.get_output_shape, from its documentation."""
    scale = short / min(height, width)
    new = [short, scale * width] if height < width else [scale * height, short]
    if max(new) > longest:
        shrink = longest / max(new)
        new = [side * shrink for side in new]
    return tuple(int(side + 0.5) for side in new)


@pytest.mark.parametrize("seed", range(8))
def test_the_aspect_is_kept_as_in_the_original(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(8, 90, 2))
    short, longest = int(rng.integers(8, 60)), int(rng.integers(60, 90))
    image = photo(height, width, seed)
    result = Mask2FormerImageProcessor(size={"shortest_edge": short, "longest_edge": longest})(image)
    new = shortest_edge(height, width, short, longest)
    assert result["pixel_mask"][0].sum(0).max() == new[0] and result["pixel_mask"][0].sum(1).max() == new[1]
    resized = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR)) / 255
    expected = ((resized - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(result["pixel_values"][0][:, : new[0], : new[1]], expected, atol=2e-6)


def test_a_200_by_301_image_is_padded_and_not_stretched():
    result = Mask2FormerImageProcessor(size={"shortest_edge": 200, "longest_edge": 999})(
        photo(200, 301), return_tensors="pt"
    )
    assert result["pixel_values"].shape == (1, 3, 224, 320)
    assert result["pixel_values"].dtype == torch.float32 and result["pixel_mask"].dtype == torch.int64
    assert result["pixel_mask"].sum() == 200 * 301
    assert (
        result["pixel_values"][:, :, 200:].abs().max() == 0 and result["pixel_values"][:, :, :, 301:].abs().max() == 0
    )


def test_a_batch_is_padded_to_its_largest_image_rounded_up():
    processor = Mask2FormerImageProcessor(do_resize=False)
    images = [photo(40, 70), photo(65, 20)]
    batch = processor(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    for b, image in enumerate(images):
        alone = processor(image, return_tensors="pt", pad_size={"height": 96, "width": 96})
        assert torch.equal(alone["pixel_values"][0], batch["pixel_values"][b])
        height, width = image.shape[:2]
        assert batch["pixel_mask"][b, :height, :width].all() and batch["pixel_mask"][b].sum() == height * width


@needs_golden
@pytest.mark.parametrize("case", ["r50_coco_panoptic", "swin_coco_panoptic"])
def test_values_equal_the_original_network_input(case):
    inputs = load_file(GOLDEN / case / "inputs.safetensors")
    images = [inputs["image.0"], inputs["image.1"]]
    ours = Mask2FormerImageProcessor(do_resize=False)(images, return_tensors="pt")["pixel_values"]
    expected = torch.zeros(2, 3, 256, 320)  # its README: mean and deviation of 0 to 255, then zeros up to 32
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    for b, image in enumerate(images):
        height, width = image.shape[1:]
        expected[b, :, :height, :width] = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"height": 30, "width": 50}, (30, 50)),
        ({"shortest_edge": 20}, (20, 40)),
        ({"longest_edge": 20}, (10, 20)),
        ({"max_height": 20, "max_width": 20}, (10, 20)),
        (20, (20, 40)),
        (SizeDict(height=30, width=50), (30, 50)),
        ((30, 50), (30, 50)),
    ],
)
def test_every_form_of_size_acts(size, expected):
    for values in (
        Mask2FormerImageProcessor(size=size, size_divisor=0)(photo(100, 200), return_tensors="np"),
        Mask2FormerImageProcessor(size_divisor=0)(photo(100, 200), size=size, return_tensors="np"),
    ):
        assert values["pixel_values"].shape[2:] == expected


def test_a_needle_keeps_at_least_one_pixel():
    image = photo(1, 3000)
    result = Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})(image, return_tensors="np")
    assert result["pixel_mask"].sum() == 1333


def test_pad_size_sets_the_canvas_and_is_checked():
    processor = Mask2FormerImageProcessor(do_resize=False)
    assert processor(photo(40, 50), pad_size=64, return_tensors="pt")["pixel_values"].shape[2:] == (64, 64)
    for pad_size in ({"height": 32, "width": 64}, {"height": 64, "width": 70}):
        with pytest.raises(ValueError, match=r"smallest such size is \(64, 64\)"):
            processor(photo(40, 50), pad_size=pad_size)


def test_each_step_can_be_switched_off():
    image = photo(10, 12)
    np.testing.assert_array_equal(raw(image)[0], image.transpose(2, 0, 1))
    np.testing.assert_allclose(raw(image, do_rescale=True)[0], image.transpose(2, 0, 1) / 255, rtol=1e-6)
    half = raw(image, do_normalize=True, image_mean=[128, 128, 128], image_std=[2.0, 2.0, 2.0])[0]
    np.testing.assert_allclose(half, (image.transpose(2, 0, 1) - 128.0) / 2)
    grey = raw(image, do_normalize=True, image_mean=128.0, image_std=2.0)[0]
    np.testing.assert_array_equal(grey, half)


def test_return_tensors_chooses_the_container():
    for kind, container, item in (
        ("pt", torch.Tensor, torch.Tensor),
        ("np", np.ndarray, np.ndarray),
        (None, list, np.ndarray),
    ):
        result = Mask2FormerImageProcessor(do_resize=False, ignore_index=9)(
            [photo(8, 9)], [np.zeros((8, 9), int)], return_tensors=kind
        )
        assert set(result) == {"pixel_values", "pixel_mask", "mask_labels", "class_labels", "ignore_masks"}
        assert isinstance(result["pixel_values"], container) and isinstance(result["pixel_values"][0], item)
        assert isinstance(result["mask_labels"], list) and isinstance(result["mask_labels"][0], item)
    with pytest.raises(ValueError, match="return_tensors"):
        Mask2FormerImageProcessor()(photo(8, 9), return_tensors="jax")


# --- what an image may be --------------------------------------------------------------------------------------------


def test_arrays_tensors_and_files_give_the_same_pixels(tmp_path):
    image = photo(9, 14)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = raw(image)
    forms = [
        Image.fromarray(image),
        image.transpose(2, 0, 1),
        torch.from_numpy(image),
        torch.from_numpy(image).permute(2, 0, 1),
        image.astype(np.int64),
        image.astype(np.float32),
        torch.from_numpy(image).float(),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        image[None],
        [[image]],
    ]
    for form in forms:
        np.testing.assert_array_equal(raw(form), expected)
    np.testing.assert_array_equal(raw(image.transpose(2, 0, 1), input_data_format="channels_first"), expected)
    assert raw(forms[:5]).shape == (5, 3, 9, 14)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_pil_mode_is_converted(mode):
    image = Image.fromarray(photo(9, 14)).convert(mode)
    np.testing.assert_array_equal(raw(image)[0], np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_alpha_is_dropped_and_grey_is_repeated():
    image = photo(9, 14)
    rgba = np.concatenate([image, np.zeros_like(image[..., :1])], -1)
    np.testing.assert_array_equal(raw(rgba)[0], image.transpose(2, 0, 1))
    for grey in (image[..., 0], image[..., :1], image[..., :2], image[..., :1].transpose(2, 0, 1)):
        np.testing.assert_array_equal(raw(grey)[0], np.repeat(image[None, ..., 0], 3, 0))
    np.testing.assert_array_equal(raw(image[..., 0] > 99)[0, 0], 255.0 * (image[..., 0] > 99))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    expected = np.repeat(np.arange(256).reshape(1, 16, 16), 3, 0)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for image in (deep, deep[..., None].repeat(3, 2), Image.fromarray(deep), tmp_path / "deep.png"):
        np.testing.assert_array_equal(raw(image)[0], expected)
    np.testing.assert_array_equal(raw(Image.fromarray(deep.astype(np.int32)))[0], expected)


def test_floats_in_zero_to_one_need_no_rescaling():
    image = photo(20, 30)
    ours = Mask2FormerImageProcessor(size=40)(image.astype(np.float32) / 255, do_rescale=False)
    bytes_ = Mask2FormerImageProcessor(size=40)(image)
    np.testing.assert_allclose(
        ours["pixel_values"][0], bytes_["pixel_values"][0], atol=1.01 / 255 / 0.224
    )  # PIL rounds twice


def test_a_callers_float_image_is_left_untouched():
    image = np.random.default_rng(0).random((32, 32, 3), dtype=np.float32)
    before = image.copy()
    Mask2FormerImageProcessor(do_resize=False, do_rescale=False)(image)
    np.testing.assert_array_equal(image, before)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(photo(8, 12))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    expected = np.rot90(np.asarray(image), -1).transpose(2, 0, 1)
    for form in (str(tmp_path / "turned.png"), Image.open(tmp_path / "turned.png")):
        np.testing.assert_array_equal(raw(form)[0], expected)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"images\[0\].*not empty"),
        ([photo(4, 4), np.zeros(7)], ValueError, r"images\[1\] has shape \(7,\)"),
        (np.zeros((2, 3, 4, 5, 3)), ValueError, "shape"),
        (np.zeros((9, 9, 7), np.uint8), ValueError, "1 to 4"),
        (photo(4, 4).astype(np.int32) + 300, ValueError, "integers are 0 to 255"),
        ([], ValueError, "images is empty"),
        ([3.5], TypeError, r"images\[0\] is a float"),
        (np.full((4, 4, 3), np.nan), ValueError, r"images\[0\] has values that are not finite"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), ValueError, "70000; integers are 0 to 255, or uint16"),
    ],
)
def test_an_image_that_is_none_is_refused_by_name(images, error, words):
    with pytest.raises(error, match=words):
        Mask2FormerImageProcessor()(images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std=.* must be finite and not 0"),
        ({"image_mean": [0.2, float("nan"), 0.2]}, r"image_mean=.* must be finite"),
        ({"rescale_factor": float("inf")}, r"rescale_factor=inf must be finite"),
        ({"size": {"shortest_edge": -5, "longest_edge": 9}}, "must be at least 1 pixel"),
    ],
)
def test_senseless_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Mask2FormerImageProcessor(**options)(photo(8, 8))


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="do_center_crop"):
        Mask2FormerImageProcessor()(photo(8, 8), do_center_crop=True)


def test_pixels_equal_transformers_where_it_does_not_stretch():
    image = photo(64, 96)
    kwargs = {"size": {"height": 32, "width": 64}, "return_tensors": "pt"}
    ours, stock = Mask2FormerImageProcessor()(image, **kwargs), StockProcessor()(image, **kwargs)
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], rtol=0, atol=1e-5)
    assert torch.equal(ours["pixel_mask"], stock["pixel_mask"])


def test_image_segmentation_pipeline_takes_the_processor():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, pipeline

    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=4,
        dim_feedforward=32,
        num_queries=6,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    segment = pipeline("image-segmentation", model=model, image_processor=Mask2FormerImageProcessor(size=64))
    for subtask in ("panoptic", "instance", "semantic"):
        kwargs = {} if subtask == "semantic" else {"threshold": 0.0}
        for row in segment(Image.fromarray(photo(50, 80)), subtask=subtask, **kwargs):
            assert row["mask"].size == (80, 50) and row["label"].startswith("LABEL_")
            assert np.asarray(row["mask"]).any()
