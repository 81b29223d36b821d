"""Checkpoints named on the command line, and one line about whatever is wrong with them."""

import os
import pickle
import sys

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from .. import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from ..conversion.names import listed
from .main import UserError

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


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its class if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def load_model(name: str, flag: str = "--model", **fields) -> Mask2FormerForUniversalSegmentation:
    """The model of a checkpoint, in evaluation mode, every tensor of it from the file.

    Args:
        name: folder or Hub id.
        flag: what the user gave it with, for the message.
        fields: of `Mask2FormerConfig`, instead of the checkpoint's.

    Raises:
        UserError: if there is no such checkpoint, if it cannot be read, or if it lacks tensors of the model.
    """
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of missing tensors; ours is the line below
    try:
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(name, output_loading_info=True, **fields)
    except LOADING_ERRORS as error:
        raise UserError(f"{flag} {name}: {_reason(name, error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{flag} {name}: {len(missing)} tensors of the model are not in the checkpoint ({listed(missing)}); with "
            "random ones in their place the results would be worthless. Use a complete checkpoint"
        )
    return model.eval()


def load(name: str, device: str, flag: str = "--model"):
    """Model on a device, and processor, of a checkpoint; the default processor if it has none."""
    model = load_model(name, flag)
    try:
        processor = Mask2FormerImageProcessor.from_pretrained(name)
    except LOADING_ERRORS as error:
        files = ("preprocessor_config.json", "processor_config.json")
        present = [file for file in files if os.path.exists(os.path.join(name, file))]
        if present or not isinstance(error, OSError):
            raise UserError(f"{flag} {name}: {present[0] if present else files[0]}: {first_line(error)}") from error
        print(f"{name} has no preprocessor_config.json; images are resized to 800 pixels", file=sys.stderr)
        processor = Mask2FormerImageProcessor()
    try:
        return model.to(torch.device(device)), processor
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {first_line(error)}") from error


def _reason(name: str, error: Exception) -> str:
    if not os.path.isdir(name):
        return f"no checkpoint found as a folder or on the Hub ({first_line(error)})"
    if not os.path.exists(os.path.join(name, "config.json")):
        return "the folder has no config.json; give a checkpoint's folder"
    return f"the checkpoint cannot be read ({type(error).__name__}: {first_line(error)})"
