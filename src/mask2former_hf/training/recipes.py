"""The original's 59 training recipes as data: what was trained on what, how long, and how it is tested.

Source: the resolved configurations of facebookresearch/Mask2Former at 9b0651c. What all of them share is in
`training.optimization`.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..conversion.architecture import RESNET_DEPTHS
from ..data.augmentation import Pipeline, by_name
from .vit_recipes import vit_recipe, vit_recipe_names


@dataclass(frozen=True)
class Recipe:
    """One training configuration of the original.

    Args:
        name: such as "coco-panoptic-r50" or "cityscapes-instance-swin-l-in21k".
        config: path of the original's yaml under `configs/`, without suffix.
        task: "semantic", "instance" or "panoptic".
        video: trained on clips.
        class_set: as `mask2former_hf.data.classes.ClassTable.load` takes it.
        num_labels, ignore_value, num_queries: fields of `Mask2FormerConfig`.
        backbone: {"type": "resnet", "depth", "norm"} or {"type": "swin", "embed_dim", "depths", "num_heads",
            "window_size", "drop_path_rate", "image_size"}.
        pretrained: file that training starts from.
        train_set, test_set: detectron2's names of the data.
        iterations, batch_size, warmup_iterations, warmup_factor: of training.
        schedule: "multistep" with `milestones` in iterations, or "polynomial".
        mapper: the original's name of the augmentation, with its parameters in `augmentation` (sides in pixels).
        test_size: {"shortest_edge", "longest_edge"} in pixels.
        evaluates: results that its test computes.
        object_mask_threshold, overlap_threshold: of panoptic results.
        eval_period: iterations between evaluations, 0 for only at the end.
    """

    name: str
    config: str
    task: str
    video: bool
    class_set: str
    num_labels: int
    ignore_value: int
    num_queries: int
    backbone: dict
    pretrained: str
    train_set: str
    test_set: str
    iterations: int
    batch_size: int
    schedule: str
    milestones: list[int]
    warmup_iterations: int
    warmup_factor: float
    mapper: str
    augmentation: dict
    test_size: dict
    evaluates: list[str]
    object_mask_threshold: float
    overlap_threshold: float
    eval_period: int

    @property
    def backbone_name(self) -> str:
        """Such as "r50" or "swin-l-in21k": the end of the recipe's name."""
        return self.name.removeprefix(f"{self.class_set}-")

    def config_fields(self) -> dict:
        """Fields of `Mask2FormerConfig` besides the backbone's; everything else has the class' default."""
        fields = {
            "num_labels": self.num_labels,
            "num_queries": self.num_queries,
            "ignore_value": self.ignore_value,
            "task": self.task,
        }
        if self.backbone["type"] == "resnet":
            fields["freeze_batch_norm"] = self.backbone["norm"] == "FrozenBN"
        return fields

    def processor_fields(self) -> dict:
        """Fields of `Mask2FormerImageProcessor` that say how results are made; a checkpoint keeps them."""
        return {"object_mask_threshold": self.object_mask_threshold, "overlap_threshold": self.overlap_threshold}

    def pipeline(self) -> Pipeline:
        """The augmentation.

        Raises:
            ValueError: for a recipe of clips, which no reader of this package gives.
        """
        if self.video:
            raise ValueError(f"{self.name} trains on clips of videos; choose a recipe for images")
        names = {"image_size": "size", "crop_size": "crop", "pad_size": "pad"}
        names |= {"max_category_area": "single_category_max_area"}
        return by_name(self.mapper, {names.get(key, key): value for key, value in self.augmentation.items()})

    def backbone_fields(self) -> dict:
        """Fields of the backbone's config, with "model_type"."""
        if self.backbone["type"] == "swin":
            return {"model_type": "swin"} | {key: value for key, value in self.backbone.items() if key != "type"}
        return {
            "model_type": "resnet",
            "embedding_size": 64,
            "hidden_sizes": [256, 512, 1024, 2048],
            "depths": RESNET_DEPTHS[self.backbone["depth"]],
            "layer_type": "bottleneck",
            "downsample_in_bottleneck": False,
        }


@cache
def _recipes() -> dict[str, Recipe]:
    rows = json.loads((Path(__file__).parent / "recipes.json").read_text(encoding="utf-8"))
    return {name: Recipe(name, **fields) for name, fields in rows.items()}


def recipe_names() -> list[str]:
    """Names of all recipes, in the original's order: ADE20K, Cityscapes, COCO, Mapillary Vistas, YouTubeVIS."""
    return list(_recipes())


def load_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        ValueError: for a name that does not exist, with the similar ones.
    """
    if vit_recipe(name) is not None:
        raise ValueError(f"name={name!r}: holds settings to train a ViT with, and is not one of the original's")
    if name not in _recipes():
        words = set(name.lower().split("-"))
        close = sorted([*recipe_names(), *vit_recipe_names()], key=lambda known: -len(words & set(known.split("-"))))[
            :6
        ]
        raise ValueError(f"name={name!r}: no such recipe; the closest are {', '.join(close)}")
    return _recipes()[name]
