"""What a training step takes, before anything is written: refuse what cannot work on this machine."""

import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from ..model.channels import model_channels
from .settings import TrainingSettings

SIDE = 256  # of the image whose layers are counted
STATES = 16  # bytes per trained parameter: weight, gradient and AdamW's two moments in float32
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers, v2 and v1


def bytes_per_pixel(model: nn.Module) -> float:
    """Float32 bytes of the outputs of all layers for a training image, or frame, per pixel; counted without data.

    That is about what a step keeps for its backward pass, criterion included. What torch keeps, measured for an image
    of 256 x 256, as a part of it: ResNet-50 0.77, with frozen batch norm 0.60, Swin-T 0.71 on CPUs and 0.90 on GPUs,
    the tiny model 0.93; in bfloat16 0.58 (tiny), with gradient checkpointing 0.45 (ResNet-50, for whose
    stages transformers 5.24 has none), 0.17 (Swin-T) and 0.63 (tiny).
    """
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        counted += output.numel() if torch.is_tensor(output) else 0

    encoder = model.model.pixel_level_module.encoder
    kept = set(model.modules())
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        kept -= set(encoder.modules())  # a frozen backbone keeps nothing
    hooks = [part.register_forward_hook(count) for part in kept if next(part.children(), None) is None]
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.model.named_parameters(), *model.model.named_buffers())
    }
    try:
        with torch.no_grad():
            shape = (1, model_channels(model.config), SIDE, SIDE)
            shape = (1, *shape) if model.main_input_name == "pixel_values_videos" else shape
            functional_call(model.model, state, (torch.empty(shape, device="meta"),))
    finally:
        for hook in hooks:
            hook.remove()
    return 4 * counted / SIDE**2


def machine_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has, or the machine, or the container; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows
        pass
    for path in map(Path, CGROUPS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # "max"
            pass
    return min(limits, default=None)


def check_memory(settings: TrainingSettings, model: nn.Module, side: int, device: torch.device, frames: int = 1):
    """Refuse a step that clearly takes more memory than there is: more than twice as much by the estimate.

    `STATES` bytes per parameter, and `bytes_per_pixel` for each pixel of the batch; half of that in half precision,
    a quarter with gradient checkpointing.

    Args:
        side: of the training images, in pixels.
        frames: of a clip.

    Raises:
        ValueError: with the estimate, what there is, and the largest batch that fits.
    """
    memory = machine_memory(device)
    if memory is None:
        return
    trains = settings.lora is None  # of whose updates there are few
    fixed = sum(
        (STATES if parameter.requires_grad and trains else 4) * parameter.numel() for parameter in model.parameters()
    )
    pixel = bytes_per_pixel(model)
    pixel *= 0.5 if settings.bf16 or settings.fp16 else 1.0
    pixel *= 0.25 if settings.gradient_checkpointing or settings.memory_budget is not None else 1.0
    pixel *= frames
    needed = fixed + settings.batch_size * side**2 * pixel
    if needed / 2 <= memory:
        return
    batch = int((memory - fixed) / (side**2 * pixel))
    largest = math.floor(math.sqrt(max(0.0, memory - fixed) / pixel)) // 32 * 32
    if batch >= 1:
        repair = f"the largest batch that fits is batch_size={batch}"
    elif largest >= 32:
        repair = f"not even one such image fits; the largest that does is about crop={largest}"
    else:
        repair = "the model alone does not fit: choose a smaller one"
    what = "images" if frames == 1 else f"clips of {frames} frames"
    raise ValueError(
        f"batch_size={settings.batch_size} with {what} of {side} x {side} pixels: a training step would take about "
        f"{needed / 2**30:,.0f} GiB, and there are {memory / 2**30:,.1f} GiB on {device}; {repair}"
    )


def check_batch_norm(settings: TrainingSettings, model: nn.Module, side: int, images: int):
    """Refuse batches of which a batch norm sees a single value per channel, as torch does in the step itself.

    Args:
        side: of the training images, in pixels.
        images: to train on.

    Raises:
        ValueError: with what to change.
    """
    level = model.model.pixel_level_module.train()
    norms = [part for part in level.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training]
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # Accelerate fills the last batch of several processes
    last = (images % settings.batch_size or settings.batch_size) if alone else settings.batch_size
    if side > 32 or last > 1 or not norms:
        return
    which = "" if settings.batch_size == 1 else f" and {images} images to train on, of which the last batch has one"
    repair = "" if level.neck is not None else ", or freeze_batch_norm=True"  # the neck's are new
    raise ValueError(
        f"crop={side} with batch_size={settings.batch_size}{which}: the backbone's last map is 1 x 1 for one image, "
        f"and batch norm needs more than one value; give crop=64 or more, batches of two{repair}"
    )
