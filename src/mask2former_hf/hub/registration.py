"""Make transformers' Auto classes and `pipeline` use this implementation, and undo it."""

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_SEGMENTATION_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.pipelines import PIPELINE_REGISTRY

from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation, Mask2FormerModel
from .segmentation_pipeline import Mask2FormerSegmentationPipeline

TASK = "image-segmentation"
_STAND_INS = (
    # some published Mask2Former checkpoints name MaskFormer's processor, as all of MaskFormer's own do
    {"torchvision": "MaskFormerImageProcessor", "pil": "MaskFormerImageProcessorPil"},
    # the name that transformers 5.17 makes of Mask2FormerImageProcessor where torchvision is missing
    {"pil": "Mask2FormerImageProcessorPil"},
)
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_MISSING = object()
_changes = []  # (dict, key, value before, our value) of what is registered now; empty if nothing is


def register():
    """From now on every Mask2Former checkpoint is this implementation, whoever loads it in this process.

    It holds for `AutoConfig`, `AutoModel`, `AutoModelForUniversalSegmentation`, `AutoModelForImageSegmentation`,
    `AutoImageProcessor` and `pipeline("image-segmentation")`. transformers' own classes, loaded by name, and all other
    models stay as they are. A second call changes nothing; `unregister` undoes it.
    """
    if _changes:
        return
    config = Mask2FormerConfig
    _set(CONFIG_MAPPING._extra_content, config.model_type, config)
    _set(MODEL_MAPPING._extra_content, config, Mask2FormerModel)
    # pipeline() asks the second one and never the first: without it the pipeline silently runs stock's model
    for mapping in (MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, MODEL_FOR_IMAGE_SEGMENTATION_MAPPING):
        _set(mapping._extra_content, config, Mask2FormerForUniversalSegmentation)
    classes = dict.fromkeys(("torchvision", "pil"), Mask2FormerImageProcessor)
    _set(IMAGE_PROCESSOR_MAPPING._extra_content, config, classes)
    for names in _STAND_INS:
        stand_ins = {backend: _stand_in(name) for backend, name in names.items()}
        _set(IMAGE_PROCESSOR_MAPPING._extra_content, stand_ins["pil"], stand_ins)  # found by name, so any key will do
    tasks = PIPELINE_REGISTRY.supported_tasks
    _set(tasks, TASK, {**tasks[TASK], "impl": Mask2FormerSegmentationPipeline})


def unregister():
    """Undo `register`; objects that exist stay what they are. Without `register` it does nothing.

    What was registered over ours since then is left alone.
    """
    while _changes:
        table, key, before, ours = _changes.pop()
        if table.get(key, _MISSING) is not ours:
            continue
        if before is _MISSING:
            del table[key]
        else:
            table[key] = before


def _set(table: dict, key, value):
    """transformers has no public way to take a registration back, so its tables are written and restored directly."""
    _changes.append((table, key, table.get(key, _MISSING), value))
    table[key] = value


def _stand_in(name: str) -> type:
    """A class called `name` whose `from_pretrained` gives our processor for Mask2Former, else transformers'."""

    def from_pretrained(cls, checkpoint, *args, **kwargs):
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        try:
            fields, _ = PreTrainedConfig.get_config_dict(checkpoint, **hub)
        except (OSError, ValueError):  # a processor without a model beside it
            fields = {}
        ours = fields.get("model_type") == Mask2FormerConfig.model_type
        chosen = Mask2FormerImageProcessor if ours else getattr(transformers, name)
        return chosen.from_pretrained(checkpoint, *args, **kwargs)

    return type(name, (), {"from_pretrained": classmethod(from_pretrained), "__module__": __name__})
