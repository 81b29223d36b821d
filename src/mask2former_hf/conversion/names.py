"""Tables of parameter names that are read in both directions."""

import re
from collections.abc import Sequence

from torch import Tensor

# What a field of a template stands for. Short lists instead of "anything": a name that nobody foresaw is not matched.
FIELDS = {
    "i": r"\d+",
    "j": r"\d+",
    "p": r"weight|bias",
    "s": r"weight|bias|running_mean|running_var|num_batches_tracked",
    "a": r"sampling_offsets|attention_weights|value_proj|output_proj",
}
Row = tuple[str | None, str | tuple[str, ...] | None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or converted; the message says what to do."""


class NameTable:
    """Names of another implementation and ours, row by row; the first row that matches a name decides.

    Args:
        rows: pairs (theirs, ours) of templates such as "layers.{i}.fc1.{p}" with the fields of `FIELDS`, equal on both
            sides. A tuple on our side splits a joint matrix along its rows. `None` drops a tensor on purpose, in the
            direction in which there is nothing to translate to.
        source: what the left side belongs to, for error messages.
    """

    def __init__(self, rows: Sequence[Row], source: str):
        self.source = source
        self.rows = [(theirs, ours if isinstance(ours, tuple) else (ours,)) for theirs, ours in rows]
        self._theirs = [(_pattern(theirs), row) for row in self.rows if (theirs := row[0]) is not None]
        self._ours = [
            (_pattern(name), row[0], part, len(row[1]))
            for row in self.rows
            for part, name in enumerate(row[1])
            if name is not None
        ]

    def to_ours(self, name: str) -> tuple[str | None, ...]:
        """Our names of a tensor: several for a joint matrix, `(None,)` if dropped.

        Raises:
            KeyError: for a name that no row matches.
        """
        for pattern, (_, ours) in self._theirs:
            if match := pattern.fullmatch(name):
                return tuple(None if target is None else target.format(**match.groupdict()) for target in ours)
        raise KeyError(name)

    def to_theirs(self, name: str) -> tuple[str | None, int, int]:
        """Their name of one of our tensors or `None` if dropped, and which part of how many it is.

        Raises:
            KeyError: for a name that no row matches.
        """
        for pattern, theirs, part, parts in self._ours:
            if match := pattern.fullmatch(name):
                return None if theirs is None else theirs.format(**match.groupdict()), part, parts
        raise KeyError(name)


def _pattern(template: str) -> re.Pattern:
    pieces = re.split(r"\{(\w)\}", template)  # text, field, text, field, ..., text
    return re.compile(
        "".join(f"(?P<{piece}>{FIELDS[piece]})" if n % 2 else re.escape(piece) for n, piece in enumerate(pieces))
    )


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names for an error message, cut after `most`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_shape(name: str, tensor: Tensor, holds: bool, rule: str):
    """Raise CheckpointError if a tensor that is to be taken apart has not the shape for it."""
    if not holds:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}: it must be {rule}")
