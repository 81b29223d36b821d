"""A checkpoint's model and processor, complete or not at all."""

import os
import pickle
import textwrap
import warnings

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..model.configuration_mask2former import Mask2FormerConfig
from ..model.forked_processes import one_thread_if_forked
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForSegmentation, Mask2FormerForUniversalSegmentation
from ..model.modeling_mask2former_video import Mask2FormerForVideoSegmentation

# What transformers and the libraries below it raise for files that are missing, damaged, or of something else.
LOADING_ERRORS = (
    OSError,
    ValueError,  # also of json
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
LONGEST = 500  # characters of an error that someone will read: a field may hold anything
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class LoadingError(ValueError):
    """A checkpoint that is not there, cannot be read, or lacks tensors."""


def is_video_checkpoint(name: str) -> bool:
    """Whether the config of a checkpoint names the model of clips; False also where there is no checkpoint."""
    try:
        fields, _ = Mask2FormerConfig.get_config_dict(os.fspath(name))
    except LOADING_ERRORS:
        return False
    return Mask2FormerForVideoSegmentation.__name__ in (fields.get("architectures") or ())


@one_thread_if_forked()
def load_model(
    name: str, model_class: type[Mask2FormerForSegmentation] = Mask2FormerForUniversalSegmentation, **fields
) -> Mask2FormerForSegmentation:
    """The model of a checkpoint, in evaluation mode, every tensor of it from the file.

    Args:
        name: folder or Hub id.
        model_class: of images, as which checkpoints of clips segment single frames, or of clips.
        fields: of `Mask2FormerConfig`, instead of the checkpoint's; also `dtype`.

    Raises:
        LoadingError: if there is no such checkpoint, if it cannot be read, if it lacks tensors of the model, or if
            some of its numbers are nan or infinite.
    """
    name = os.fspath(name)
    model, report = read_model(name, model_class, **fields)
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise LoadingError(
            f"{name}: {len(missing)} tensors of the model are not in the checkpoint ({shown}); with random ones in "
            "their place the results would be worthless. Use a complete checkpoint"
        )
    if broken := not_finite(model):
        raise LoadingError(
            f"{name}: {broken[0]} has values that are nan or infinite, as {len(broken)} of its tensors: its training "
            "failed, or the file is damaged. Use another checkpoint"
        )
    return model.eval()


def read_model(
    name: str, model_class: type[Mask2FormerForSegmentation] = Mask2FormerForUniversalSegmentation, **options
) -> tuple[Mask2FormerForSegmentation, dict]:
    """The model of a checkpoint, complete or not, and transformers' report: `missing_keys`, `unexpected_keys`, ...

    Args:
        name, model_class: as in `load_model`.
        options: of `from_pretrained`.

    Raises:
        LoadingError: if there is no such checkpoint, or if it cannot be read.
    """
    options = {"return_dict": True} | options  # outputs are read by name, whatever the checkpoint prefers
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its table of missing tensors; ours is the line below
    try:
        return model_class.from_pretrained(name, output_loading_info=True, **options)
    except LOADING_ERRORS as error:
        raise LoadingError(f"{name}: {_reason(name, error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def not_finite(model) -> list[str]:
    """Names of tensors with a nan or an infinite number; their sums say so at the price of one reading."""
    floats = ((name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point())
    return [name for name, tensor in floats if not tensor.sum(dtype=torch.float64).isfinite()]


def load_processor(
    name: str, processor_class: type[Mask2FormerImageProcessor] = Mask2FormerImageProcessor
) -> Mask2FormerImageProcessor:
    """The image processor of a checkpoint; the default one, with a warning, if the checkpoint has none.

    Raises:
        LoadingError: if its file cannot be read.
    """
    name = os.fspath(name)
    try:
        return processor_class.from_pretrained(name)
    except LOADING_ERRORS as error:
        present = [file for file in PROCESSOR_FILES if os.path.exists(os.path.join(name, file))]
        if present or not isinstance(error, OSError):
            file = present[0] if present else PROCESSOR_FILES[0]
            raise LoadingError(f"{name}: {file}: {first_line(error)}") from error
    warnings.warn(
        f"{name} has no {PROCESSOR_FILES[0]}; images are resized to {processor_class.size['shortest_edge']} pixels",
        stacklevel=2,
    )
    return processor_class()


def to_device(model: Mask2FormerForSegmentation, device: str | torch.device | None):
    """The model on a device; None for a GPU if there is one.

    Raises:
        ValueError: for a device that does not exist here.
    """
    try:
        return model.to(torch.device(default_device() if device is None else device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r}: {first_line(error)}") from error


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class if there is none; of a config's field what is wrong with it."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], LONGEST) if lines else type(error).__name__


def _reason(name: str, error: Exception) -> str:
    if not os.path.isdir(name):
        return f"no checkpoint found as a folder or on the Hub ({first_line(error)})"
    if not os.path.exists(os.path.join(name, "config.json")):
        return "the folder has no config.json; give a checkpoint's folder"
    return f"the checkpoint cannot be read ({type(error).__name__}: {first_line(error)})"
