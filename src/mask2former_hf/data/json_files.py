"""What commands write: json that any program reads, never half of it."""

import json
import math
from numbers import Integral
from pathlib import Path

from .whole_files import written_whole


def write_json(path: Path, content, indent: int | None = 2):
    """Write json in one step; figures that are not numbers (nan, infinite) become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as staging:
        staging.write_text(json.dumps(_numbers(content), indent=indent, allow_nan=False) + "\n")


def _numbers(content):
    if isinstance(content, dict):
        return {name: _numbers(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_numbers(value) for value in content]
    if content is None or isinstance(content, str | bool):
        return content
    if isinstance(content, Integral):
        return int(content)
    return float(content) if math.isfinite(content) else None
