"""Tensors that a run keeps on disk and reads again, with a checksum: what the disk has changed is not trained on."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ..data.whole_files import written_whole

logger = logging.get_logger(__name__)

CHECKSUM = "crc32"  # of 31 MB, an image's maps of a ResNet-50 at 512 x 512, in 11 ms


def keep(path: Path, tensors: Mapping[str, Tensor], **facts: str):
    """Write tensors and facts about them; other processes see the file when it is complete.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with written_whole(path, f".{uuid4().hex}") as staging:  # which draws no number of the run's
        save_file(tensors, staging, metadata={**facts, CHECKSUM: _checksum(tensors, facts)})


def kept(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors, on the CPU, and the facts of a file; None where there is none, or none with a checksum.

    None also for a file that is damaged, which a warning names: the caller makes it again.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        expected = facts.pop(CHECKSUM, None)
        if expected is None or expected == _checksum(tensors, facts):
            return None if expected is None else (tensors, facts)
        problem = "its checksum is another than when it was written"
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        problem = str(error)
    logger.warning(
        f"{path} is damaged ({problem}), and what it had is computed again. If more such files follow, the disk or "
        "memory is faulty: remove the folder, and name one on another disk"
    )
    return None


def bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    value = zlib.crc32(repr(sorted(facts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"
