"""What the image processor is given: every setting and argument with every wrong value works or is refused by name."""

import logging

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from wrong_values import assert_names, every_wrong_value

from mask2former_hf.model.image_inputs import id_map_to_targets
from mask2former_hf.model.image_processing_mask2former import (
    Mask2FormerImageProcessor,
    Mask2FormerImageProcessorKwargs,
)

H, W = 12, 18
PHOTO = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
SETTINGS = list(Mask2FormerImageProcessorKwargs.__annotations__)
OF_A_CALL = {"input_data_format", "return_tensors"}
SMALL = {"size": {"shortest_edge": 32, "longest_edge": 64}}


def check_batch(batch):
    pixels = torch.as_tensor(np.stack(batch["pixel_values"]))
    assert pixels.shape[:2] == (1, 3) and pixels.isfinite().all()
    assert all((torch.as_tensor(labels) >= 0).all() for labels in batch["class_labels"])


@every_wrong_value
@pytest.mark.parametrize("setting", [*(name for name in SETTINGS if name not in OF_A_CALL), "label_ids_to_fuse"])
def test_every_setting_of_the_constructor_works_or_is_refused_by_name(setting, value, tmp_path):
    try:
        processor = Mask2FormerImageProcessor(**SMALL | {setting: value})
    except ValueError as error:
        assert_names(error, setting)
        return
    processor.save_pretrained(tmp_path)
    again = Mask2FormerImageProcessor.from_pretrained(tmp_path)
    try:
        batch = again(PHOTO, np.ones((H, W), np.uint8), size=SMALL["size"])
    except ValueError as error:  # of settings that fit an image or each other only
        assert_names(error, setting)
        return
    check_batch(batch)


@every_wrong_value
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_of_a_call_works_or_is_refused_by_name(setting, value):
    processor = Mask2FormerImageProcessor(**SMALL)
    try:
        batch = processor(PHOTO, np.ones((H, W), np.uint8), **{setting: value})
    except (ValueError, TypeError, StrictDataclassError) as error:
        assert_names(error, setting, most=4000 if isinstance(error, StrictDataclassError) else 700)
        return
    check_batch(batch)


@every_wrong_value
@pytest.mark.parametrize("argument", ["images", "segmentation_maps", "instance_id_to_semantic_id"])
@pytest.mark.parametrize("in_list", [False, True], ids=["alone", "in a list"])
def test_every_argument_of_a_call_works_or_is_refused_by_name(argument, value, in_list):
    given = {"images": PHOTO, "segmentation_maps": np.ones((H, W), np.uint8), "instance_id_to_semantic_id": None}
    try:
        batch = Mask2FormerImageProcessor(**SMALL)(**given | {argument: [value] if in_list else value})
    except (ValueError, TypeError) as error:
        assert_names(error, argument)
        return
    if argument != "segmentation_maps" or value is not None:
        check_batch(batch)


@pytest.mark.parametrize(
    "ids, rule",
    [
        (np.full((H, W), -1), "ids .*-1.* below 0; ids are 0 or more, apart from ignore_index"),
        (np.full((H, W), 2**63 + 5, np.uint64), r"segmentation_maps\[0\] has ids from 9223372036854775813"),
        (np.full((H, W), np.nan), "holds fractions"),
        (np.full((H, W), np.inf), "segmentation_maps"),
        (np.full((H, W), 1.5), "holds fractions"),
        (np.full((H, W), "a"), r"segmentation_maps\[0\] is an array of <U1; ids are integers"),
        (np.full((H, W), None), r"segmentation_maps\[0\] is an array of object"),
    ],
)
def test_ids_that_are_no_labels_are_refused(ids, rule):
    with pytest.raises(ValueError, match=rule):
        Mask2FormerImageProcessor(**SMALL)(PHOTO, ids, ignore_index=255)


def test_an_id_below_zero_may_be_the_ignore_index():
    ids = np.full((H, W), 3)
    ids[:4] = -100
    _, labels, ignored = id_map_to_targets(ids, (H, W), None, -100)
    assert labels.tolist() == [3] and ignored.sum() == 4 * W


@pytest.mark.parametrize("label", [-1, 1.5, "car", None, float("nan"), True])
def test_a_class_that_is_no_whole_number_is_refused(label):
    with pytest.raises(ValueError, match="gives the classes .* must be whole numbers, 0 or more"):
        id_map_to_targets(np.full((H, W), 7), (H, W), {7: label})


def test_a_setting_that_is_changed_later_is_checked_at_the_next_call():
    processor = Mask2FormerImageProcessor(**SMALL)
    processor.image_std = 0
    with pytest.raises(ValueError, match="image_std=0 must be finite and not 0"):
        processor(PHOTO)


@pytest.fixture
def said(caplog):
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    yield lambda: [record.getMessage() for record in caplog.records]
    transformers.utils.logging.disable_propagation()


def test_alpha_that_is_dropped_is_said_once(said):
    processor = Mask2FormerImageProcessor(**SMALL)
    glass, opaque = (Image.new("RGBA", (W, H), (9, 9, 9, alpha)) for alpha in (0, 255))
    processor([PHOTO, opaque])
    assert said() == []
    for _ in range(2):
        processor([glass, glass])
        processor(np.zeros((H, W, 4), np.uint8))
    first, second = said()
    assert first == "images have transparent pixels; their colours are used as if they were opaque"
    assert "arrays of 4 channels, of which the first three are used as red, green, blue" in second


def test_bands_beyond_three_are_said(said, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "five.tif", np.zeros((H, W, 5), np.uint8), photometric="rgb", planarconfig="contig")
    Mask2FormerImageProcessor(**SMALL)(str(tmp_path / "five.tif"))
    assert said() == ["images have 5 bands, of which the first 3 are used"]
