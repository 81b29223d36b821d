"""Plain ViTs by short name, which maps of a backbone are asked for, and how its images are normalised."""

from collections.abc import Callable, Sequence
from functools import partial

from transformers import Dinov2Config, DINOv3ViTConfig, ImageProcessingMixin, PreTrainedConfig

from ..model.plain_vit import LEAST_PATCH, patch_size_of
from ..model.vit_adapter import tapped_blocks

NORMALISATION = ("image_mean", "image_std")


def _dinov2(width: int, layers: int) -> Callable[[], Dinov2Config]:
    """Oquab et al., "DINOv2", TMLR 2024, table 17; patches of 14 pixels, pretrained at 518."""
    return partial(
        Dinov2Config, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, image_size=518
    )


def _dinov3(width: int, layers: int) -> Callable[[], DINOv3ViTConfig]:
    """Siméoni et al., "DINOv3", arXiv 2508.10104, section 5; patches of 16 pixels, 4 registers."""
    return partial(
        DINOv3ViTConfig,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_register_tokens=4,
    )


# Short name -> config, and where the Hub has its weights: of DINOv3 on request to Meta, under Meta's licence
VITS: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "dinov2-s": (_dinov2(384, 12), "facebook/dinov2-small"),
    "dinov2-b": (_dinov2(768, 12), "facebook/dinov2-base"),
    "dinov2-l": (_dinov2(1024, 24), "facebook/dinov2-large"),
    "dinov3-s": (_dinov3(384, 12), "facebook/dinov3-vits16-pretrain-lvd1689m"),
    "dinov3-b": (_dinov3(768, 12), "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    "dinov3-l": (_dinov3(1024, 24), "facebook/dinov3-vitl16-pretrain-lvd1689m"),
}


def with_maps(config: PreTrainedConfig, vit_neck: str | None) -> PreTrainedConfig:
    """The config, asked for the maps that Mask2Former takes: a plain ViT's last, or those of four blocks for an
    adapter; the last four stages of a hierarchical backbone.

    Raises:
        ValueError: for a model that transformers has no backbone class of.
    """
    names = getattr(config, "stage_names", None)
    if names is None:
        raise ValueError(
            f"a {config.model_type} has no backbone class in transformers; those that have one are, for example, "
            "swin, resnet, convnext, dinov2, dinov3_vit"
        )
    patch = patch_size_of(config)
    if patch is None or min(patch) < LEAST_PATCH:
        config.out_features = list(names[-4:])
    elif vit_neck == "adapter" or getattr(config, "add_fpn", False):  # BEiT has a pyramid of its own
        config.out_features = [names[block] for block in tapped_blocks(len(names) - 1)]
    else:
        config.out_features = [names[-1]]
    return config


def normalisation(source: str, local_files_only: bool, names: Sequence[str] = NORMALISATION) -> dict:
    """`image_mean` and `image_std`, or other fields, of the image processor of a folder or Hub id; empty if it has
    none."""
    try:
        fields, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local_files_only)
    except OSError:
        return {}
    return {name: fields[name] for name in names if fields.get(name) is not None}
