"""A part of a data set, and a share of one that is kept to measure on, by whole sequences where names show them."""

import os
import re
from collections.abc import Sequence

import numpy as np

from .example import Example
from .reader import Reader, annotation, read_bands_of
from .videos import VideoReader

# "0001TP_006690" -> "0001TP", "clip-3/frame0012" -> "clip-3/frame": what stands before the number of the frame
_FRAME = re.compile(r"^(.*?)[-_. ]*[a-zA-Z]?\d+$")


class Part(Reader):
    """Examples, or videos, of a data set by their indices."""

    def __init__(self, dataset, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices
        self.classes, self.task = dataset.classes, dataset.task

    @property
    def channels(self) -> int | None:
        return getattr(self.dataset, "channels", None)

    @channels.setter
    def channels(self, channels: int | None):
        read_bands_of(self.dataset, channels)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[self._index(index)]

    def annotation(self, index: int) -> Example:
        """The example, without its image where the reader can do that."""
        return annotation(self.dataset, self._index(index))

    def most_objects(self) -> int:
        """Of any video; see `VideoReader`."""
        return self.dataset.most_objects()

    def check_headers(self, progress: bool = True):
        if hasattr(self.dataset, "check_header"):
            self._check_all(self.check_header, progress)

    def check_header(self, index: int):
        """As `FileReader.check_header`."""
        self.dataset.check_header(self._index(index))

    def _index(self, index: int) -> int:
        self._check_index(index)
        return self.indices[index]


def hold_out(dataset, share: float, seed: int = 0) -> tuple[Part, Part, str]:
    """Divide a data set into a part to train on and one to measure on.

    Frames of one film are much alike: where file names are `<sequence><number>` and show several sequences of several
    frames, whole sequences are held out.

    Args:
        dataset: a reader with `file_names()`; others are divided example by example.
        share: of the examples to hold out, above 0 and below 1; with sequences, as near to it as they allow.
        seed: of the choice.

    Returns:
        The two parts, and in words what was held out.

    Raises:
        ValueError: for a share outside 0 to 1, or fewer than two examples.
    """
    if not 0 < share < 1 or len(dataset) < 2:
        raise ValueError(
            f"held_out={share} of {len(dataset)} examples: must leave some to train on and some to measure"
        )
    wanted = max(1, round(share * len(dataset)))
    rng = np.random.default_rng(seed)
    sequences = _sequences(dataset.file_names()) if hasattr(dataset, "file_names") else {}
    if not sequences:
        held = sorted(rng.permutation(len(dataset))[:wanted].tolist())
        what = "videos" if isinstance(dataset, VideoReader) else "images"
        text = f"{len(held)} of {len(dataset)} {what}, drawn by the seed"
    else:
        names = [list(sequences)[index] for index in rng.permutation(len(sequences))]
        chosen = [min(names, key=lambda name: abs(len(sequences[name]) - wanted))]
        for name in names:
            size = sum(len(sequences[other]) for other in chosen)
            if name not in chosen and size + len(sequences[name]) <= wanted and len(chosen) + 1 < len(names):
                chosen.append(name)
        held = sorted(index for name in chosen for index in sequences[name])
        text = f"{len(held)} of {len(dataset)} images: the sequences {', '.join(sorted(chosen))} of {len(names)}"
    kept = sorted(set(range(len(dataset))) - set(held))
    return Part(dataset, kept), Part(dataset, held), text


def _sequences(names: Sequence[str]) -> dict[str, list[int]]:
    """Sequence -> indices; nothing unless there are several and nearly all images are in one with others."""
    found = {}
    for index, name in enumerate(names):
        frame = _FRAME.match(os.path.splitext(name)[0])
        found.setdefault(frame[1] if frame else name, []).append(index)
    alone = sum(len(indices) == 1 for indices in found.values())
    return found if len(found) > 1 and alone <= 0.1 * len(names) else {}
