"""Checkpoint files of other projects, read without running what is in them, and written for detectron2."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data.whole_files import written_whole
from .names import CheckpointError, listed
from .torch_files import read_object

STATE_KEYS = ("model", "state_dict")  # detectron2; mmengine and mmcv


class Checkpoint(NamedTuple):
    """Tensors by name, and whatever else the file has (`meta`, `__author__`, `iteration`, ...)."""

    tensors: dict[str, Tensor]
    rest: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read `.pkl` (detectron2's model zoo), `.pth` / `.pt` / `.bin` (torch.save) or `.safetensors`.

    Nothing in the file is run: pickles may only build dicts, lists, numbers, strings, NumPy arrays and tensors.

    Raises:
        CheckpointError: the file is not of these kinds, asks for something else (which is named), or has no tensors.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return Checkpoint(load_file(path), {})
        except OSError:
            raise
        except Exception as error:  # safetensors has an exception class of its own, without a public base
            raise CheckpointError(f"{path} is not a safetensors file ({error})") from error
    with path.open("rb") as file:
        try:
            content = read_object(file)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {_one_line(error)}") from error
        except Exception as error:  # a damaged file can fail in any way
            reason = f"{type(error).__name__}: {_one_line(error)}"
            raise CheckpointError(f"{path} is damaged or no checkpoint ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not a dict of tensors")
    content = dict(content)
    state = next((content.pop(key) for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    if state is None:
        state, content = content, {}
    tensors = _to_tensors(state)
    others = [str(name) for name, value in tensors.items() if value is None or not isinstance(name, str)]
    if others or not tensors:
        raise CheckpointError(
            f"{path}: no dict of tensors found, neither as the whole file nor under {' or '.join(STATE_KEYS)}"
            + (f"; these entries are not tensors with a name: {listed(others)}" if others else "")
        )
    return Checkpoint(tensors, content)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _to_tensors(state: Mapping) -> dict[Any, Tensor | None]:
    """Arrays as tensors, None for what is neither; an array under two names is copied once."""
    copies, tensors = {}, {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            if id(value) not in copies:  # a view of a pickled buffer may be read-only, and of another byte order
                copies[id(value)] = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            tensors[name] = copies[id(value)]
        else:
            tensors[name] = value if isinstance(value, Tensor) else None
    return tensors


def write_original(path: str | Path, state: Mapping[str, Tensor]):
    """Write a checkpoint that detectron2 loads: `.pth` with tensors, `.pkl` with NumPy arrays (model zoo format).

    The state carries versions: without them the original takes the names for those of early checkpoints.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".pkl"):
        raise CheckpointError(f"{path}: the original's checkpoints end in .pth or .pkl")
    as_arrays = path.suffix == ".pkl"
    tensors = OrderedDict((name, tensor.numpy() if as_arrays else tensor) for name, tensor in state.items())
    modules = ("", "sem_seg_head", "sem_seg_head.predictor")
    tensors._metadata = OrderedDict((module, {"version": 2 if module else 1}) for module in modules)
    content = {"model": tensors, "__author__": "mask2former_hf"}
    with written_whole(path) as staging, staging.open("wb") as file:
        pickle.dump(content, file, protocol=4) if as_arrays else torch.save(content, file)
