"""Checkpoints named on the command line."""

import os
import sys

import torch

from .. import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from ..inference.loading import LOADING_ERRORS, first_line, load_complete
from .main import UserError


def load_model(name: str, flag: str = "--model", **fields) -> Mask2FormerForUniversalSegmentation:
    """`load_complete`; what is wrong becomes a `UserError` that names the flag."""
    try:
        return load_complete(name, **fields)
    except ValueError as error:
        raise UserError(f"{flag} {error}") from error


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
