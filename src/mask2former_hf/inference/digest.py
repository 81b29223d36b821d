"""A text that two segmenters share only if they have the same weights, config and processor."""

import hashlib
import json
from pathlib import Path

from .exported import ExportedModel

BLOCK = 1 << 20  # bytes
PLACES = ("_name_or_path", "transformers_version")  # of a config: where it was read, and by what


def digest(model, processor) -> str:
    """Of a model and its processor, or of an `ExportedModel`, whose folder has both."""
    total = hashlib.sha256()
    if isinstance(model, ExportedModel):
        for path in sorted(path for path in Path(model.folder).iterdir() if path.is_file()):
            total.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    total.update(block)
        return total.hexdigest()
    import torch

    fields = {name: value for name, value in model.config.to_dict().items() if name not in PLACES}
    total.update(json.dumps([fields, processor.to_dict()], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
