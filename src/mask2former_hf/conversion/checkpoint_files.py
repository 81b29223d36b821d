"""Checkpoint files of other projects, read without running what is in them, and written for detectron2."""

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from .names import CheckpointError, listed

ZIP = b"PK\x03\x04"  # torch.save since 1.6, whatever the file is called
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
        is_zip = file.read(4) == ZIP
        file.seek(0)
        content = _read_pickle(file, path) if path.suffix == ".pkl" and not is_zip else _read_torch(file, path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not a dict of tensors")
    content = dict(content)
    state = next((content.pop(key) for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    if state is None:
        state, content = content, {}
    tensors = {name: _to_tensor(value) for name, value in state.items()}
    others = [str(name) for name, value in tensors.items() if value is None or not isinstance(name, str)]
    if others or not tensors:
        raise CheckpointError(
            f"{path}: no dict of tensors found, neither as the whole file nor under {' or '.join(STATE_KEYS)}"
            + (f"; these entries are not tensors with a name: {listed(others)}" if others else "")
        )
    return Checkpoint(tensors, content)


def _to_tensor(value) -> Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())  # a view of a pickled buffer may be read-only
    return value.detach() if isinstance(value, Tensor) else None


def _read_torch(file, path: Path | str):
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read without running code that it names: {_first_sentence(error)} "
            "Tensors alone are safe: in the environment that wrote the file, save them with "
            "torch.save({'model': model.state_dict()}, path)"
        ) from error
    except (RuntimeError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a file of torch.save ({type(error).__name__}: {_first_sentence(error)})"
        ) from error


def _first_sentence(error: Exception) -> str:
    """torch's message about an unsafe file is a page of advice; the line that matters names the global."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "global" in line.lower()]
    return (named or lines or [type(error).__name__])[-1 if named else 0]


def _read_pickle(file, path: Path):
    try:
        return RestrictedUnpickler(file, encoding="latin1").load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{path} is damaged or not a pickle ({type(error).__name__}: {error})") from error


class RestrictedUnpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings, NumPy arrays and tensors, and refuses every other global by name.

    Each allowed function is a wrapper made for this file alone, so that a pickle that sets attributes on what it was
    given changes nothing outside.
    """

    def __init__(self, file, **options):
        super().__init__(file, **options)
        self._allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("numpy", "dtype"): np.dtype,
            ("numpy", "ndarray"): None,  # only ever the first argument of _reconstruct
            ("_codecs", "encode"): lambda text, encoding: codecs.latin_1_encode(text)[0],
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *rest: (
                torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            # torch's own calls torch.load without restriction on the bytes that the pickle gives it
            ("torch.storage", "_load_from_bytes"): lambda data: _read_torch(io.BytesIO(data), "a part of it"),
        }
        for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
            self._allowed[core + ".multiarray", "_reconstruct"] = lambda subtype, shape, dtype: np.ndarray(
                shape, np.dtype(dtype)
            )
            self._allowed[core + ".numeric", "_frombuffer"] = lambda buffer, dtype, shape, order: np.frombuffer(
                buffer, dtype
            ).reshape(shape, order=order)

    def find_class(self, module: str, name: str):
        try:
            return self._allowed[module, name]
        except KeyError:
            raise CheckpointError(
                f"the pickle asks for {module}.{name}, which is not needed for tensors and may run code; nothing was "
                "run. If you trust the file, save its tensors anew as {'model': state_dict} with torch.save"
            ) from None

    def persistent_load(self, pid):
        raise CheckpointError("the pickle refers to data outside itself, which a file of tensors does not need")


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
    staging = path.with_name(f".{path.name}.part")
    try:
        with staging.open("wb") as file:
            pickle.dump(content, file, protocol=4) if as_arrays else torch.save(content, file)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
