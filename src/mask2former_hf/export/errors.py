"""What goes wrong in an export by the user's choice, in one line."""

from importlib import import_module


class ExportError(ValueError):
    """A model, setting or folder that cannot be exported, or an export that differs from its checkpoint."""


EXTRAS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "onnxruntime", "openvino")}  # as in setup.cfg


def require(name: str, extra: str = "onnx"):
    """The module `name` of an optional package.

    Raises:
        ImportError: with the line that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"exporting needs {name.split('.')[0]}: pip install {' '.join(EXTRAS[extra])} ({error})"
        ) from error
