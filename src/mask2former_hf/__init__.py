"""Mask2Former for the Hugging Face ecosystem: the paper's results, fast, in transformers' file format."""

import importlib

__version__ = "0.1.0"

# Public name -> module. Modules load on first use, so that importing the package imports no torch.
_EXPORTS = {
    "AugmentedDataset": "data.augmentation",
    "augmentation_for": "data.augmentation",
    "ClassTable": "data.classes",
    "CocoInstances": "data.coco",
    "CocoPanoptic": "data.coco",
    "Example": "data.example",
    "InstanceMaps": "data.folders",
    "LabelMaps": "data.folders",
    "HubDataset": "data.hub_dataset",
    "HubStream": "data.hub_dataset",
    "Reader": "data.reader",
    "ClipDataset": "data.clips",
    "ClipRecipe": "data.clips",
    "DavisFolders": "data.videos",
    "MovingScenes": "data.moving_scenes",
    "YoutubeVis": "data.videos",
    "Scenes": "data.scenes",
    "ScenesDataset": "data.scenes",
    "SegmentationEvaluator": "evaluation.evaluator",
    "evaluate": "evaluation.evaluator",
    "evaluation_loader": "evaluation.evaluator",
    "examine_checkpoint": "evaluation.doctor",
    "headline": "evaluation.evaluator",
    "merge_processes": "evaluation.evaluator",
    "run_evaluation": "evaluation.evaluator",
    "write_evaluation": "evaluation.report",
    "export_model": "export.exporting",
    "push_to_hub": "hub.publishing",
    "register": "hub.registration",
    "unregister": "hub.registration",
    "save_with_code": "hub.remote_code",
    "make_page": "inference.page",
    "Segment": "inference.segmentation",
    "Segmentation": "inference.segmentation",
    "Segmenter": "inference.segmenter",
    "VideoSegmenter": "inference.video_segmenter",
    "use_kernel": "kernels.choosing",
    "Mask2FormerConfig": "model.configuration_mask2former",
    "LossSettings": "model.criterion",
    "Mask2FormerLoss": "model.criterion",
    "loss_normalizers": "model.criterion",
    "Mask2FormerImageProcessor": "model.image_processing_mask2former",
    "Mask2FormerForUniversalSegmentation": "model.modeling_mask2former",
    "Mask2FormerModel": "model.modeling_mask2former",
    "Mask2FormerForVideoSegmentation": "model.modeling_mask2former_video",
    "Mask2FormerVideoModel": "model.modeling_mask2former_video",
    "Mask2FormerVideoProcessor": "model.video_processing_mask2former",
    "Mask2FormerPreTrainedModel": "model.modeling_mask2former",
    "MaskAnnealing": "training.annealing",
    "anneal_masks": "training.annealing",
    "masked_shares": "training.annealing",
    "new_model": "training.backbones",
    "SegmentationCollator": "training.collation",
    "processor_for": "training.collation",
    "Distillation": "training.distillation",
    "set_epoch": "training.epochs",
    "model_for_classes": "training.label_surgery",
    "resize_queries": "training.label_surgery",
    "set_labels": "training.label_surgery",
    "with_channels": "training.inflation",
    "match_gradient_strides": "training.optimization",
    "parameter_groups": "training.optimization",
    "process_group": "evaluation.processes",
    "polynomial_schedule": "training.optimization",
    "FROM_PRETRAINED": "training.optimization",
    "FROM_RANDOM": "training.optimization",
    "WEIGHT_DECAY": "training.optimization",
    "loss_weights": "model.mask_losses",
    "TrainingRun": "training.run",
    "TrainingSettings": "training.settings",
    "Mask2FormerTrainer": "training.trainer",
    "Mask2FormerTrainingArguments": "training.trainer",
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
