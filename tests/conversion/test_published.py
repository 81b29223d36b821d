"""Look-alikes of published checkpoints, as transformers 4 and the conversion scripts of its authors wrote them."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, register, unregister

PREPROCESSOR = {  # fields and values of facebook/mask2former-swin-*'s files
    "do_normalize": True,
    "do_reduce_labels": False,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "MaskFormerFeatureExtractor",
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
    "num_labels": 5,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
}
OLD_FIELDS = {  # of config.json, which no class has any more
    "architectures": ["Mask2FormerForUniversalSegmentation"],
    "feature_strides": [4, 8, 16, 32],
    "backbone": None,
    "use_pretrained_backbone": False,
    "use_timm_backbone": False,
    "backbone_kwargs": None,
    "output_auxiliary_logits": None,
    "torch_dtype": "float32",
    "transformers_version": "4.26.0.dev0",
}


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def published(request, tmp_path):
    """A model, and its checkpoint as it would have been published."""
    model = tiny_model("swin", task=None)
    model.class_predictor.bias.data[:5] += 6
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if ".swin.layernorm." not in name}
    for name in [name for name in tensors if name.endswith("relative_position_bias_table")]:  # a buffer of old Swins
        index = torch.zeros(9, 9, dtype=torch.int64)
        tensors[name.replace("relative_position_bias_table", "relative_position_index")] = index
    if request.param == "pytorch_model.bin":
        torch.save(tensors, tmp_path / request.param)
        path.unlink()
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("task", "stuff_label_ids", "ignore_value", "freeze_batch_norm"):
        config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config | OLD_FIELDS))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return model, tmp_path


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 90, 3), dtype=np.uint8))


def test_a_published_checkpoint_gives_the_outputs_of_its_model_without_a_report(published, caplog, monkeypatch):
    model, folder = published
    monkeypatch.setattr(transformers_logging.get_logger("transformers"), "propagate", True)
    loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("relative_position_index" in name for name in info["unexpected_keys"])
    processor = Mask2FormerImageProcessor.from_pretrained(folder)
    inputs = processor(photo(), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (384, 384) and processor.ignore_index == 255
    with torch.inference_mode():
        expected, found = model(**inputs), loaded(**inputs)
    torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": {"shortest_edge": 480, "longest_edge": 640}, "image_processor_type": "MaskFormerImageProcessor"},
        {"size": 480, "max_size": 640},
        {"size": 480, "_max_size": 640, "image_processor_type": None},
    ],
)
def test_pipeline_takes_it_after_register(published, changes):
    _, folder = published
    fields = {name: value for name, value in (PREPROCESSOR | changes).items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    register()
    try:
        pipe = pipeline("image-segmentation", model=str(folder), device="cpu")
        assert type(pipe.model) is Mask2FormerForUniversalSegmentation
        assert type(pipe.image_processor) is Mask2FormerImageProcessor
        segments = pipe(photo(), subtask="semantic")
        assert segments and all(segment["mask"].size == (90, 120) for segment in segments)
        if changes:
            assert dict(pipe.image_processor.size) == {"shortest_edge": 480, "longest_edge": 640}
    finally:
        unregister()
