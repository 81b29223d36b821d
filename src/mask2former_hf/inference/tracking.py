"""Which object of this frame, or window of frames, is which of those before: ids that stay.

Objects are matched by what the network says about them, the embedding of their query, and by where they are, the
overlap of masks. The idea to follow queries by their embeddings is MinVIS' (Huang et al., NeurIPS 2022); here only
objects that were found are followed, over a memory of several updates, so that one that was hidden gets its id back.

Letters: `N` objects of an update, `M` tracks, `C` channels, `S` cells of the masks, at any resolution.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass
class Track:
    """One object through a video.

    Args:
        id: a number no other object has had.
        label: class, that of the last update.
        embeddings: (C,) of unit length each, the newest last.
        mask: (S',) bool where it was in the last update; None if it was not found then.
        age: updates since it was found.
    """

    id: int
    label: int
    embeddings: deque
    mask: Tensor | None = None
    age: int = 0

    def embedding(self) -> Tensor:
        """The mean over the memory, later ones weighing more."""
        weights = torch.arange(1, len(self.embeddings) + 1, device=self.embeddings[0].device)
        stacked = torch.stack(tuple(self.embeddings))
        return torch.nn.functional.normalize((stacked * weights[:, None]).sum(0), dim=0)


@dataclass
class Tracker:
    """Gives the objects of consecutive frames their ids.

    Args:
        memory: updates whose embeddings are remembered of a track.
        patience: updates after which a track that was not found ends; what comes later is a new object.
        overlap: mask IoU from which on an object may be the one that was there, whatever it looks like.
        likeness: cosine of embeddings from which on it may be one that was found nowhere near, such as one that was
            hidden.
        same_label: added for objects of equal class.
        look: what the cosine counts beside the overlap, both up to 1; 0 for the overlap alone.
    """

    memory: int = 5
    patience: int = 30
    overlap: float = 0.3
    likeness: float = 0.75
    same_label: float = 0.25
    look: float = 1.0
    tracks: list[Track] = field(default_factory=list)
    next_id: int = 1

    def update(
        self, embeddings: Tensor, labels: list[int], masks: Tensor, next_masks: Tensor | None = None
    ) -> list[int]:
        """The ids of the objects of a frame or window.

        Args:
            embeddings: (N, C) of their queries.
            labels: their classes.
            masks: (N, S) bool, to be compared with the last S cells of the `next_masks` of the last update.
            next_masks: (N, S') bool for the next update; `masks` if not given.

        Returns:
            N ids, each different.
        """
        embeddings = torch.nn.functional.normalize(embeddings.detach().float(), dim=-1)
        next_masks = masks if next_masks is None else next_masks
        found = self._match(embeddings, labels, masks)
        for track in self.tracks:
            track.mask, track.age = None, track.age + 1
        ids = []
        for number, (embedding, label) in enumerate(zip(embeddings, labels, strict=True)):
            track = found.get(number)
            if track is None:
                track = Track(self.next_id, label, deque(maxlen=self.memory))
                self.next_id += 1
                self.tracks.append(track)
            track.embeddings.append(embedding)
            track.label, track.mask, track.age = label, next_masks[number], 0
            ids.append(track.id)
        self.tracks = [track for track in self.tracks if track.age <= self.patience]
        return ids

    def _match(self, embeddings, labels, masks) -> dict[int, Track]:
        if not self.tracks or not len(embeddings):
            return {}
        likeness = embeddings @ torch.stack([track.embedding() for track in self.tracks]).T  # (N, M)
        S = masks.shape[1]
        before = masks.new_zeros(len(self.tracks), S)
        for row, track in zip(before, self.tracks, strict=True):
            if track.mask is not None:
                row.copy_(track.mask[len(track.mask) - S :])
        overlap = mask_iou(masks, before)
        of_tracks = torch.tensor([track.label for track in self.tracks], device=likeness.device)
        same = torch.tensor(labels, device=likeness.device)[:, None] == of_tracks
        allowed = (overlap >= self.overlap) | (likeness >= self.likeness) & same
        value = torch.where(allowed, self.look * likeness + overlap + self.same_label * same, -1e3).cpu()
        rows, columns = linear_sum_assignment(value.numpy(), maximize=True)
        pairs = zip(rows.tolist(), columns.tolist(), strict=True)
        return {row: self.tracks[column] for row, column in pairs if value[row, column] > -1e3}

    def state_dict(self) -> dict:
        """All that is remembered, of plain lists and tensors for `torch.save`."""
        tracks = [vars(track) | {"embeddings": list(track.embeddings)} for track in self.tracks]
        return {"next_id": self.next_id, "tracks": tracks}

    def load_state_dict(self, state: dict):
        """Go on where `state_dict` was taken."""
        self.next_id = state["next_id"]
        self.tracks = [
            Track(**fields | {"embeddings": deque(fields["embeddings"], maxlen=self.memory)})
            for fields in state["tracks"]
        ]


def mask_iou(masks: Tensor, others: Tensor) -> Tensor:
    """(N, M) intersection over union of (N, S) and (M, S) bool masks; 0 where both are empty."""
    masks, others = masks.float(), others.float()
    shared = masks @ others.T
    union = masks.sum(1, keepdim=True) + others.sum(1) - shared
    return shared / union.clamp(min=1)
