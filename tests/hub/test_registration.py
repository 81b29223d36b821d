"""register(): which class the Auto classes and pipeline give, and that unregister() leaves nothing behind."""

import json

import pytest
import transformers
from helpers import tiny_config, tiny_model
from processes import python
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import (  # at the top, 5.17 wants torchvision
    IMAGE_PROCESSOR_MAPPING,
    AutoImageProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.pipelines import PIPELINE_REGISTRY

from mask2former_hf import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerModel,
)
from mask2former_hf.hub.registration import register, unregister

MAPPINGS = (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    MODEL_FOR_IMAGE_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    IMAGE_PROCESSOR_MAPPING,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A stock checkpoint, without any field of ours."""
    folder = tmp_path_factory.mktemp("stock")
    tiny_model("resnet").save_pretrained(folder)
    stock = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder)
    stock.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


@pytest.fixture
def registered():
    register()
    yield
    unregister()


def state():
    return [dict(mapping._extra_content) for mapping in MAPPINGS], dict(PIPELINE_REGISTRY.supported_tasks)


def test_auto_classes_give_this_implementation(registered, checkpoint):
    assert type(AutoConfig.from_pretrained(checkpoint)) is Mask2FormerConfig
    assert type(AutoModel.from_pretrained(checkpoint)) is Mask2FormerModel
    for auto in (AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
        assert type(auto.from_pretrained(checkpoint)) is Mask2FormerForUniversalSegmentation
        assert type(auto.from_config(tiny_config("resnet"))) is Mask2FormerForUniversalSegmentation
    for options in ({}, {"backend": "pil"}):
        assert type(AutoImageProcessor.from_pretrained(checkpoint, **options)) is Mask2FormerImageProcessor


def test_pipeline_gives_this_implementation(registered, checkpoint):
    pipe = pipeline("image-segmentation", model=str(checkpoint))
    assert type(pipe.model) is Mask2FormerForUniversalSegmentation
    assert type(pipe.image_processor) is Mask2FormerImageProcessor


@pytest.mark.parametrize(
    "fields",
    [
        {"image_processor_type": "MaskFormerImageProcessor"},
        {"image_processor_type": "Mask2FormerImageProcessorFast"},
        {"feature_extractor_type": "Mask2FormerFeatureExtractor"},
        {"feature_extractor_type": "MaskFormerFeatureExtractor"},
    ],
)
def test_processors_of_older_names_are_ours(registered, checkpoint, tmp_path, fields):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((checkpoint / name).read_text())
    given = json.loads((tmp_path / "preprocessor_config.json").read_text())
    given.pop("image_processor_type")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given | fields))
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is Mask2FormerImageProcessor


def test_maskformer_keeps_its_own_processor(registered, tmp_path):
    given = transformers.MaskFormerImageProcessor(size={"shortest_edge": 70, "longest_edge": 90})
    given.save_pretrained(tmp_path)
    transformers.MaskFormerConfig().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(given) and processor.size == given.size
    (tmp_path / "config.json").unlink()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is type(given)


def test_stock_classes_and_other_models_stay(registered, checkpoint):
    stock = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint)
    assert type(stock.config).__module__.startswith("transformers.")
    again = AutoModelForUniversalSegmentation.from_config(stock.config)
    assert type(again).__module__.startswith("transformers.")
    assert type(AutoConfig.for_model("resnet")) is transformers.ResNetConfig
    detr = pipeline("image-segmentation", model=stock, image_processor=Mask2FormerImageProcessor())
    assert type(detr) is transformers.ImageSegmentationPipeline


def test_unregister_restores_everything(checkpoint):
    before = state()
    register()
    register()
    assert state() != before
    unregister()
    assert state() == before
    unregister()
    assert state() == before
    assert type(AutoConfig.from_pretrained(checkpoint)) is transformers.Mask2FormerConfig
    pipe = pipeline("image-segmentation", model=str(checkpoint))
    assert type(pipe) is transformers.ImageSegmentationPipeline
    assert type(pipe.model) is transformers.Mask2FormerForUniversalSegmentation


def test_unregister_restores_what_a_user_had_registered():
    class Mine(Mask2FormerConfig):
        pass

    AutoConfig.register("mask2former", Mine, exist_ok=True)
    try:
        register()
        assert CONFIG_MAPPING["mask2former"] is Mask2FormerConfig
        unregister()
        assert CONFIG_MAPPING["mask2former"] is Mine
        register()
        AutoConfig.register("mask2former", Mine, exist_ok=True)  # over ours
        unregister()
        assert CONFIG_MAPPING["mask2former"] is Mine
    finally:
        del CONFIG_MAPPING._extra_content["mask2former"]


def test_importing_the_module_registers_nothing():
    code = """
import mask2former_hf.hub.registration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
pipeline = PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"]
print(CONFIG_MAPPING["mask2former"].__module__.split(".")[0], getattr(pipeline, "__name__", pipeline).split(".")[-1])
"""
    assert python("-c", code).stdout.split() == ["transformers", "ImageSegmentationPipeline"]
