"""Images per second of `predict`: what each stage of an image costs, and what more processes bring.

    python benchmarks/throughput.py --model CHECKPOINT --images DIR [--count 48] [--repeats 3] [--task panoptic]
        [--threshold 0.5] [--batch-size 1] [--device cpu] [--no-overlays] [--json FILE]

First the CPU time that one thread needs for an image: reading, resizing, the network with what makes numbers of
the pixels, the result, the overlay, and COCO's files. Then the whole of it, reading to files, in one process and in
two, with one thread of torch each, without workers and with two: each variant once per repeat, in turn, the images
taken again and again until there are `--count`. The clock starts when every process has its model and has done an
image. Beside the median rate stands the CPU time of an image, all processes together, which other users of the machine
change little.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Record, machine

from mask2former_hf import Segmenter
from mask2former_hf.data.image_lists import ImageFiles, find_images
from mask2former_hf.inference.many_images import ManyImages
from mask2former_hf.inference.result_files import OutputSettings, ResultFolder
from mask2former_hf.inference.run_folder import RunFolder, share_of

VARIANTS = {
    "1 process": (1, 0),
    "1 process, 2 workers": (1, 2),
    "2 processes": (2, 0),
    "2 processes, 2 workers": (2, 2),
}
SHARDS = 2


def main():
    arguments = parse()
    record = Record(arguments.json)
    print(f"{arguments.model}, {arguments.count} images, batch size {arguments.batch_size}, {machine()}")
    if arguments.device == "cpu":
        spent = stages(arguments)
        record.add({"stages_ms": spent})
        whole = sum(spent.values())
        print(*(f"{name} {ms:.1f} ms ({100 * ms / whole:.0f} %)" for name, ms in spent.items()), sep=", ")
    rates = {name: [] for name in arguments.variants}
    children = [Child() for _ in range(max(VARIANTS[name][0] for name in arguments.variants))]
    for _ in range(arguments.repeats):
        for name in arguments.variants:
            rates[name].append(measure(arguments, children, *VARIANTS[name]))
    for process in children:
        process.end()
    first = statistics.median(rate for rate, _ in rates[arguments.variants[0]])
    for name, values in rates.items():
        rate, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        record.add({"variant": name, "images_per_second": rate, "cpu_seconds_per_image": cpu, "all": values})
        print(f"{name:24}{rate:7.2f} images/s {rate / first:6.2f} x {1000 * cpu:8.0f} ms of CPU per image")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--task")
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no-overlays", action="store_true")
    parser.add_argument("--json")
    return parser.parse_args()


def prepare(arguments):
    """Segmenter, its rules, images, and what is written."""
    segmenter = Segmenter(arguments.model, task=arguments.task, device=arguments.device)
    rules = segmenter.rules(threshold=arguments.threshold)
    paths = find_images([arguments.images])[0].paths
    images = ImageFiles([paths[k % len(paths)] for k in range(arguments.count)])
    settings = OutputSettings(rules.task, rules.id2label, rules.stuff_label_ids, overlays=not arguments.no_overlays)
    return segmenter, rules, images, settings


def stages(arguments) -> dict[str, float]:
    """Milliseconds of CPU time of each stage of an image, the median over all images."""
    import torch
    from PIL import Image

    from mask2former_hf.inference.results import segment_outputs
    from mask2former_hf.inference.segmenter import read

    torch.set_num_threads(1)
    segmenter, rules, images, settings = prepare(arguments)
    resizing, spent = segmenter.resizing(rules), {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        plain = ResultFolder(Path(folder), OutputSettings(**{**vars(settings), "overlays": False}))

        def timed(name, function, *values):
            start = time.process_time()
            result = function(*values)
            spent.setdefault(name, []).append(1000 * (time.process_time() - start))
            return result

        def forward(pixels):
            inputs = segmenter.processor([Image.fromarray(pixels)], do_resize=False, return_tensors="pt")
            return segmenter.model(**inputs)

        for number in range(len(images)):
            found = images[number]
            image = timed("read", read, found.source)
            outputs = timed("network", forward, timed("resize", resizing, image))
            result = timed("result", segment_outputs, outputs, rules, [image.shape[:2]])[0]
            if settings.overlays:
                timed("overlay", lambda result=result, image=image: result.plot(image).save(
                    Path(folder) / "overlay.png", compress_level=1))  # fmt: skip
            timed("files", plain.write, found, result, None)
    return {name: statistics.median(values) for name, values in spent.items()}


class Child:
    """A process that keeps its model from one measurement to the next."""

    def __init__(self):
        # Not this file as a script: the processes of a pool import again what a script imports, torch here.
        command = [sys.executable, "-c", "import throughput; throughput.child(throughput.parse())", *sys.argv[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def say(self, *words):
        print(*words, file=self.process.stdin, flush=True)

    def hear(self) -> str:
        return self.process.stdout.readline()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def measure(arguments, children: list[Child], processes: int, workers: int) -> tuple[float, float]:
    """Images per second, and seconds of CPU per image, of a number of processes."""
    children = children[:processes]
    with tempfile.TemporaryDirectory() as folder:
        for number, process in enumerate(children):
            process.say(folder, number, processes, workers)
        for process in children:
            process.hear()  # that it is ready
        start = time.perf_counter()
        for process in children:
            process.say("go")
        spent = [float(process.hear()) for process in children]
        seconds = time.perf_counter() - start
    return arguments.count / seconds, sum(spent) / arguments.count


def child(arguments):
    """Does its share of the images whenever it is told to, and says how many seconds of CPU it took, workers
    included."""
    segmenter, rules, images, settings = prepare(arguments)
    segmenter(images[0].source)
    for line in iter(sys.stdin.readline, ""):
        output, process, processes, workers = line.split()
        folder = RunFolder(Path(output), len(images), int(processes) * SHARDS)
        options = {"batch_size": arguments.batch_size, "workers": int(workers)}
        run = ManyImages(segmenter, rules, images, folder, settings, **options)
        for begun in [run.workers.submit(time.sleep, 1) for _ in range(int(workers))]:
            run.workers.result(begun)  # all of them are there
        print("ready", flush=True)
        sys.stdin.readline()
        before = cpu_seconds()
        run.run(share_of(int(process), int(processes), folder.num_shards))
        print(cpu_seconds() - before, flush=True)


def cpu_seconds() -> float:
    """Of this process, and of its workers that have ended, their start included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
