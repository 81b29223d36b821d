"""A training step within a budget of memory: what is measured, what is chosen, and in which words it is said."""

import math
import os
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model.channels import model_channels
from .activations import BudgetTooSmall, Choice, Measured, choose, compute_again, measure
from .settings import TrainingSettings

GB = 2**30
PARTS = {  # of the names of blocks, in the order of the line
    "pixel_level_module.encoder.": "backbone",
    "pixel_level_module.decoder.": "pixel decoder",
    "transformer_module.": "transformer decoder",
}


def fit_budget(
    settings: TrainingSettings, model: nn.Module, size: tuple[int, int], targets: int, device: torch.device
) -> str:
    """Let blocks of the model be computed again in the backward pass so that a step fits `settings.memory_budget`.

    Counted are the weights, their gradients and AdamW's two moments, the copies of gradients that several processes
    exchange, the batch, what autograd keeps, and what the backward pass works in; not Python, the libraries and what
    prepares images, and on a GPU not what CUDA takes for itself.

    Args:
        model: as it trains, frozen parts and updates included; goes to the device.
        size: (height, width) of the training images, the largest if they differ.
        targets: of the fullest image.

    Returns:
        What was chosen, in one line; "" without a budget.

    Raises:
        ValueError: for a budget that cannot be met, with the least that can.
    """
    if settings.memory_budget is None:
        return ""
    half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    model.to(device)
    batch = batch_like(model, settings.batch_size, size, targets, device)
    with the_whole_encoder(model):
        measured = measure(model, batch, half)
    fixed = fixed_bytes(model) + sum(mask.nbytes for mask in batch["mask_labels"]) + working_bytes(measured)
    budget, before = settings.memory_budget * GB, fixed + measured.peak(frozenset())
    try:
        choice = choose(measured, budget - fixed)
    except BudgetTooSmall as error:
        least = math.ceil(1000 * (fixed + error.least) / GB) / 1000
        raise ValueError(
            f"memory_budget={settings.memory_budget:g}: a step with batch_size={settings.batch_size} and images of "
            f"{size[0]} x {size[1]} pixels takes at least {least:.3f} GB, with every block computed again; give "
            f"memory_budget={least:.3f}, or a smaller batch_size= or crop="
        ) from error
    compute_again(model, choice.again)
    return in_words(settings.memory_budget, fixed, before, measured, choice)


@contextmanager
def the_whole_encoder(model: nn.Module):
    """No step of a model with exits takes more than one with all layers."""
    config = model.config
    exits, config.encoder_exits = config.encoder_exits, False
    try:
        yield
    finally:
        config.encoder_exits = exits


def in_words(budget: float, fixed: int, before: int, measured: Measured, choice: Choice) -> str:
    line = f"memory budget {budget:g} GB: a step takes about {(fixed + choice.peak) / GB:.3g} GB"
    if not choice.again:
        return f"{line}, and nothing has to be computed again"
    counts = []
    for marker, part in PARTS.items():
        chosen = sum(marker in name for name in choice.again)
        if chosen:
            counts.append(f"{chosen} of {sum(marker in block.name for block in measured.blocks)} of the {part}")
    return (
        f"{line} instead of {before / GB:.3g}: blocks computed again in the backward pass are "
        f"{', '.join(counts)}, for about {choice.seconds:.2g} s more per step"
    )


def batch_like(
    model: nn.Module, batch_size: int, size: tuple[int, int], targets: int, device: torch.device
) -> dict[str, Tensor | list[Tensor]]:
    """A batch of the run's size, with as many targets in each image as the fullest has."""
    images = range(batch_size)
    return {
        "pixel_values": torch.zeros(batch_size, model_channels(model.config), *size, device=device),
        "mask_labels": [torch.zeros(targets, *size, dtype=torch.uint8, device=device) for _ in images],
        "class_labels": [torch.zeros(targets, dtype=torch.int64, device=device) for _ in images],
    }


def fixed_bytes(model: nn.Module) -> int:
    """Of weights, buffers, gradients and AdamW's moments, and what DistributedDataParallel copies gradients into."""
    copies = 4 if int(os.environ.get("WORLD_SIZE", "1")) == 1 else 5
    weights = sum(parameter.nbytes * (copies if parameter.requires_grad else 1) for parameter in model.parameters())
    return weights + sum(buffer.nbytes for buffer in model.buffers())


def working_bytes(measured: Measured) -> int:
    """What the backward pass works in besides."""
    return 3 * max(measured.sizes, default=0)
