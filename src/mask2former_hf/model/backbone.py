"""What transformers' backbones need to serve Mask2Former: strides, frozen parts, the original's stochastic depth."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoBackbone
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer, ResNetConvLayer
from transformers.utils import logging

from .cpu_layout import channels_last_on_cpu

logger = logging.get_logger(__name__)


def make_backbone(config, fallback_strides, freeze_batch_norm: bool) -> tuple[nn.Module, list[int]]:
    """The backbone of a config of transformers, and the channels of its four feature maps.

    Raises:
        ValueError: for feature maps that are not at strides 4, 8, 16, 32.
    """
    backbone = AutoBackbone.from_config(config)
    channels, strides = describe_backbone(backbone, fallback_strides)
    if strides != [4, 8, 16, 32]:
        raise ValueError(
            f"backbone_config is a {config.model_type} whose feature maps have strides "
            f"{[round(stride, 2) for stride in strides]} and channels {channels}: Mask2Former needs four maps at "
            "strides 4, 8, 16, 32. Choose a hierarchical backbone (Swin, ResNet, ConvNeXt, ...) and name its four "
            "stages, for example out_features=['stage1', 'stage2', 'stage3', 'stage4']"
        )
    freeze_parts(backbone, freeze_batch_norm)
    drop_paths_of_both_branches(backbone)
    rectify_own_results(backbone)
    return backbone, channels


def feature_maps(backbone: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
    """The four maps of (B, 3, H, W), finest first."""
    options = backbone_options(backbone)
    if options:  # resized embeddings need whole patches; Swin pads with zeros to whole patches anyway
        H, W = pixel_values.shape[-2:]
        patch = backbone.config.patch_size
        pixel_values = F.pad(pixel_values, (0, -W % patch, 0, -H % patch))
    return tuple(backbone(channels_last_on_cpu(pixel_values), **options).feature_maps)


def describe_backbone(backbone: nn.Module, fallback_strides) -> tuple[list[int], list[float]]:
    """Channels and strides of a backbone's feature maps; strides by a forward without data on the meta device."""
    side = 256
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
    }
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=backbone.dtype)
    training = backbone.training
    try:
        with torch.no_grad():
            maps = functional_call(backbone.eval(), state, (pixels,), backbone_options(backbone)).feature_maps
        return [x.shape[1] for x in maps], [side / x.shape[-1] for x in maps]
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        logger.info(f"Strides of the backbone are taken from the config, it cannot run without data: {error}")
        return list(backbone.channels), list(fallback_strides)
    finally:
        backbone.train(training)


def backbone_options(backbone: nn.Module) -> dict[str, bool]:
    """Swin's absolute position embeddings are resized only on request; without it other input sizes crash."""
    absolute = backbone.config.model_type == "swin" and backbone.config.use_absolute_embeddings
    return {"interpolate_pos_encoding": True} if absolute else {}


def freeze_parts(backbone: nn.Module, freeze_batch_norm: bool):
    """Take parameters out of training: what no feature map passes through, and batch norms if asked for."""
    if backbone.config.model_type == "swin":
        # A last norm that SwinBackbone owns and does not use: DistributedDataParallel would wait for its gradient.
        backbone.swin.layernorm.requires_grad_(False)
    if freeze_batch_norm:
        for module in batch_norms(backbone):
            module.requires_grad_(False)
            if type(module) is nn.BatchNorm2d:
                module.__class__ = FrozenBatchNorm  # the same parameters, buffers and names


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm with fixed statistics and parameters, whose gradient needs the scale alone: torch's own would keep
    the input of every norm for it, half of a ResNet's activations."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad or not (torch.is_grad_enabled() and x.requires_grad):
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


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]


class RectifiedConvolution(ResNetConvLayer):
    """ResNet's convolution, norm and ReLU as one part, which overwrites its norm's result."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.relu(self.normalization(self.convolution(hidden_states)), inplace=True)


class RectifiedSum:
    """A residual block that adds and rectifies in the memory of its own last norm's result."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        return F.relu(self.layer(hidden_state).add_(self.shortcut(hidden_state)), inplace=True)


class RectifiedBasicLayer(RectifiedSum, ResNetBasicLayer):
    pass


class RectifiedBottleNeckLayer(RectifiedSum, ResNetBottleNeckLayer):
    pass


def rectify_own_results(backbone: nn.Module):
    """Give ResNet's blocks these forwards: 6 % less memory in training on CPUs, and 1 % of an inference's time."""
    if backbone.config.model_type == "resnet" and backbone.config.hidden_act == "relu":
        for module in backbone.modules():
            if type(module) is ResNetConvLayer and isinstance(module.activation, nn.ReLU):
                module.__class__ = RectifiedConvolution  # the same parameters and names
            elif type(module) is ResNetBasicLayer:
                module.__class__ = RectifiedBasicLayer
            elif type(module) is ResNetBottleNeckLayer:
                module.__class__ = RectifiedBottleNeckLayer


def drop_paths_of_both_branches(backbone: nn.Module):
    """Let Swin's stochastic depth act on the MLP branch as well, as in the original; transformers' blocks apply it to
    the attention branch only."""
    if backbone.config.model_type == "swin":
        for stage in backbone.swin.encoder.layers:
            for block in stage.blocks:
                if not isinstance(block.drop_path, nn.Identity):
                    block.mlp.register_forward_hook(partial(drop_path_of_output, block.drop_path))


def drop_path_of_output(drop_path: nn.Module, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return drop_path(output)
