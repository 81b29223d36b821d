"""What transformers' backbones need to serve Mask2Former: strides, a neck, frozen parts, stochastic depth."""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoBackbone
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
    ResNetShortCut,
)
from transformers.utils import logging

from .canvas import SIZE_DIVISOR
from .cpu_layout import for_convolutions, hooked, transformed
from .folded_norms import folded, folds
from .plain_vit import is_plain, make_neck, neck_maps, patches_of, whole_patches
from .timm_models import TIMM, make_timm_backbone

logger = logging.get_logger(__name__)


# What classes of transformers own and no feature map passes through: a last norm, the token of pre-training.
# DistributedDataParallel would wait for their gradients.
UNUSED = {
    "swin": ("swin.layernorm.",),
    "maskformer-swin": ("model.layernorm.",),
    "bit": ("bit.norm.",),
    "focalnet": ("focalnet.layernorm.",),
    "pixio": ("pixio.layernorm.",),
    **dict.fromkeys(
        ("dinov2", "dinov2_with_registers", "dinov3_vit", "tipsv2_vision_model"), ("embeddings.mask_token",)
    ),
}
STRIDES = [4, 8, 16, 32]
WHOLE_CANVAS = ("beit", "hiera", TIMM)  # their four maps are made of an image whose sides are multiples of 32
PROBE = (96, 128)  # height and width of the image without data that tells a backbone's strides


def make_backbone(
    config, fallback_strides, freeze_batch_norm: bool, vit_neck: str | None = None, pyramid_channels: int = 256
) -> tuple[nn.Module, nn.Module | None, list[int]]:
    """The backbone of a config of transformers, its neck if it is a plain ViT, and the channels of the four maps.

    Args:
        vit_neck: "pyramid" or "adapter", see `plain_vit.make_neck`; None for what the backbone needs.
        pyramid_channels: of each of the pyramid's maps.

    Raises:
        ValueError: for feature maps that are not at strides 4, 8, 16, 32 and not those of a plain ViT, and for a neck
            that does not fit.
    """
    backbone = make_timm_backbone(config) if config.model_type == TIMM else AutoBackbone.from_config(config)
    repair(backbone)
    shapes = map_shapes(backbone, config)
    neck = None
    if shapes is not None and is_plain(backbone, PROBE, shapes):
        neck = make_neck(vit_neck, config, [shape[1] for shape in shapes], pyramid_channels)
        channels = neck.out_channels
    else:
        channels = _hierarchical_channels(backbone, shapes, fallback_strides)
        if vit_neck is not None:
            raise ValueError(
                f"vit_neck={vit_neck!r}: backbone_config is a {config.model_type}, which has four maps at strides 4, "
                "8, 16, 32 of its own. Leave vit_neck out"
            )
    freeze_parts(backbone, freeze_batch_norm)
    rectify_own_results(backbone)
    return backbone, neck, channels


def repair(backbone: nn.Module):
    """Replace forwards of transformers' classes that Mask2Former cannot use as they are, or that copy too much. Their
    modules are imported for these backbones alone."""
    if backbone.config.model_type in ("hiera", "focalnet"):
        from .repaired_backbones import repair_maps

        repair_maps(backbone)
    elif backbone.config.model_type == "dinov3_vit":
        from .rotary_positions import keep_positions_exact

        keep_positions_exact(backbone)
    elif backbone.config.model_type == "swin":
        from .swin_speed import drop_paths_of_both_branches, gather_windows

        gather_windows(backbone)
        drop_paths_of_both_branches(backbone)


def _hierarchical_channels(backbone: nn.Module, shapes, fallback_strides) -> list[int]:
    """Channels of four maps at the strides that Mask2Former needs, or the error that says what it needs."""
    if shapes is None:
        strides, channels = list(fallback_strides), list(backbone.channels)
        found = f"have, by feature_strides, strides {strides}"
    elif any(len(shape) != 4 for shape in shapes):
        strides, found = [], f"are not maps but of shapes {[tuple(shape) for shape in shapes]}"
    else:
        channels = [shape[1] for shape in shapes]
        pairs = [tuple(side / cells for side, cells in zip(PROBE, shape[-2:], strict=True)) for shape in shapes]
        strides = [y if x == y else (y, x) for y, x in pairs]
        shown = [round(y, 2) if x == y else (round(y, 2), round(x, 2)) for y, x in pairs]
        found = f"have strides {shown} and channels {channels}"
    if strides != STRIDES:
        raise ValueError(
            f"backbone_config is a {backbone.config.model_type} whose feature maps {found}: Mask2Former needs four "
            "maps at strides 4, 8, 16, 32, or a plain ViT's (B, C, H, W) maps at the stride of its patches. Choose a "
            "hierarchical backbone (Swin, ResNet, ConvNeXt, ...) and name its four stages, for example "
            "out_features=['stage1', 'stage2', 'stage3', 'stage4'], or a ViT with reshape_hidden_states=True"
        )
    return channels


def feature_maps(backbone: nn.Module, neck: nn.Module | None, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """The four maps of (B, c, H, W), finest first."""
    if neck is not None or backbone.config.model_type in WHOLE_CANVAS:
        H, W = pixel_values.shape[-2:]
        canvas = F.pad(pixel_values, (0, -W % SIZE_DIVISOR, 0, -H % SIZE_DIVISOR))
        if neck is None:
            maps = backbone(for_convolutions(canvas)).feature_maps
        else:
            maps = neck_maps(backbone, neck, canvas)
        return tuple(x[..., : -(-H // step), : -(-W // step)] for x, step in zip(maps, STRIDES, strict=True))
    options = backbone_options(backbone)
    if options:  # resized embeddings need whole patches; Swin pads with zeros to whole patches anyway
        H, W = pixel_values.shape[-2:]
        patch = backbone.config.patch_size
        pixel_values = F.pad(pixel_values, (0, -W % patch, 0, -H % patch))
    pixel_values = for_convolutions(pixel_values)
    if backbone.config.model_type == "swin":
        from .swin_speed import innermost_maps

        maps = innermost_maps(backbone, pixel_values, options)
        if maps is not None:
            return maps
    return tuple(backbone(pixel_values, **options).feature_maps)


def map_shapes(backbone: nn.Module, config) -> list[tuple[int, ...]] | None:
    """Shapes of a backbone's feature maps of an image of `PROBE`, by a forward without data on the meta device; None
    for a backbone that cannot run without data.

    Raises:
        ValueError: for a backbone that does not take an image of that size.
    """
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
    }
    pixels = torch.empty(1, getattr(config, "num_channels", 3), *PROBE, device="meta", dtype=backbone.dtype)
    if (patch := patches_of(backbone)) is not None:
        pixels = whole_patches(pixels, patch)
    training = backbone.training
    try:
        with torch.no_grad():
            maps = functional_call(backbone.eval(), state, (pixels,), backbone_options(backbone)).feature_maps
        return [tuple(x.shape) for x in maps]
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        if isinstance(error, RuntimeError) and "meta" in str(error).lower():
            logger.info(f"Strides of the backbone are taken from the config, it cannot run without data: {error}")
            return None
        raise ValueError(
            f"backbone_config is a {config.model_type} that does not take an image of {PROBE[0]} x {PROBE[1]} pixels "
            f"and {pixels.shape[1]} channels ({str(error).strip().splitlines()[0]}): Mask2Former needs a backbone for "
            "images of any size that is a multiple of 32"
        ) from error
    finally:
        backbone.train(training)


def backbone_options(backbone: nn.Module) -> dict[str, bool]:
    """Swin's absolute position embeddings are resized only on request; without it other input sizes crash."""
    absolute = backbone.config.model_type == "swin" and backbone.config.use_absolute_embeddings
    return {"interpolate_pos_encoding": True} if absolute else {}


def freeze_parts(backbone: nn.Module, freeze_batch_norm: bool):
    """Take parameters out of training: what no feature map passes through, and batch norms if asked for."""
    for name, parameter in backbone.named_parameters():
        if name.startswith(UNUSED.get(backbone.config.model_type, ())):
            parameter.requires_grad_(False)
    if freeze_batch_norm:
        for module in batch_norms(backbone):
            module.requires_grad_(False)
            if type(module) is nn.BatchNorm2d:
                module.__class__ = FrozenBatchNorm  # the same parameters, buffers and names


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm with fixed statistics and parameters, whose gradient needs the scale alone: torch's own would keep
    the input of every norm for it, half of a ResNet's activations."""

    def forward(self, x: Tensor) -> Tensor:
        trained = self.weight.requires_grad or self.bias.requires_grad
        if trained or transformed() or not (torch.is_grad_enabled() and x.requires_grad):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return _FixedAffine.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


class _FixedAffine(torch.autograd.Function):
    """`F.batch_norm` with the gradient of its input only."""

    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(variance, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        variance, weight = ctx.saved_tensors
        precise = torch.promote_types(weight.dtype, torch.float32)
        scale = weight.to(precise) * (variance.to(precise) + ctx.eps).rsqrt()
        return (gradient * scale[:, None, None]).to(gradient.dtype), None, None, None, None, None


def rest_frozen(module: nn.Module):
    """Put the parts of a backbone whose parameters are all frozen into evaluation mode."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        module.eval()
        return
    for child in module.children():
        rest_frozen(child)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]


def rectifies(activation: nn.Module) -> bool:
    """Whether a part is torch's ReLU still, which no hook sees."""
    return type(activation) is nn.ReLU and not hooked(activation)


class RectifiedConvolution(ResNetConvLayer):
    """ResNet's convolution, norm and ReLU as one part: one operator at inference, else in the norm's memory."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not rectifies(self.activation):
            return super().forward(hidden_states)
        if folds(hidden_states, self.convolution, self.normalization):
            return folded(hidden_states, self.convolution, self.normalization, rectify=True)
        x = self.normalization(self.convolution(hidden_states))
        return F.relu(x, inplace=not hooked(self.normalization))  # what a hook has seen stays as it was


class FoldedShortCut(ResNetShortCut):
    """ResNet's convolution and norm of the residual, as one operator at inference."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        if folds(hidden_state, self.convolution, self.normalization):
            return folded(hidden_state, self.convolution, self.normalization, rectify=False)
        return super().forward(hidden_state)


class RectifiedSum:
    """A residual block that adds and rectifies with its last convolution, or in the memory of that one's norm."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        *first, last = self.layer
        if not rectifies(self.activation):
            return super().forward(hidden_state)
        seen = any(hooked(part) for part in (self.layer, last, *last.children()))
        if not seen and folds(hidden_state, last.convolution, last.normalization):
            x = hidden_state
            for part in first:
                x = part(x)
            residual = self.shortcut(hidden_state)
            return folded(x, last.convolution, last.normalization, rectify=True, plus=residual)
        x, residual = self.layer(hidden_state), self.shortcut(hidden_state)
        return F.relu(x + residual if seen else x.add_(residual), inplace=True)


class RectifiedBasicLayer(RectifiedSum, ResNetBasicLayer):
    pass


class RectifiedBottleNeckLayer(RectifiedSum, ResNetBottleNeckLayer):
    pass


def rectify_own_results(backbone: nn.Module):
    """Give ResNet's blocks these forwards: 6 % less memory in training on CPUs, and a tenth of an inference's time."""
    if backbone.config.model_type == "resnet" and backbone.config.hidden_act == "relu":
        for module in backbone.modules():
            if type(module) is ResNetConvLayer and isinstance(module.activation, nn.ReLU):
                module.__class__ = RectifiedConvolution  # the same parameters and names
            elif type(module) is ResNetShortCut:
                module.__class__ = FoldedShortCut
            elif type(module) is ResNetBasicLayer:
                module.__class__ = RectifiedBasicLayer
            elif type(module) is ResNetBottleNeckLayer:
                module.__class__ = RectifiedBottleNeckLayer
