"""Mask2Former for the Hugging Face ecosystem: the paper's results, fast, in transformers' file format."""

import importlib

__version__ = "0.1.0"

# Public name -> module. Modules load on first use, so that importing the package imports no torch.
_EXPORTS = {
    "Mask2FormerConfig": "model.configuration_mask2former",
    "Mask2FormerForUniversalSegmentation": "model.modeling_mask2former",
    "Mask2FormerImageProcessor": "model.image_processing_mask2former",
    "Mask2FormerModel": "model.modeling_mask2former",
    "Mask2FormerPreTrainedModel": "model.modeling_mask2former",
    "Segment": "inference.segmentation",
    "Segmentation": "inference.segmentation",
    "Segmenter": "inference.segmenter",
    "Mask2FormerTrainer": "training.trainer",
    "Mask2FormerTrainingArguments": "training.trainer",
    "TrainingRun": "training.run",
    "TrainingSettings": "training.settings",
    "new_model": "training.backbones",
    "push_to_hub": "hub.publishing",
    "register": "hub.registration",
    "resize_queries": "training.label_surgery",
    "save_with_code": "hub.remote_code",
    "set_labels": "training.label_surgery",
    "unregister": "hub.registration",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *_EXPORTS])
