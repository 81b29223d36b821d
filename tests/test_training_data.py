"""From annotated examples to a batch, and from a batch to figures."""

import numpy as np
import torch
from helpers import tiny_config

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS, ScenesDataset
from mask2former_hf.training.collation import PanopticCollator
from mask2former_hf.training.evaluation import evaluate_panoptic


def test_row_1_a_mixed_size_batch_has_masks_padded_with_0_and_void_ignored():
    examples = [ScenesDataset(2, size=size)[1] for size in ((64, 96), (96, 64))]
    examples[0]["segmentation"][:10] = 0
    ids = set(np.unique(examples[0]["segmentation"]).tolist())
    examples[0]["segments_info"] = [s for s in examples[0]["segments_info"] if s["id"] in ids]
    batch = PanopticCollator(Mask2FormerImageProcessor(do_resize=False))(examples)
    assert batch["pixel_values"].shape == (2, 3, 96, 96)
    for example, masks, labels, ignored in zip(
        examples, batch["mask_labels"], batch["class_labels"], batch["ignore_masks"], strict=True
    ):
        height, width = example["segmentation"].shape
        assert masks.dtype == torch.uint8 and masks.max() == 1
        assert masks[:, height:].sum() == masks[:, :, width:].sum() == 0
        truth = {s["id"]: s["category_id"] for s in example["segments_info"]}
        for number, mask, label in zip(sorted(truth), masks, labels.tolist(), strict=True):
            assert np.array_equal(mask[:height, :width].numpy() == 1, example["segmentation"] == number)
            assert label == truth[number]
        assert np.array_equal(ignored[:height, :width].numpy(), example["segmentation"] == 0)


class Oracle(torch.nn.Module):
    """Stands in for a model that knows the truth: one query per segment."""

    def __init__(self, examples):
        super().__init__()
        self.config = tiny_config("resnet", id2label=ID2LABEL, num_labels=5, stuff_label_ids=list(STUFF_LABEL_IDS))
        self.examples, self.device = iter(examples), torch.device("cpu")

    def forward(self, pixel_values, pixel_mask):
        from types import SimpleNamespace

        classes = torch.full((len(pixel_values), 12, 6), -20.0)
        masks = torch.full((len(pixel_values), 12, *pixel_values.shape[2:]), -20.0)
        classes[..., 5] = 0
        for b, example in zip(range(len(pixel_values)), self.examples, strict=False):
            for q, segment in enumerate(example["segments_info"]):
                classes[b, q, segment["category_id"]] = 20
                masks[b, q][torch.from_numpy(example["segmentation"] == segment["id"])] = 20
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)


def test_the_truth_itself_has_panoptic_quality_1():
    examples = [ScenesDataset(5, size=64)[i] for i in range(5)]
    model, seen = Oracle(examples), []
    processor = Mask2FormerImageProcessor(do_resize=False)
    summary = evaluate_panoptic(
        model, processor, examples, batch_size=2, on_result=lambda *pair: seen.append(pair), progress=False
    )
    assert summary["all"]["pq"] == 1.0 and len(seen) == 5


def test_evaluation_leaves_the_model_in_its_mode():
    model = Mask2FormerForUniversalSegmentation(tiny_config("resnet", stuff_label_ids=[3, 4])).train()
    examples = [ScenesDataset(2, size=64)[i] for i in range(2)]
    evaluate_panoptic(model, Mask2FormerImageProcessor(do_resize=False), examples, progress=False)
    assert model.training
