"""What plain ViTs of transformers and timm need to serve Mask2Former: whole patches and a neck.

A plain ViT has maps of one stride, that of its patches. A neck, `SimpleFeaturePyramid` or `ViTAdapter`, makes four
maps at strides 4, 8, 16, 32 of them.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from .timm_models import TIMM, timm_patch_size
from .vit_adapter import NUM_HEADS, NUM_MAPS, VALUE_RATIO, ViTAdapter, tapped_blocks
from .vit_pyramid import SimpleFeaturePyramid

LEAST_PATCH = 8  # pixels; hierarchical backbones begin with patches of 2 or 4, and may be asked for their first map


def patch_size_of(config) -> tuple[int, int] | None:
    """(height, width) of a backbone's patches in pixels; None for one without patches."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def patches_of(backbone: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the patches of what may be a plain ViT; None for another backbone."""
    is_timm = backbone.config.model_type == TIMM
    patch = timm_patch_size(backbone) if is_timm else patch_size_of(backbone.config)
    return None if patch is None or min(patch) < LEAST_PATCH else patch


def is_plain(backbone: nn.Module, size: tuple[int, int], shapes: list[tuple[int, ...]]) -> bool:
    """Whether maps of these shapes, of an image of this size, are those of a plain ViT."""
    patch = patches_of(backbone)
    if patch is None:
        return False
    grid = tuple(-(-side // step) for side, step in zip(size, patch, strict=True))
    return all(len(shape) == 4 and tuple(shape[-2:]) == grid for shape in shapes)


def make_neck(kind: str | None, config, channels: list[int], pyramid_channels: int) -> nn.Module:
    """The neck of a plain ViT with these channels of its maps.

    Args:
        kind: "pyramid", "adapter", or None for the pyramid.
        pyramid_channels: of each of the pyramid's maps. The adapter's have those of the ViT.

    Raises:
        ValueError: for an adapter without four maps, or of a width that its heads do not divide.
    """
    if kind != "adapter":
        return SimpleFeaturePyramid(channels[-1], pyramid_channels)
    if len(channels) != NUM_MAPS:
        layers = getattr(config, "num_hidden_layers", len(getattr(config, "stage_names", ())) - 1)
        which = f", for example out_indices={tapped_blocks(layers)}" if layers >= NUM_MAPS else ""
        raise ValueError(
            f"vit_neck='adapter': backbone_config is a {config.model_type} with {len(channels)} feature maps, and the "
            f"adapter takes {NUM_MAPS}: name four of its blocks{which}"
        )
    if channels[-1] * VALUE_RATIO % NUM_HEADS:
        raise ValueError(
            f"vit_neck='adapter': the {config.model_type} has {channels[-1]} channels, and the adapter's {NUM_HEADS} "
            f"heads need a multiple of {int(NUM_HEADS / VALUE_RATIO)}; take another ViT, or vit_neck='pyramid'"
        )
    return ViTAdapter(channels[-1], image_channels=getattr(config, "num_channels", 3))


def neck_maps(backbone: nn.Module, neck: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """Four maps, finest first, of (B, c, H, W) whose sides are multiples of 32."""
    return neck(pixel_values, backbone(whole_patches(pixel_values, patches_of(backbone))).feature_maps)


def whole_patches(pixel_values: Tensor, patch: tuple[int, int]) -> Tensor:
    """The image resized to the next whole number of patches, so that the ViT sees all of it.

    Its convolution would leave out a remainder: up to 13 pixels of patches of 14 at the right and the bottom, by which
    its map, spread over the whole image afterwards, would be shifted. Multiples of the patch stay as they are.
    """
    H, W = pixel_values.shape[-2:]
    # Not -(-H // patch): ONNX, as PyTorch's tracer writes it, divides towards 0.
    size = ((H + patch[0] - 1) // patch[0] * patch[0], (W + patch[1] - 1) // patch[1] * patch[1])
    if size == (H, W):
        return pixel_values
    return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
