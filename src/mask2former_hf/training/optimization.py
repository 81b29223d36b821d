"""Parameter groups and learning rate of the paper's recipe (the original's `train_net.py`)."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .freezing import depths_of

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

BACKBONE = "pixel_level_module.encoder"
PARTS = {  # title -> what the names of its parameters contain
    "backbone": f"{BACKBONE}.",
    "neck of the ViT": "pixel_level_module.neck.",
    "pixel decoder": "pixel_level_module.decoder.",
    "transformer decoder": "transformer_module.",
    "classes": "class_predictor.",
}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.InstanceNorm2d)
UNDECAYED_NAMES = ("relative_position_bias_table", "position_embeddings")


def parameter_groups(
    model: nn.Module,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
    backbone_multiplier: float = BACKBONE_MULTIPLIER,
    layer_decay: float | None = None,
) -> list[dict]:
    """Groups for AdamW: a slower backbone; no decay for norms, embeddings and Swin's position tables.

    Biases do decay, as in the original. Frozen parameters are left out.

    Args:
        learning_rate: of everything but the backbone.
        backbone_multiplier: factor on the backbone's learning rate.
        layer_decay: r, a further factor for each layer that lies deeper below the backbone's end: r for the last of n
            blocks, r ** n for the first, r ** (n + 1) for embeddings, 1 for a last norm (BEiT, ViTDet, ViT-Adapter).
            Of a hierarchical backbone a layer is a stage.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    factors, seen = _layer_factors(model, layer_decay), set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            undecayed = isinstance(module, (*NORMS, nn.Embedding)) or name in UNDECAYED_NAMES
            in_backbone = BACKBONE in module_name
            rate = learning_rate * (backbone_multiplier * factors.get(parameter, 1.0) if in_backbone else 1.0)
            groups.setdefault((rate, 0.0 if undecayed else weight_decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def _layer_factors(model: nn.Module, decay: float | None) -> dict[nn.Parameter, float]:
    """Of the backbone's parameters."""
    if decay is None:
        return {}
    (encoder,) = (module for name, module in model.named_modules() if name.endswith(BACKBONE))
    depths, count = depths_of(encoder)
    return {parameter: decay ** (count + 1 - depths[name]) for name, parameter in encoder.named_parameters()}


def parts_table(model: nn.Module, groups: Sequence[dict]) -> str:
    """Which parts of a model are trained, and how: parameters, learning rates and weight decay by part."""
    settings = {parameter: group for group in groups for parameter in group["params"]}
    lines = [f"{'part':21}{'parameters':>11}{'trained':>11}  learning rate      decay"]
    for title, place in PARTS.items():
        parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if place in name and ".original_module." not in name  # PEFT keeps what is trained whole twice
        ]
        if not parameters:
            continue
        trained = [parameter for parameter in parameters if parameter in settings]
        rates, decays = (_range(settings[parameter][name] for parameter in trained) for name in ("lr", "weight_decay"))
        total, part = (sum(parameter.numel() for parameter in rows) for rows in (parameters, trained))
        count = f"{part / 1e6:.2f} M" if trained else "frozen"
        lines.append(f"{title:21}{f'{total / 1e6:.2f} M':>11}{count:>11}  {rates:19}{decays}")
    return "\n".join(lines)


def _range(numbers: Iterable[float]) -> str:
    numbers = sorted(numbers)
    return " to ".join(f"{x:.3g}" for x in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "-"


def match_gradient_strides(model: nn.Module):
    """Give the gradient of every 1x1 convolution the strides of its weight, for DistributedDataParallel.

    On CPUs that gradient comes with channels innermost: the same memory, but other strides of the two axes of length
    1, which DistributedDataParallel warns of as another layout. (It costs nothing: steps of two processes with a
    ResNet-50 take 0.72 to 0.81 s with and without.)
    """
    for weight in model.parameters():
        if weight.requires_grad and weight.ndim == 4 and weight.shape[2:] == (1, 1):
            weight.register_hook(lambda gradient: gradient.flatten(1)[..., None, None])


def polynomial_schedule(
    optimizer: torch.optim.Optimizer, num_steps: int, power: float = POLYNOMIAL_POWER, warmup: int = 0
) -> LambdaLR:
    """Learning rate times (1 - step / num_steps) ** power (the original's WarmupPolyLR, which has no warm-up).

    Args:
        warmup: steps of a linear rise from 0 before that; the fall takes the steps that are left, as in EoMT.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return max(0.0, 1 - (step - warmup) / max(1, num_steps - warmup)) ** power

    return LambdaLR(optimizer, factor)


def multi_step_schedule(
    optimizer: torch.optim.Optimizer, milestones: Sequence[int], gamma: float = MULTI_STEP_FACTOR, warmup: int = 0
) -> LambdaLR:
    """Learning rate times `gamma` from each milestone (a step number) on (the original's WarmupMultiStepLR, whose
    warm-up factor is 1).

    Args:
        warmup: steps of a linear rise from 0 at the beginning.
    """

    def factor(step: int) -> float:
        rise = step / warmup if step < warmup else 1.0
        return rise * gamma ** sum(step >= milestone for milestone in milestones)

    return LambdaLR(optimizer, factor)
