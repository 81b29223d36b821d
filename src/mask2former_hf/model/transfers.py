"""Numbers from the host to the device without waiting for the device.

`torch.tensor(numbers, device="cuda")` copies from pageable memory, which waits until everything queued before is done.
"""

import torch
from torch import Tensor


def to_device(numbers, device: torch.device) -> Tensor:
    """Numbers, lists of them or an array, as a tensor on the device; through pinned memory on GPUs."""
    tensor = torch.as_tensor(numbers)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def filled(numbers: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """(rows, len(numbers)) int64, every row the same: written on the device, so that it can be captured in a graph."""
    return torch.stack([torch.full((rows,), number, device=device) for number in numbers], dim=1)
