"""Targets of segmentation maps, against transformers' and literal NumPy."""

import numpy as np
import pytest
import torch
from helpers import noise_image as photo
from PIL import Image
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil as StockProcessor,
)
from transformers.models.mask2former.image_processing_pil_mask2former import (
    convert_segmentation_map_to_binary_masks as stock_targets,
)

from mask2former_hf.model.image_inputs import id_map_to_targets
from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor


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
