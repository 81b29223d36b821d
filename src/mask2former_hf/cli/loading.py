"""Checkpoints named on the command line; what is wrong with them in one line that names the flag."""

import sys
import warnings

from ..inference import loading
from ..inference.exported import is_exported
from ..inference.precision import dtype_field
from .main import UserError


def load_model(name: str, flag: str = "--model", **fields):
    """`inference.loading.load_model`; `flag` is what the user gave the checkpoint with."""
    if is_exported(name):
        raise UserError(f"{flag} {name}: is an export, which `predict` takes for images; give its checkpoint")
    try:
        return loading.load_model(name, **fields)
    except loading.LoadingError as error:
        raise UserError(f"{flag} {error}") from error


def load(name: str, device: str | None, flag: str = "--model", dtype: str | None = None):
    """Model on a device, and processor, of a checkpoint; the default processor if it has none."""
    model = load_model(name, flag, **dtype_field(dtype, device))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            processor = loading.load_processor(name)
    except loading.LoadingError as error:
        raise UserError(f"{flag} {error}") from error
    for warning in caught:
        print(warning.message, file=sys.stderr)
    try:
        return loading.to_device(model, device), processor
    except ValueError as error:
        raise UserError(f"--{str(error).replace('device=', 'device ', 1).replace(chr(39), '')}") from error
