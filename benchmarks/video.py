"""Videos: resident memory over many frames, and the cost of linking objects.

    python benchmarks/video.py [--frames 1000] [--threads 1]

The model has random weights: neither memory nor time depends on them, where every query counts.
"""

import argparse
import time

import numpy as np
import torch

from mask2former_hf import Mask2FormerVideoProcessor, MovingScenes, VideoSegmenter, new_model
from mask2former_hf.inference.tracking import Tracker
from mask2former_hf.training.clips import video_model

REPORTED = (50, 200, 1000, 5000)  # frames
SIZE = (96, 171)


def resident() -> int:
    """Megabytes of this process now, which the largest so far would hide."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def memory(frames: int):
    torch.manual_seed(0)
    size = {"shortest_edge": SIZE[0], "longest_edge": SIZE[1]}
    model = video_model(new_model("tiny", MovingScenes.classes, "instance"))
    stream = VideoSegmenter.of(model, Mask2FormerVideoProcessor(size=size)).stream(threshold=0.0)
    video = MovingScenes(1, 16, size=SIZE)[0]
    for number in range(1, frames + 1):
        stream.push(video.frame(number % video.length))
        if number in REPORTED:
            print(f"{number} frames: {resident()} MB, {len(stream.tracker.tracks)} objects remembered", flush=True)


def linking(objects: int, size: tuple[int, int] = (480, 854), updates: int = 20):
    generator = torch.Generator().manual_seed(0)
    tracker, cells = Tracker(), (size[0] // 4) * (size[1] // 4)
    embeddings = torch.randn(objects, 256, generator=generator)
    masks = torch.rand(objects, cells, generator=generator) > 0.9
    times = []
    for _ in range(updates):
        start = time.process_time()
        tracker.update(embeddings, [0] * objects, masks)
        times.append(time.process_time() - start)
    print(f"linking {objects} objects at {size[0]}x{size[1]}: {1000 * np.median(times):.1f} ms of one core a frame")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    linking(20)
    memory(arguments.frames)
