"""The image processor, against detectron2's rules, PIL, transformers' own class and literal NumPy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, needs_golden
from PIL import Image
from safetensors.torch import load_file
from transformers.image_utils import SizeDict
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 wants torchvision
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil as StockProcessor,
)
from transformers.models.mask2former.image_processing_pil_mask2former import (
    convert_segmentation_map_to_binary_masks as stock_targets,
)

from mask2former_hf.model.image_inputs import id_map_to_targets
from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


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


# --- segmentation maps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_targets_equal_transformers_on_random_maps(seed):
    rng = np.random.default_rng(seed)
    id_map = rng.integers(0, 9, (11, 13))
    id_map[rng.random(id_map.shape) < 0.2] = rng.choice([0, 255])
    ignore_index, reduce = [(None, False), (255, False), (0, False), (255, True)][seed % 4]
    mapping = {i: int(rng.integers(1, 50)) for i in [*range(10), 255]} if seed % 2 else None
    masks, labels = stock_targets(id_map, mapping, ignore_index, reduce)
    ours, our_labels, ignored = id_map_to_targets(id_map, (11, 13), mapping, ignore_index, reduce)
    np.testing.assert_array_equal(ours.numpy(), masks)
    np.testing.assert_array_equal(our_labels.numpy(), labels)
    reduced = np.where(id_map == 0, 255, id_map - 1) if reduce else id_map
    np.testing.assert_array_equal(ignored.numpy(), reduced == ignore_index)
    assert ours.dtype == torch.uint8 and our_labels.dtype == torch.int64 and ignored.dtype == torch.bool


def test_masks_are_padded_with_zero_and_padding_is_not_ignored():
    maps = [np.ones((40, 60), int), np.full((64, 30), 255)]
    maps[1][10:20] = 2
    processor = Mask2FormerImageProcessor(do_resize=False, ignore_index=255)
    batch = processor([photo(*m.shape) for m in maps], maps, return_tensors="pt")
    assert [m.shape for m in batch["mask_labels"]] == [(1, 64, 64), (1, 64, 64)]
    assert [int(m.sum()) for m in batch["mask_labels"]] == [40 * 60, 10 * 30]
    assert all(m.max() == 1 for m in batch["mask_labels"])
    assert [labels.tolist() for labels in batch["class_labels"]] == [[1], [2]]
    assert not batch["ignore_masks"][0].any()
    assert batch["ignore_masks"][1].sum() == 54 * 30 and not batch["ignore_masks"][1][:, 30:].any()
    stock = StockProcessor(do_resize=False, ignore_index=255)
    assert stock([photo(*m.shape) for m in maps], maps)["mask_labels"][0].max() == 255  # the defect


@pytest.mark.parametrize("new", [(40, 71), (23, 31), (100, 100)])
def test_maps_are_resized_like_pil_nearest_with_ids_up_to_2_to_the_31(new):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 200, (57, 43))
    ids = np.concatenate([[2**31 - 1, 2**31], rng.integers(0, 2**31, 198)])
    processor = Mask2FormerImageProcessor(size={"height": new[0], "width": new[1]}, size_divisor=0)
    batch = processor(photo(57, 43), ids[small], {int(i): 1 for i in ids}, return_tensors="np")
    pil = np.asarray(Image.fromarray(small.astype(np.uint8)).resize(new[::-1], Image.Resampling.NEAREST))
    order = np.unique(ids[pil])
    np.testing.assert_array_equal(order[batch["mask_labels"][0].argmax(0)], ids[pil])
    assert (batch["mask_labels"][0].sum(0) == 1).all()


def test_maps_come_in_every_container(tmp_path):
    image, ids = photo(8, 9), np.random.default_rng(0).integers(0, 4, (8, 9))
    palette = Image.fromarray(ids.astype(np.uint8), mode="P")
    palette.putpalette(list(range(30)))
    palette.save(tmp_path / "map.png")
    processor = Mask2FormerImageProcessor(do_resize=False)
    expected = processor(image, ids)["mask_labels"][0]
    forms = [ids.astype(np.uint8), ids.astype(float), torch.from_numpy(ids), palette, tmp_path / "map.png", ids[None]]
    for form in [*forms, Image.fromarray(ids.astype(np.int32)), [ids]]:
        np.testing.assert_array_equal(processor(image, form)["mask_labels"][0], expected)


def test_instances_get_their_classes_per_image():
    maps = [np.array([[1, 2], [2, 7]]), np.array([[1, 1], [0, 0]])]
    processor = Mask2FormerImageProcessor(do_resize=False, size_divisor=0, ignore_index=0)
    images = [photo(2, 2)] * 2
    batch = processor(images, maps, [{1: 5, 2: 6, 7: 5}, {1: 9}], return_tensors="pt")
    assert [labels.tolist() for labels in batch["class_labels"]] == [[5, 6, 5], [9]]
    with pytest.raises(ValueError, match=r"no class for the ids \[2, 7\]"):
        processor(images, maps, {1: 5})
    with pytest.raises(ValueError, match="instance_id_to_semantic_id has 1 entries for 2 images"):
        processor(images, maps, [{1: 5}])


def test_a_class_that_reduction_leaves_without_number_is_refused():
    with pytest.raises(ValueError, match=r"the ids \[3\] a class below 1"):
        id_map_to_targets(np.array([[3]]), (1, 1), {3: 0}, 255, True)
    with pytest.raises(ValueError, match="do_reduce_labels=True"):
        Mask2FormerImageProcessor(do_reduce_labels=True)(photo(2, 2), np.zeros((2, 2), int))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_reduced_labels_equal_transformers_own_reduction(dtype):
    """`reduce_label` of transformers' semantic processors: 0 and 255 become 255, every other label one less."""
    ids = np.random.default_rng(0).choice([0, 1, 2, 150, 253, 254, 255], (12, 20)).astype(dtype)
    expected = torch.from_numpy(BeitImageProcessorPil().reduce_label(ids.copy()).astype(np.int64))
    masks, labels, ignored = id_map_to_targets(ids, (12, 20), None, 255, True)
    assert labels.tolist() == [0, 1, 149, 252, 253]
    assert torch.equal(ignored, expected == 255)
    assert torch.equal(masks.bool(), expected == labels[:, None, None])


def test_reduction_of_the_smallest_map():
    ids = np.repeat(np.array([0, 1, 255], np.uint8), [20, 20, 24])[:, None]
    masks, labels, ignored = id_map_to_targets(ids, (64, 1), None, 255, True)
    assert labels.tolist() == [0] and masks.sum() == 20 and ignored.sum() == 44


@pytest.mark.parametrize("ignore_index", [255, 0, -1, 300])
def test_reduction_makes_no_label_equal_to_ignore_index(ignore_index):
    ids = np.array([[0, 1, 254, 256, 301, ignore_index]])
    masks, labels, ignored = id_map_to_targets(ids, (1, 6), None, ignore_index, True)
    kept = sorted({1, 254, 256, 301} - {ignore_index})
    assert labels.tolist() == [label - 1 for label in kept]
    assert ignored[0].tolist() == [True, False, False, False, False, True] and (masks.sum(0) + ignored == 1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_reduced_instance_maps_equal_transformers(dtype):
    ids = np.random.default_rng(0).choice([0, 3, 7, 200, 255], (12, 20)).astype(dtype)
    classes = {3: 1, 7: 5, 200: 5, 255: 2}  # 255 is an instance here, because it is named
    their_masks, their_labels = stock_targets(ids, classes, 255, True)
    masks, labels, ignored = id_map_to_targets(ids, (12, 20), classes, 255, True)
    assert labels.tolist() == their_labels.tolist() == [0, 4, 4, 1]
    assert torch.equal(masks.float(), torch.from_numpy(their_masks))
    assert torch.equal(ignored, torch.from_numpy(ids == 0))
    unnamed = {key: value for key, value in classes.items() if key != 255}
    _, labels, ignored = id_map_to_targets(ids, (12, 20), unnamed, 255, True)
    assert labels.tolist() == [0, 4, 4] and torch.equal(ignored, torch.from_numpy((ids == 0) | (ids == 255)))


def test_a_map_with_nothing_but_ignored_pixels_has_no_targets():
    masks, labels, ignored = id_map_to_targets(np.zeros((3, 4), np.uint8), (32, 32), None, 255, True)
    assert masks.shape == (0, 32, 32) and labels.shape == (0,) and ignored.sum() == 12


def test_a_map_that_does_not_fit_its_image_is_refused():
    processor = Mask2FormerImageProcessor()
    with pytest.raises(ValueError, match=r"segmentation_maps\[0\] has shape \(9, 8\).*\(8, 9\)"):
        processor(photo(8, 9), np.zeros((9, 8), int))
    with pytest.raises(ValueError, match="segmentation_maps has 2 entries for 1 images"):
        processor(photo(8, 9), [np.zeros((8, 9), int)] * 2)
    with pytest.raises(ValueError, match="fractions"):
        processor(photo(8, 9), np.full((8, 9), 0.5))


# --- the file --------------------------------------------------------------------------------------------------------

FIELDS = [
    "do_resize", "size", "size_divisor", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std", "pad_size", "ignore_index", "do_reduce_labels", "num_labels",
]  # fmt: skip
CONFIGS = [
    {},
    {"size": {"height": 384, "width": 384}, "ignore_index": 255, "num_labels": 133, "do_reduce_labels": True},
    {"size": {"shortest_edge": 512, "longest_edge": 2048}, "size_divisor": 64, "resample": 3, "do_normalize": False},
    {"pad_size": {"height": 640, "width": 640}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_rescale": False},
    {"size": 600, "max_size": 900},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_reads_what_we_save_and_we_read_what_it_saves(config, tmp_path):
    ours, stock = Mask2FormerImageProcessor(**config), StockProcessor(**config)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    saved = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "Mask2FormerImageProcessor"
    assert saved == json.loads((tmp_path / "stock" / "preprocessor_config.json").read_text())
    readers = [
        StockProcessor.from_pretrained(tmp_path / "ours"),
        AutoImageProcessor.from_pretrained(tmp_path / "ours"),
    ]
    readers += [Mask2FormerImageProcessor.from_pretrained(tmp_path / name) for name in ("ours", "stock")]
    assert "mask2former_hf" not in type(readers[1]).__module__
    for field in FIELDS:
        assert all(getattr(reader, field) == getattr(stock, field) for reader in readers), field


def test_old_spellings_are_read(tmp_path):
    old = {
        "image_processor_type": "MaskFormerImageProcessor",
        "feature_extractor_type": "MaskFormerFeatureExtractor",
        "size": 512,
        "_max_size": 2048,
        "reduce_labels": True,
        "size_divisibility": 64,
        "ignore_index": 255,
        "num_labels": 150,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    processor = Mask2FormerImageProcessor.from_pretrained(tmp_path)
    assert dict(processor.size) == {"shortest_edge": 512, "longest_edge": 2048}
    assert processor.do_reduce_labels is True and processor.size_divisor == 64 and processor.num_labels == 150
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "Mask2FormerImageProcessor"
    assert not {"reduce_labels", "_max_size", "feature_extractor_type", "size_divisibility"} & set(saved)
    assert StockProcessor.from_pretrained(tmp_path).size == processor.size
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 8, "width": 9}, "_max_size": 7}))
    assert dict(Mask2FormerImageProcessor.from_pretrained(tmp_path).size) == {"height": 8, "width": 9}


def test_the_stuff_classes_travel_with_the_processor(tmp_path):
    Mask2FormerImageProcessor(label_ids_to_fuse=[2, 3]).save_pretrained(tmp_path)
    assert Mask2FormerImageProcessor.from_pretrained(tmp_path).label_ids_to_fuse == [2, 3]


def test_thresholds_are_in_the_file_only_where_they_are_not_the_defaults(tmp_path):
    Mask2FormerImageProcessor(object_mask_threshold=0.8, overlap_threshold=0.5).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert "object_mask_threshold" not in fields and fields["overlap_threshold"] == 0.5
    read = Mask2FormerImageProcessor.from_pretrained(tmp_path)
    assert (read.object_mask_threshold, read.overlap_threshold) == (0.8, 0.5)
    with pytest.raises(ValueError, match="overlap_threshold=2 must be between 0 and 1"):
        Mask2FormerImageProcessor(overlap_threshold=2)


def test_pixels_equal_transformers_where_it_does_not_stretch():
    image = photo(64, 96)
    kwargs = {"size": {"height": 32, "width": 64}, "return_tensors": "pt"}
    ours, stock = Mask2FormerImageProcessor()(image, **kwargs), StockProcessor()(image, **kwargs)
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"], rtol=0, atol=1e-5)
    assert torch.equal(ours["pixel_mask"], stock["pixel_mask"])


# --- results ---------------------------------------------------------------------------------------------------------


def painted(labels, areas, side=16, classes=4, sizes=None):
    """A model output for one image: queries with a certain class each, masks that are blocks of rows."""
    classes_logits = torch.zeros(1, len(labels), classes + 1)
    classes_logits[0, torch.arange(len(labels)), torch.tensor(labels)] = 9.0
    masks = torch.full((1, len(labels), side, side), -9.0)
    for query, (start, stop) in enumerate(areas):
        masks[0, query, start:stop] = 9.0
    return SimpleNamespace(class_queries_logits=classes_logits, masks_queries_logits=masks, **(sizes or {}))


def test_padding_is_cropped_and_results_come_at_the_target_size():
    outputs = painted([0], [(4, 12)], sizes={
        "image_sizes": torch.tensor([[32, 64]]), "canvas_sizes": torch.tensor([[64, 64]])
    })  # fmt: skip
    outputs.masks_queries_logits = torch.nn.functional.pad(outputs.masks_queries_logits, (0, 9, 0, 3), value=9.0)
    processor = Mask2FormerImageProcessor()
    for target in ((32, 64), [64, 128], torch.tensor([16, 32])):
        result = processor.post_process_panoptic_segmentation(outputs, target_sizes=[target])[0]["segmentation"]
        assert result.shape == tuple(target)
        top = int(target[0]) // 2
        assert (result[top:] == 1).all() and (result[: top - 1] == 0).all()  # rows 16 to 32 of a 32-row image
    assert processor.post_process_semantic_segmentation(outputs)[0].shape == (32, 64)
    assert processor.post_process_instance_segmentation(outputs)[0]["boxes"].tolist() == [[0, 16, 64, 32]]


def test_outputs_of_transformers_are_taken_as_one_whole_image():
    outputs = painted([0, 1], [(0, 8), (8, 16)])
    assert Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)[0].shape == (64, 64)
    target = Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs, [(30, 50)])[0]
    assert target.shape == (30, 50) and (target[:15] == 0).all() and (target[15:] == 1).all()


def test_semantic_scores_are_returned_on_request():
    outputs = painted([0, 1], [(0, 8), (8, 16)])
    result = Mask2FormerImageProcessor().post_process_semantic_segmentation(
        outputs, [(30, 50)], return_segmentation_scores=True
    )[0]
    assert result.segmentation_scores.shape == (4, 30, 50)
    assert torch.equal(result.segmentation, result.segmentation_scores.argmax(0))


def test_target_sizes_of_another_length_are_refused():
    outputs = painted([0], [(0, 8)])
    processor = Mask2FormerImageProcessor()
    for method in ("semantic", "instance", "panoptic"):
        with pytest.raises(ValueError, match="target_sizes has 2 entries for 1 images"):
            getattr(processor, f"post_process_{method}_segmentation")(outputs, target_sizes=[(4, 4), (4, 4)])


def test_outputs_of_a_training_step_without_masks_are_refused():
    outputs = painted([0], [(0, 8)])
    outputs.masks_queries_logits = None
    with pytest.raises(ValueError, match="no masks_queries_logits.*output_auxiliary_logits=True"):
        Mask2FormerImageProcessor().post_process_semantic_segmentation(outputs)


def test_panoptic_entries_are_unique_and_void_is_zero():
    outputs = painted([0, 1, 0, 2], [(0, 4), (4, 8), (8, 12), (12, 14)])
    result = Mask2FormerImageProcessor().post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})[0]
    assert [(s["id"], s["label_id"], s["was_fused"]) for s in result["segments_info"]] == [
        (1, 0, True),
        (2, 1, False),
        (3, 2, False),
    ]
    assert result["segmentation"].unique().tolist() == [0, 1, 2, 3]
    own = Mask2FormerImageProcessor(label_ids_to_fuse=[0]).post_process_panoptic_segmentation(outputs)[0]
    assert own["segments_info"] == result["segments_info"]


def test_the_default_threshold_is_the_original_one():
    outputs = painted([0], [(0, 8)])
    outputs.class_queries_logits[0, 0] = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05]).log()
    processor = Mask2FormerImageProcessor()
    assert processor.post_process_panoptic_segmentation(outputs)[0]["segments_info"] == []
    assert len(processor.post_process_panoptic_segmentation(outputs, threshold=0.5)[0]["segments_info"]) == 1


def instances(outputs, **kwargs):
    return Mask2FormerImageProcessor().post_process_instance_segmentation(outputs, **kwargs)[0]


def test_instances_have_ids_scores_and_masks_in_one_order():
    outputs = painted([1, 2, 3], [(0, 8), (4, 16), (0, 0)])
    outputs.class_queries_logits[0, 1] *= 2  # the better one
    result = instances(outputs)
    assert [(s["id"], s["label_id"]) for s in result["segments_info"]] == [(0, 2), (1, 1)]
    assert [s["score"] for s in result["segments_info"]] == result["scores"].tolist()
    assert result["labels"].tolist() == [2, 1] and result["boxes"].tolist() == [[0, 16, 64, 64], [0, 0, 64, 32]]
    assert result["masks"].sum(0).max() == 2
    assert (result["segmentation"][16:] == 0).all() and (result["segmentation"][:16] == 1).all()


def test_the_overlap_threshold_drops_hidden_instances():
    outputs = painted([1, 2], [(0, 8), (4, 16)])
    outputs.class_queries_logits[0, 1] *= 2
    counts = [len(instances(outputs, overlap_mask_area_threshold=t)["segments_info"]) for t in (0.0, 0.5, 0.51, 1.0)]
    assert counts == [2, 2, 1, 1]
    dropped = instances(outputs, overlap_mask_area_threshold=0.8)
    assert len(dropped["masks"]) == 1 and dropped["segmentation"].unique().tolist() == [-1, 0]


def test_the_mask_threshold_acts_on_instances():
    outputs = painted([1], [(0, 16)])
    outputs.masks_queries_logits[0, 0] = torch.linspace(-4, 4, 16)[:, None]
    areas = [int(instances(outputs, mask_threshold=t, threshold=0)["masks"].sum()) for t in (0.2, 0.5, 0.8)]
    assert areas == sorted(areas, reverse=True) and len(set(areas)) == 3


def test_coco_annotations_decode_to_the_overlapping_masks():
    coco = pytest.importorskip("pycocotools.mask")
    outputs = painted([1, 2], [(0, 8), (4, 16)])
    result = instances(outputs, return_coco_annotation=True)
    decoded = coco.decode(result["segmentation"]).transpose(2, 0, 1)
    np.testing.assert_array_equal(decoded, result["masks"].numpy())
    json.dumps(result["segmentation"])
    assert torch.equal(instances(outputs, return_binary_maps=True)["segmentation"], result["masks"])
    with pytest.raises(ValueError, match="both True"):
        instances(outputs, return_coco_annotation=True, return_binary_maps=True)


def test_no_instance_gives_empty_results():
    outputs = painted([4, 4], [(0, 8), (4, 16)])  # "no object"
    result = instances(outputs)
    assert result["segments_info"] == [] and (result["segmentation"] == -1).all()
    assert instances(outputs, return_binary_maps=True)["segmentation"].shape == (0, 64, 64)
    assert instances(outputs, return_coco_annotation=True)["segmentation"] == []


def test_stuff_is_no_instance_when_the_processor_knows_it():
    outputs = painted([0, 1], [(0, 8), (8, 16)])
    processor = Mask2FormerImageProcessor(label_ids_to_fuse=[0])
    assert processor.post_process_instance_segmentation(outputs)[0]["labels"].tolist() == [1]
    assert sorted(instances(outputs)["labels"].tolist()) == [0, 1]


def test_instances_equal_transformers_at_its_own_size():
    # At 384 × 384 without padding its instance path has no defect: same scores, labels and binary maps.
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        class_queries_logits=torch.randn(1, 12, 5, generator=generator) * 5,
        masks_queries_logits=torch.nn.functional.interpolate(
            torch.randn(1, 12, 6, 6, generator=generator) * 6, size=(96, 96), mode="bilinear"
        ),
    )
    stock = StockProcessor().post_process_instance_segmentation(outputs, threshold=0.1, return_binary_maps=True)[0]
    ours = instances(outputs, threshold=0.1, return_binary_maps=True, top_k=12)
    assert len(stock["segments_info"]) == len(ours["segments_info"]) > 3
    order = sorted(range(len(stock["segments_info"])), key=lambda i: -stock["segments_info"][i]["score"])
    for n, i in enumerate(order):
        assert ours["segments_info"][n]["label_id"] == stock["segments_info"][i]["label_id"]
        assert ours["segments_info"][n]["score"] == pytest.approx(stock["segments_info"][i]["score"], abs=1e-5)
        assert (ours["segmentation"][n] != stock["segmentation"][i].bool()).sum() <= 2


def test_results_do_not_pass_through_384_pixels():
    # Stripes of 4 pixels at 1024: a detour over 384 × 384 mixes them up.
    outputs = painted([0], [(0, 0)], side=256)
    outputs.masks_queries_logits[0, 0, ::2] = 9.0
    result = Mask2FormerImageProcessor().post_process_panoptic_segmentation(outputs, target_sizes=[(1024, 1024)])[0]
    rows = (result["segmentation"] > 0).float().mean(1)
    assert rows.unique().tolist() == [0, 1]
    assert int((rows[1:] != rows[:-1]).sum()) == 255


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
