"""What models of timm need to serve as backbones: images of any size."""

from torch import nn
from transformers import AutoBackbone

TIMM = "timm_backbone"
ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})  # of ViTs, of Swin, and all others take any


def make_timm_backbone(config) -> nn.Module:
    """`TimmBackbone` of a config, for images of any size where timm would make it for one."""
    for options in ANY_SIZE:
        try:
            return AutoBackbone.from_config(config, **options)
        except TypeError as error:  # a class without that option
            if not options or "unexpected keyword argument" not in str(error):
                raise


def timm_patch_size(backbone: nn.Module) -> tuple[int, int] | None:
    """(height, width) in pixels of the patches of a plain ViT of timm; None for one whose maps differ in stride."""
    strides = {stage["reduction"] for stage in backbone._backbone.feature_info.info}
    return tuple(strides) * 2 if len(strides) == 1 else None
