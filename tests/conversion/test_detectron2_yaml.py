"""Settings of detectron2's yaml files, which run nothing."""

import pytest

from mask2former_hf.conversion.detectron2_config import settings_from_yaml
from mask2former_hf.conversion.names import CheckpointError


def test_a_yaml_is_read_over_its_bases_and_runs_nothing(tmp_path):
    victim = tmp_path / "victim"
    (tmp_path / "swin").mkdir()
    (tmp_path / "Base.yaml").write_text(
        f"""
MODEL:
  BACKBONE: {{NAME: "build_resnet_backbone", FREEZE_AT: 0}}
  RESNETS: {{DEPTH: 50, STRIDE_IN_1X1: False}}
DATASETS:
  TEST: ("cityscapes_fine_panoptic_val",)
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["open('{victim}', 'w')"]
  MIN_SIZE_TEST: 1024
  MAX_SIZE_TEST: 2048
  FORMAT: "RGB"
"""
    )
    (tmp_path / "r50.yaml").write_text(
        """
_BASE_: Base.yaml
MODEL:
  SEM_SEG_HEAD: {PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder", NUM_CLASSES: 19, IGNORE_VALUE: 255}
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "MultiScaleMaskedTransformerDecoder"
    NUM_OBJECT_QUERIES: 100
    TEST: {PANOPTIC_ON: True, INSTANCE_ON: True, OBJECT_MASK_THRESHOLD: 0.0, OVERLAP_THRESHOLD: 0.8}
"""
    )
    (tmp_path / "swin" / "tiny.yaml").write_text(
        """
_BASE_: ../r50.yaml
MODEL:
  BACKBONE: {NAME: "D2SwinTransformer"}
  SWIN: {EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24], WINDOW_SIZE: 7, DROP_PATH_RATE: 0.3}
  MASK_FORMER: {NUM_OBJECT_QUERIES: 200, PRE_NORM: True}
"""
    )
    settings = settings_from_yaml(tmp_path / "swin" / "tiny.yaml")
    assert (settings.processor["object_mask_threshold"], settings.processor["overlap_threshold"]) == (0.0, 0.8)
    assert settings.config == {
        "num_labels": 19, "ignore_value": 255, "num_queries": 200, "pre_norm": True, "task": "panoptic",
        "pixel_decoder_type": "deformable", "decoder_type": "masked", "head_type": "masks",
    }  # fmt: skip
    assert settings.backbone == {
        "model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
        "drop_path_rate": 0.3, "image_size": 224,
    }  # fmt: skip
    assert settings.processor["size"] == {"shortest_edge": 1024, "longest_edge": 2048}
    assert settings.class_set == "cityscapes-panoptic"
    resnet = settings_from_yaml(tmp_path / "r50.yaml")
    assert resnet.config["freeze_batch_norm"] is True and resnet.backbone["depths"] == [3, 4, 6, 3]
    assert not victim.exists()
    (tmp_path / "Base.yaml").unlink()
    with pytest.raises(CheckpointError, match="Base.yaml does not exist: it is the _BASE_ of r50.yaml"):
        settings_from_yaml(tmp_path / "swin" / "tiny.yaml")


YAML = """
MODEL:
  SEM_SEG_HEAD: {PIXEL_DECODER_NAME: MSDeformAttnPixelDecoder}
  MASK_FORMER: {TRANSFORMER_DECODER_NAME: MultiScaleMaskedTransformerDecoder}
"""


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "is not yaml"),
        ("just words", "contains no settings"),
        ("_BASE_: x.yaml", "leads back to the file itself"),
        ("MODEL: 3", "a value is not of the kind"),
        (YAML + "INPUT: {MIN_SIZE_TEST: wide}", "a value is not of the kind"),
        (YAML + "DATASETS: [3]", "a value is not of the kind"),
        ("MODEL: {SEM_SEG_HEAD: {PIXEL_DECODER_NAME: FaPN}}", "'FaPN'; what is converted is .*BasePixelDecoder"),
    ],
)
def test_a_yaml_of_something_else_is_refused(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        settings_from_yaml(tmp_path / "x.yaml")
