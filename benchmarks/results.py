"""Time from logits to the result of one large image, interleaved with another version of the package.

    python benchmarks/results.py --against FOLDER/src [--size 2160 3840] [--segments 20] [--repeats 5] [--tasks ...]

100 queries with class logits of 133 classes; as many of them as there are --segments have a segment each (cells around
random points), the others are "no object". The canvas is the default processor's of a photo of that size. "mixed
first" is the semantic result of models that serve nothing else (`resize_masks_first=False`). FOLDER is a checkout of
the version to compare with (`git worktree add`). The figures are processor time of one thread, which other programs of
the machine disturb least. "equal": every segment has the same pixels, and its score to 1e-6.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys

QUERIES, CLASSES, THINGS = 100, 133, 80
TASKS = ("panoptic", "instance", "semantic", "mixed first")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="src folder of another checkout")
    parser.add_argument("--size", nargs=2, type=int, default=(2160, 3840), help="rows and columns of the result")
    parser.add_argument("--segments", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.size, arguments.segments)
        return
    ours, other = (Worker(arguments, source) for source in (None, arguments.against))
    for task in arguments.tasks:
        times, equal = ([], []), True
        for _ in range(arguments.repeats):
            answers = [worker.ask(task) for worker in (ours, other)]
            equal &= answers[0]["digest"] == answers[1]["digest"]
            pairs = zip(*(answer["scores"] for answer in answers), strict=True)
            equal &= all(one == other or math.isclose(one, other, rel_tol=1e-6) for one, other in pairs)
            for row, answer in zip(times, answers, strict=True):
                row.append(answer["seconds"])
        now, before = (statistics.median(row) for row in times)
        segments = answers[0]["segments"]
        print(f"{task:11} {segments:3} segments: {before:.3f} s before, {now:.3f} s now, {before / now:.1f} x", end="")
        print(", equal" if equal else ", NOT EQUAL", flush=True)


class Worker:
    """A process that imports one version of the package, and answers a task with time and digest of its result."""

    def __init__(self, arguments, source: str | None):
        flags = ["--size", *map(str, arguments.size), "--segments", str(arguments.segments), "--against", ""]
        start = "" if source is None else f"sys.path.insert(0, {source!r}); "
        code = f"import runpy, sys; {start}sys.argv = {[__file__, *flags, '--worker']!r}; "
        code += f"runpy.run_path({__file__!r}, run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task: str) -> dict:
        print(task, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def work(size, segments: int):
    import time

    import torch

    from mask2former_hf.inference.results import segment_logits
    from mask2former_hf.inference.rules import Rules

    torch.set_num_threads(1)
    scale = min(800 / min(size), 1333 / max(size))
    image = [round(side * scale) for side in size]
    canvas = [-(-side // 32) * 32 for side in image]
    logits = (*made_up(segments, canvas), canvas, image, tuple(size))
    names, stuff = {label: str(label) for label in range(CLASSES)}, tuple(range(THINGS, CLASSES))
    for line in sys.stdin:
        task = line.strip()
        threshold, only = {"instance": 0.5}.get(task, 0.8), task == "mixed first"
        rules = Rules("semantic" if only else task, names, stuff, semantic_only=only, threshold=threshold)
        with torch.inference_mode():
            start = time.process_time()
            result = segment_logits(logits, rules)
            seconds = time.process_time() - start
        said = [(s.id, s.label, s.area, s.box) for s in result.segments]
        runs = b"".join(part.tobytes() for runs in result.runs for part in (runs.starts, runs.stops))
        digest = hashlib.sha256(runs + repr(said).encode()).hexdigest()
        answer = {"seconds": seconds, "segments": len(said), "digest": digest}
        print(json.dumps(answer | {"scores": [s.score for s in result.segments]}), flush=True)


def made_up(segments: int, canvas):
    """Class logits (Q, K + 1), mask logits (Q, h, w): each segment is what is nearest to its point, with noise."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (segments,), generator=generator)
    class_logits = torch.randn(QUERIES, CLASSES + 1, generator=generator)
    class_logits[segments:, -1] += 10
    class_logits[torch.arange(segments), labels] += 8 + 2 * torch.rand(segments, generator=generator)
    height, width = (side // 4 for side in canvas)
    noise = F.interpolate(torch.randn(1, QUERIES, 24, 42, generator=generator), (height, width), mode="bicubic")[0]
    points = torch.rand(segments, 2, generator=generator) * torch.tensor([height, width])
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
    distances = (grid[None] - points[:, None, None]).norm(dim=-1)  # (segments, h, w)
    two = distances.topk(2, dim=0, largest=False).values
    others = torch.where(distances == two[0], two[1], two[0])
    mask_logits = 2 * noise - 6
    mask_logits[:segments] += 6 + (others - distances) / 2
    return class_logits, mask_logits


if __name__ == "__main__":
    main()
