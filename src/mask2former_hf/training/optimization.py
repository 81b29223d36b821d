"""Parameter groups and learning rate of the paper's recipe (the original's `train_net.py`)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

# What all of the original's recipes share (resolved configurations of facebookresearch/Mask2Former at 9b0651c)
LEARNING_RATE = 1e-4
BACKBONE_MULTIPLIER = 0.1
WEIGHT_DECAY = 0.05
GRADIENT_NORM = 0.01
POLYNOMIAL_POWER = 0.9
# Of a backbone from random weights, for which those values are too small: of this package's own runs
# (docs/results.md), all of the tiny model. Larger random backbones take the same; of them nothing was measured.
FROM_RANDOM = {"learning_rate": 1e-3, "clip": 1.0, "backbone_multiplier": 1.0}
FROM_PRETRAINED = {"learning_rate": LEARNING_RATE, "clip": GRADIENT_NORM, "backbone_multiplier": BACKBONE_MULTIPLIER}
MULTI_STEP_FACTOR = 0.1

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.InstanceNorm2d)
UNDECAYED_NAMES = ("relative_position_bias_table", "position_embeddings")


def parameter_groups(
    model: nn.Module,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    backbone_multiplier: float = BACKBONE_MULTIPLIER,
) -> list[dict]:
    """Groups for AdamW: a slower backbone; no decay for norms, embeddings and Swin's position tables.

    Biases do decay, as in the original. Frozen parameters are left out.

    Args:
        learning_rate: of everything but the backbone.
        backbone_multiplier: factor on the backbone's learning rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            in_backbone = "pixel_level_module.encoder" in module_name
            undecayed = isinstance(module, (*NORMS, nn.Embedding)) or name in UNDECAYED_NAMES
            rate = learning_rate * (backbone_multiplier if in_backbone else 1.0)
            groups.setdefault((rate, 0.0 if undecayed else weight_decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def match_gradient_strides(model: nn.Module):
    """Give the gradient of every 1x1 convolution the strides of its weight, for DistributedDataParallel.

    On CPUs that gradient comes with channels innermost: the same memory, but other strides of the two axes of length
    1, which DistributedDataParallel warns of as another layout. (It costs nothing: steps of two processes with a
    ResNet-50 take 0.72 to 0.81 s with and without.)
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            weight.register_hook(lambda gradient: gradient.flatten(1)[..., None, None])


def polynomial_schedule(optimizer: torch.optim.Optimizer, num_steps: int, power: float = POLYNOMIAL_POWER) -> LambdaLR:
    """Learning rate times (1 - step / num_steps) ** power (the original's WarmupPolyLR, which has no warm-up)."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / num_steps) ** power)


def multi_step_schedule(
    optimizer: torch.optim.Optimizer, milestones: Sequence[int], gamma: float = MULTI_STEP_FACTOR
) -> LambdaLR:
    """Learning rate times `gamma` from each milestone (a step number) on (the original's WarmupMultiStepLR, whose
    warm-up factor is 1)."""
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= milestone for milestone in milestones))
