"""Checkpoints by folder or Hub id, every tensor from the file, and one line about whatever is wrong with them."""

import os
import pickle

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from .. import Mask2FormerForUniversalSegmentation

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


def load_complete(name: str, **fields) -> Mask2FormerForUniversalSegmentation:
    """The model of a checkpoint, in evaluation mode, every tensor of it from the file.

    Args:
        name: folder or Hub id.
        fields: of `Mask2FormerConfig`, instead of the checkpoint's.

    Raises:
        ValueError: if there is no such checkpoint, if it cannot be read, or if it lacks tensors of the model. The text
            begins with the name.
    """
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of missing tensors; ours is the line below
    try:
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(name, output_loading_info=True, **fields)
    except LOADING_ERRORS as error:
        raise ValueError(f"{name}: {_reason(name, error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{name}: {len(missing)} tensors of the model are not in the checkpoint ({shown}); with "
            "random ones in their place the results would be worthless. Use a complete checkpoint"
        )
    return model.eval()


def _reason(name: str, error: Exception) -> str:
    if not os.path.isdir(name):
        return f"no checkpoint found as a folder or on the Hub ({first_line(error)})"
    if not os.path.exists(os.path.join(name, "config.json")):
        return "the folder has no config.json; give a checkpoint's folder"
    return f"the checkpoint cannot be read ({type(error).__name__}: {first_line(error)})"
