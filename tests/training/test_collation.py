"""From annotated examples to a batch, and from a batch to figures."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_config

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS, ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate, headline
from mask2former_hf.training.collation import SegmentationCollator


def test_in_a_mixed_size_batch_masks_are_padded_with_zero_and_void_is_ignored():
    examples = [ScenesDataset(2, size=size)[1] for size in ((64, 96), (96, 64))]
    examples[0].segmentation[:10] = 0
    ids = set(np.unique(examples[0].segmentation).tolist())
    examples[0] = replace(examples[0], segments=[s for s in examples[0].segments if s["id"] in ids])
    batch = SegmentationCollator(Mask2FormerImageProcessor(do_resize=False))(examples)
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    for example, masks, labels, ignored in zip(
        examples, batch["mask_labels"], batch["class_labels"], batch["ignore_masks"], strict=True
    ):
        height, width = example.segmentation.shape
        assert masks.dtype == torch.uint8 and masks.max() == 1
        assert masks[:, height:].sum() == masks[:, :, width:].sum() == 0
        truth = {s["id"]: s["category_id"] for s in example.segments}
        for number, mask, label in zip(sorted(truth), masks, labels.tolist(), strict=True):
            assert np.array_equal(mask[:height, :width].numpy() == 1, example.segmentation == number)
            assert label == truth[number]
        assert np.array_equal(ignored[:height, :width].numpy(), example.segmentation == 0)


@pytest.mark.parametrize("size", [(4, 40), (3, 64), (1, 32)])
def test_the_rows_of_a_flat_image_are_not_taken_for_channels(size):
    example = {
        "image": np.arange(3 * size[0] * size[1], dtype=np.uint8).reshape(*size, 3),
        "segmentation": np.ones(size, dtype=np.int32),
        "segments_info": [{"id": 1, "category_id": 2, "isthing": True, "iscrowd": 0, "area": size[0] * size[1]}],
        "image_id": 1,
    }
    plain = Mask2FormerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    batch = SegmentationCollator(plain)([example])
    rows, columns = size
    assert batch["pixel_values"].shape == (1, 3, 32, -(-columns // 32) * 32)
    assert np.array_equal(batch["pixel_values"][0, :, :rows, :columns].permute(1, 2, 0), example["image"])
    assert batch["mask_labels"][0].sum() == rows * columns

    class Model(torch.nn.Module):
        config = tiny_config("resnet", id2label=ID2LABEL, num_labels=5, task="semantic")

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values, pixel_mask):
            assert pixel_mask.sum() == rows * columns
            classes = torch.full((1, 1, 6), -20.0)
            classes[..., 2] = 20
            return SimpleNamespace(
                class_queries_logits=classes,
                masks_queries_logits=torch.ones(1, 1, *pixel_values.shape[2:]),
                image_sizes=torch.tensor([size]),
                canvas_sizes=torch.tensor([pixel_values.shape[2:]]),
            )

    data = [example]
    figures = headline(evaluate(Model(), plain, data, metrics=["miou"], progress=False))
    assert figures["miou"] == 1.0


class Oracle(torch.nn.Module):
    """Stands in for a model that knows the truth: one query per segment."""

    def __init__(self, examples):
        super().__init__()
        self.config = tiny_config("resnet", id2label=ID2LABEL, num_labels=5, stuff_label_ids=list(STUFF_LABEL_IDS))
        self.examples, self.weight = iter(examples), torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values, pixel_mask):
        classes = torch.full((len(pixel_values), 12, 6), -20.0)
        masks = torch.full((len(pixel_values), 12, *pixel_values.shape[2:]), -20.0)
        classes[..., 5] = 0
        for b, example in zip(range(len(pixel_values)), self.examples, strict=False):
            for q, segment in enumerate(example.segments):
                classes[b, q, segment["category_id"]] = 20
                masks[b, q][torch.from_numpy(example.segmentation == segment["id"])] = 20
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def test_the_truth_itself_has_panoptic_quality_1():
    examples = [ScenesDataset(5, size=64)[i] for i in range(5)]
    model, seen = Oracle(examples), []
    processor = Mask2FormerImageProcessor(do_resize=False)
    summary = evaluate(
        model,
        processor,
        examples,
        metrics=["pq", "ap", "box_ap", "miou"],
        batch_size=2,
        on_result=lambda *pair: seen.append(pair),
        progress=False,
    )
    figures = headline(summary)
    assert len(seen) == 5 and set(seen[0][1]) == {"panoptic", "instance", "semantic"}
    assert figures["pq"] == figures["miou"] == 1.0
    assert figures["ap"] == pytest.approx(1.0) and figures["box_ap"] == pytest.approx(1.0)


def test_evaluation_leaves_the_model_in_its_mode():
    model = Mask2FormerForUniversalSegmentation(tiny_config("resnet", stuff_label_ids=[3, 4])).train()
    examples = [ScenesDataset(2, size=64)[i] for i in range(2)]
    evaluate(model, Mask2FormerImageProcessor(do_resize=False), examples, metrics=["pq"], progress=False)
    assert model.training


def example(layers, segments, size=(8, 12)):
    info = [{"id": number, "category_id": label, "iscrowd": crowd} for number, label, crowd in segments]
    return {
        "image": np.zeros((*size, 3), np.uint8),
        "segmentation": np.asarray(layers, np.int32),
        "segments_info": info,
    }


def test_layers_crowds_background_and_empty_segments_become_targets():
    layers = np.full((2, 8, 12), -1)
    layers[0, :4, :4] = 1
    layers[1, 2:6, 2:6] = 2  # overlaps 1
    layers[0, 4:8, 4:12] = 3  # a crowd behind 2
    batch = SegmentationCollator(Mask2FormerImageProcessor(), resize=False)(
        [example(layers, [(1, 0, 0), (2, 4, 0), (3, 1, 1), (9, 2, 0)])]
    )
    assert batch["class_labels"][0].tolist() == [0, 4, 2]
    masks = batch["mask_labels"][0]
    assert masks.flatten(1).sum(1).tolist() == [16, 16, 0]
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[4:8, 4:12] = True
    expected[4:6, 4:6] = False
    assert torch.equal(batch["ignore_masks"][0], expected)


def test_without_ignored_pixels_there_is_no_ignore_mask():
    batch = SegmentationCollator(Mask2FormerImageProcessor(), resize=False)([example(np.full((8, 12), -1), [])])
    assert "ignore_masks" not in batch and batch["mask_labels"][0].shape == (0, 32, 32)


def test_maps_that_do_not_fit_are_refused():
    collate = SegmentationCollator(Mask2FormerImageProcessor(), resize=False)
    with pytest.raises(ValueError, match="an example: the image is 8 x 12 .* and its annotation 8 x 11"):
        collate([example(np.zeros((8, 11)), [])])
    with pytest.raises(ValueError, match=r"has the ids \[5\]"):
        collate([example(np.full((8, 12), 5), [])])


def test_a_dataset_with_other_classes_is_refused():
    model = Mask2FormerForUniversalSegmentation(tiny_config("resnet", stuff_label_ids=[3, 4]))
    dataset = ScenesDataset(1, size=64)
    dataset.classes = SimpleNamespace(id2label={0: "LABEL_0", 1: "car"})
    with pytest.raises(
        ValueError, match="2 classes and the model 5.*in the data: 'car'; only in the model: 'LABEL_1'"
    ):
        evaluate(model, Mask2FormerImageProcessor(do_resize=False), dataset, metrics=["pq"])
