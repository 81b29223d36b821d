"""Model, processor and augmentation of a training run, from a checkpoint, a backbone's name or a recipe."""

from collections.abc import Sequence

import torch
from transformers import CONFIG_MAPPING, AutoBackbone, AutoConfig, ResNetConfig, SwinConfig

from .. import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from ..data.augmentation import Pipeline, by_name, instance_lsj, panoptic_lsj
from ..data.classes import ClassTable, count_ids
from .label_surgery import resize_queries, set_labels
from .recipes import Recipe

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SWIN = {  # embed_dim, depths, heads (Liu et al., "Swin Transformer", ICCV 2021, section 3.3)
    "swin-t": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin-s": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin-b": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "swin-l": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
RESNET = {"r50": [3, 4, 6, 3], "r101": [3, 4, 23, 3]}
TINY = "tiny"
BACKBONES = (TINY, *RESNET, *SWIN)
TINY_FIELDS = {
    "feature_size": 64,
    "mask_feature_size": 64,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 256,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "dim_feedforward": 512,
    "num_queries": 20,
    "train_num_points": 512,
}


def backbone_config(name: str):
    """Config of a backbone by its short name, one of `BACKBONES`; weights are random."""
    if name == TINY:
        return ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=STAGES,
        )
    if name in RESNET:
        return ResNetConfig(depths=RESNET[name], out_features=STAGES)
    if name in SWIN:
        embed_dim, depths, heads = SWIN[name]
        window = 7 if embed_dim == 96 else 12
        return SwinConfig(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=heads,
            window_size=window,
            image_size=224 if window == 7 else 384,
            drop_path_rate=0.3,
            out_features=STAGES,
        )
    raise ValueError(f"backbone={name!r}: must be one of {', '.join(BACKBONES)}, or a checkpoint's folder or Hub id")


def new_model(backbone: str | Recipe, classes: ClassTable, task: str, **fields) -> Mask2FormerForUniversalSegmentation:
    """A model for these classes with a random head.

    Args:
        backbone: a short name or a recipe (random weights; "tiny" is a model of 1.4 M parameters for a CPU), or the
            folder or Hub id of a pretrained backbone with four stages, whose weights are loaded.
        fields: of `Mask2FormerConfig`.
    """
    pretrained = None
    if isinstance(backbone, Recipe):
        described = backbone.backbone_fields()
        config = CONFIG_MAPPING[described.pop("model_type")](**described, out_features=STAGES)
    elif backbone in BACKBONES:
        config = backbone_config(backbone)
        fields = (TINY_FIELDS if backbone == TINY else {}) | fields
    else:
        config = AutoConfig.from_pretrained(backbone, out_features=STAGES)
        pretrained = AutoBackbone.from_pretrained(backbone, out_features=STAGES)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=config, task=task, **classes.config_fields(), **fields)
    )
    if pretrained is not None:
        model.model.pixel_level_module.encoder.load_state_dict(pretrained.state_dict())
    return model


def model_for_classes(
    checkpoint: str | Mask2FormerForUniversalSegmentation,
    classes: ClassTable,
    task: str,
    num_queries: int | None = None,
):
    """A checkpoint's model for other classes: a class that it knows by name keeps its row of the classifier.

    Args:
        checkpoint: folder, Hub id, or its model, which is changed.
        num_queries: instead of the checkpoint's; the present ones are kept (`training.label_surgery.resize_queries`).

    Returns:
        The model, and the names of the classes that are new to it.
    """
    model = checkpoint
    if not isinstance(model, Mask2FormerForUniversalSegmentation):
        model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint)
    model.config.task = task
    wanted = classes.config_fields()
    names = list(wanted["id2label"].values())
    if list(model.config.id2label.values()) == names:
        added = []
    else:
        added = set_labels(model, names).added
    for name, value in wanted.items():
        setattr(model.config, name, value)
    if num_queries is not None and num_queries != model.config.num_queries:
        resize_queries(model, num_queries)
    return model, added


def processor_for(classes: ClassTable, shortest_edge: int, longest_edge: int) -> Mask2FormerImageProcessor:
    """An image processor for inference at a size, that knows which labels are stuff."""
    return Mask2FormerImageProcessor(
        size={"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        label_ids_to_fuse=list(classes.stuff_label_ids),
    )


def augmentation_for(task: str, crop: int, kind: str | None = None, short_sides: Sequence[int] = ()) -> Pipeline:
    """The original's augmentation of a kind at another size.

    Args:
        crop: side of the square result in pixels.
        kind: "lsj", large-scale jitter as in its COCO recipes, by default for panoptic and instance data; or
            "resize-crop", short side, random window, colour and mirror image as in its ADE20K recipes, by default for
            semantic data. The jitter shrinks images down to a tenth: resize-crop is better if objects are small.
        short_sides: of "resize-crop" in pixels, equally likely; by default 16 of 0.5 to 2 crops.
    """
    kind = kind or ("resize-crop" if task == "semantic" else "lsj")
    if kind == "lsj":
        return instance_lsj(crop) if task == "instance" else panoptic_lsj(crop)
    sides = list(short_sides) or [round(crop * tenths / 10) for tenths in range(5, 21)]
    parameters = {"short_sides": sides, "max_size": 4 * max(sides), "crop": crop, "pad": crop}
    return by_name(f"mask_former_{task}", parameters)


def scan(dataset, read, most: int = 5000, progress=None) -> dict:
    """Look through the annotations before training.

    Args:
        read: `read(dataset, index)` gives an example; its image is not looked at.
        most: examples looked at, spread evenly.
        progress: wraps the range of indices, for example tqdm.

    Returns:
        `{"examples", "pixels": per class, "segments": {"largest", "mean"}, "empty", "overlapping"}`, the last two
        numbers of examples; segments without crowds.
    """
    step = max(1, len(dataset) // most)
    indices = range(0, len(dataset), step)
    pixels, counts, overlapping = [0] * len(dataset.classes), [], 0
    for index in indices if progress is None else progress(indices):
        example = read(dataset, index)
        targets = {segment["id"]: segment["category_id"] for segment in example.objects}
        counts.append(len(targets))
        overlapping += len(example.layers) > 1
        for number, area in zip(*count_ids(example.segmentation), strict=True):
            if number in targets:
                pixels[targets[number]] += area
    mean = sum(counts) / len(counts)
    return {
        "examples": len(counts),
        "pixels": pixels,
        "segments": {"largest": max(counts), "mean": mean},
        "empty": counts.count(0),
        "overlapping": overlapping,
    }


def parameters_in_millions(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
