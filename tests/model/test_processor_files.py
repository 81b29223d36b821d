"""The processor's file: what transformers writes and reads, and older spellings."""

import json

import pytest
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top, 5.17 wants torchvision
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil as StockProcessor,
)

from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor

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
