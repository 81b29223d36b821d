"""From a checkpoint of another implementation to our model, and back to the original's file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.modeling_mask2former import Mask2FormerForSegmentation, Mask2FormerForUniversalSegmentation
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation
from . import dinov3, maskformer, mmdetection
from .architecture import Architecture, Settings, infer_architecture, make_config
from .checkpoint_files import Checkpoint
from .names import CheckpointError, listed
from .original import convert_state_dict, restore_state_dict

UNUSED = "model.pixel_level_module.encoder.swin.layernorm."  # transformers' SwinBackbone has it and does not use it
ABLATIONS = ("masked_attention", "attended_stride", "self_attention_first", "learned_query_features")
CHECK_SIZE = (128, 160)  # height and width of the image that a converted model is tried on


@dataclass
class Source:
    """A checkpoint that was read and understood, before it becomes a model.

    Args:
        kind: "original", "mmdetection", "dinov3" or "transformers' MaskFormer".
        state: its tensors under the original's names.
        architecture: what they show.
        notes: what was assumed.
        translated: tensors that the original has no name for, under ours.
        fields: what the config says besides the architecture.
        processor: fields of the image processor.
    """

    kind: str
    state: dict[str, Tensor]
    architecture: Architecture
    notes: list[str]
    translated: dict[str, Tensor] = field(default_factory=dict)
    fields: dict = field(default_factory=dict)
    processor: dict = field(default_factory=dict)


def recognise_source(checkpoint: Checkpoint, vit: str | os.PathLike | None = None) -> Source:
    """Recognise a checkpoint by its names and bring them to those of the original.

    Args:
        vit: folder, Hub id or file of the ViT, which DINOv3's segmentor needs.

    Raises:
        CheckpointError: for a checkpoint of something else, and for names that no table has.
    """
    names = list(checkpoint.tensors)
    if dinov3.is_segmentor(names):
        return _dinov3(checkpoint, vit)
    if vit is not None:
        raise CheckpointError(f"--vit {vit}: only DINOv3's head has its backbone in another file; leave it out")
    if any(".injector." in name for name in names):
        raise CheckpointError(
            "a ViT-Adapter with injectors, such as DINOv2's segmentor: they change the ViT's tokens between its "
            "blocks, which no backbone of transformers can do; of ViTs only DINOv3's segmentor is converted"
        )
    if any(name.startswith(maskformer.MARK) for name in names):
        return _maskformer(checkpoint)
    if any(name.startswith("model.pixel_level_module.") for name in names):
        raise CheckpointError("the tensors already have transformers' names: load the folder with from_pretrained")
    if any(name.startswith("panoptic_head.") for name in names):
        kind, state = "mmdetection", mmdetection.to_original(checkpoint.tensors)
    elif any(name.startswith("sem_seg_head.") for name in names):
        kind, state = "original", dict(checkpoint.tensors)
    else:
        raise CheckpointError(
            "neither facebookresearch/Mask2Former (names with sem_seg_head.) nor mmdetection (panoptic_head.) nor "
            f"DINOv3 (segmentation_model.): the tensors are {listed(names, 6)}"
        )
    architecture = infer_architecture(state)
    notes = []
    if architecture.backbone["model_type"] == "resnet" and kind == "mmdetection":
        architecture.assumed["freeze_batch_norm"] = True  # requires_grad=False and norm_eval=True in its configs
    of_masks = architecture.config["head_type"] == "masks"
    if kind == "original" and of_masks and "criterion.empty_weight" not in state:
        notes.append("criterion.empty_weight is not in the file; made anew from no_object_weight")
    return Source(kind, state, architecture, notes)


def _maskformer(checkpoint: Checkpoint) -> Source:
    if "config" not in checkpoint.rest:
        raise CheckpointError("tensors of transformers' MaskFormer without its config.json: give the folder or Hub id")
    place = checkpoint.rest["place"]
    known = {"-ade": "semantic", "-coco": "panoptic"}  # facebook/maskformer-swin-base-ade and alike
    task = next((task for end, task in known.items() if place.rstrip("/").endswith(end)), None)
    notes = [] if task else ["what it was trained for is not in a MaskFormer's config: set task in config.json"]
    return Source(
        "transformers' MaskFormer",
        {},
        maskformer.architecture_of(checkpoint.rest["config"]),
        notes,
        maskformer.translate(checkpoint.tensors),
        {"task": task},
        maskformer.processor_fields(checkpoint.rest["processor"]),
    )


def _dinov3(checkpoint: Checkpoint, vit: str | os.PathLike | None) -> Source:
    if vit is None:
        raise CheckpointError(
            "the head of DINOv3's segmentor without its ViT: add --vit with the folder of that ViT for transformers, "
            "or Meta's file of it (for the released head dinov3_vit7b16)"
        )
    config, translated = dinov3.read_vit(vit)
    translated |= dinov3.adapter_to_ours(checkpoint.tensors)
    fields = {"model_type": config.model_type} | config.to_diff_dict() | {"out_features": list(config.out_features)}
    fields.pop("out_indices", None)
    architecture = infer_architecture(state := dinov3.head_to_original(checkpoint.tensors), fields)
    notes = [
        "the weights are under Meta's DINOv3 License, and so is what is made of them: pass them on only under that "
        "licence and with its text; the model card says so"
    ]
    return Source(
        "dinov3",
        state,
        architecture,
        notes,
        translated,
        {"task": "semantic", "sliding_window": dinov3.SLIDING_WINDOW, "weights_license": dinov3.LICENCE},
        {"size": dinov3.TEST_SIZE},
    )


def assumptions(source: Source, settings: Settings | None) -> str | None:
    """A line about the fields that neither the tensors nor the settings show; `None` if there are none."""
    architecture = source.architecture
    known = architecture.config | architecture.backbone
    if settings is not None:
        known = known | settings.config | settings.backbone
    assumed = architecture.assumed | architecture.assumed_backbone
    listing = ", ".join(f"{name} = {value}" for name, value in assumed.items() if name not in known)
    return f"not visible in tensors and assumed, as in all recipes of the original: {listing}" if listing else None


def build_model(
    source: Source,
    settings: Settings | None = None,
    labels: Mapping[int, str] | None = None,
    stuff: list[int] | None = None,
) -> Mask2FormerForSegmentation:
    """Our model, of clips if the settings say so, with every tensor of the checkpoint, in evaluation mode.

    Args:
        source, settings, labels, stuff: see `make_config`.

    Raises:
        CheckpointError: listing tensors that are unknown, missing, or of another shape than the configuration's.
    """
    config = make_config(source.architecture, settings, labels, stuff)
    for name, value in source.fields.items():
        setattr(config, name, value)
    converted = convert_state_dict(source.state) | source.translated
    of_clips = settings is not None and settings.video
    kind = Mask2FormerForVideoSegmentation if of_clips else Mask2FormerForUniversalSegmentation
    try:
        model = kind(config).eval()
    except ValueError as error:
        raise CheckpointError(f"no model has the configuration of this checkpoint: {error}") from error
    expected = file_state_dict(model)
    if "criterion.empty_weight" in expected:
        converted.setdefault("criterion.empty_weight", empty_weight(config))
    problems = {
        "missing": [n for n in expected if n not in converted and not n.startswith(UNUSED)],
        "left over": [n for n in converted if n not in expected],
        "of another shape": [
            f"{n} {tuple(tensor.shape)}, not {tuple(expected[n].shape)}"
            for n, tensor in converted.items()
            if n in expected and tensor.shape != expected[n].shape
        ],
        "not finite": [n for n, tensor in converted.items() if not tensor.isfinite().all()],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"the tensors do not fill the model (names as in transformers' files). {found}")
    model.load_state_dict(converted, strict=False)  # all but UNUSED, checked above
    return model


def empty_weight(config: Mask2FormerConfig) -> Tensor:
    weight = torch.ones(config.num_labels + 1)
    weight[-1] = config.no_object_weight
    return weight


def file_state_dict(model: Mask2FormerForSegmentation) -> dict[str, Tensor]:
    """The model's tensors under the names that they get in a file."""
    return revert_weight_conversion(model, model.state_dict())


def to_original(model: Mask2FormerForSegmentation) -> dict[str, Tensor]:
    """The model's tensors under the original's names, for `write_original`; exact, nothing is recomputed in floats.

    Raises:
        CheckpointError: listing tensors that the original has no counterpart for.
    """
    without = [name for name in ABLATIONS if getattr(model.config, name) != getattr(Mask2FormerConfig, name)]
    if without:
        raise CheckpointError(f"the original has no switch for {listed(without)}: its code would run another model")
    return restore_state_dict(file_state_dict(model), frozen_batch_norm=model.config.freeze_batch_norm)


@torch.no_grad()
def check_numbers(model: Mask2FormerForSegmentation, seed: int = 0) -> str:
    """Run the model on a seeded random image, or a clip of two; returns a line for the user.

    Raises:
        CheckpointError: if an output is not finite or has another shape than the configuration says.
    """
    height, width = CHECK_SIZE
    frames = (2,) if isinstance(model, Mask2FormerForVideoSegmentation) else ()
    pixels = torch.randn(1, *frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
    output = model(pixels)
    stride, config = model.config.common_stride, model.config
    expected = {
        "class_queries_logits": (1, config.num_queries, config.num_labels + 1),
        "masks_queries_logits": (1, config.num_queries, *frames, height // stride, width // stride),
    }
    for name, shape in expected.items():
        if tuple(output[name].shape) != shape or not output[name].isfinite().all():
            raise CheckpointError(f"{name} of the converted model is {tuple(output[name].shape)} or not finite")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    ranges = [
        f"{kind} logits {tuple(x.shape)} in [{x.min():.3f}, {x.max():.3f}]"
        for kind, x in (("class", output.class_queries_logits), ("mask", output.masks_queries_logits))
    ]
    subject = f"{height}x{width} {'clip' if frames else 'image'}"
    return f"Checked on a random {subject}: {millions:.2f} M parameters; {', '.join(ranges)}, all finite"
