"""Results of a whole video: the masks of its objects by frame, as YouTube-VIS writes them."""

from ..data.rle import coco_code
from .segmentation import Segmentation
from .video_segmenter import FrameStream, WindowStream


class TrackCollector:
    """Collects the `Segmentation`s of one video as run-length codes, a few kilobytes a frame."""

    def __init__(self):
        self.length, self.codes = 0, {}

    def add(self, result: Segmentation):
        """The next frame."""
        for segment, runs in zip(result.segments, result.runs, strict=True):
            code = coco_code(runs, result.size)
            code["counts"] = code["counts"].encode("ascii")
            self.codes.setdefault(segment.id, {})[self.length] = code
        self.length += 1

    def tracks(self, stream: FrameStream | WindowStream) -> list[dict]:
        """A dict per object that the stream has seen, also those that never had a pixel.

        Returns:
            `id`, `category_id` (the label), `score` (the mean over the windows or frames that found it) and
            `segmentations`, per frame a compressed run-length code with bytes, or None.
        """
        return [
            {
                "id": number,
                "category_id": seen.label_id,
                "score": seen.score,
                "segmentations": [self.codes.get(number, {}).get(frame) for frame in range(self.length)],
            }
            for number, seen in stream.seen.items()
        ]


def for_json(tracks: list[dict], video_id: int | str) -> list[dict]:
    """The entries of a YouTube-VIS result file: with the video's id, and codes as text."""

    def as_text(code: dict | None) -> dict | None:
        return None if code is None else {"size": code["size"], "counts": code["counts"].decode("ascii")}

    return [
        {"video_id": video_id, **track, "segmentations": [as_text(code) for code in track["segmentations"]]}
        for track in tracks
    ]
