"""Inference of stock transformers' Mask2Former and ours: same process, same weights, same images.

    python benchmarks/inference.py [--size 640] [--batch 1] [--repeats 5] [--backbones r50 swin-t]
        [--device cpu] [--dtype float32] [--variants stock ours compiled graph] [--processor-time] [--json FILE]

"compiled" is ours under `torch.compile`, "graph" ours as a CUDA graph, "float32" stock in float32 whatever the dtype:
if it runs, others are held against it, else against stock in their dtype. Differences are those of class and mask
logits from stock's in float32, in units of the largest. On a GPU the way of an image is timed as well: decoding and
resizing on the host, the network, its panoptic result, and `Segmenter` with a model and with a checkpoint, which it
replays.
"""

import argparse
import copy
import io
import statistics
import tempfile
import time
from itertools import product

import numpy as np
import torch
from common import BACKBONES, Record, equal_models, interleaved_medians, machine
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor, Segmenter

OUTPUTS = ("class_queries_logits", "masks_queries_logits")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["r50", "swin-t"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["stock", "ours"])
    parser.add_argument("--stages", action="store_true", help="also time decoding, network and result of an image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread, for a machine that is busy with other work"
    )
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.processor_time else arguments.threads)
    record = Record(arguments.json)
    print(f"{arguments.size} x {arguments.size}, {arguments.device}, {machine()}")
    print(
        f"{'backbone':10}{'batch':>6} {'dtype':9}{'variant':9}{'images/s':>10}{'stock x':>9}{'class':>9}{'masks':>9}"
    )
    for backbone in arguments.backbones:
        stock, ours = (model.eval().to(arguments.device) for model in equal_models(backbone))
        for dtype, batch in product(arguments.dtype, arguments.batch):
            for row in compare(stock, ours, batch, getattr(torch, dtype), arguments):
                row = {"backbone": backbone, "size": arguments.size, "batch": batch, "dtype": dtype, **row}
                record.add(row)
                differences = "".join(f"{row[name]:9.0e}" for name in OUTPUTS)
                print(
                    f"{backbone:10}{batch:6} {dtype:9}{row['variant']:9}{batch / row['seconds']:10.2f}"
                    f"{row['ratio']:9.2f}{differences}",
                    flush=True,
                )
        if arguments.stages:
            row = {"backbone": backbone, "size": arguments.size, **stages(ours.bfloat16(), arguments)}
            record.add(row)
            print(backbone, "  ".join(f"{name} {1000 * x:.1f} ms" for name, x in row["stages"].items()), flush=True)


def compare(stock, ours, batch: int, dtype: torch.dtype, arguments):
    """Yields a row per variant: seconds of a batch, how many times as fast as stock, differences of the outputs."""
    torch.manual_seed(1)
    pixels = torch.randn(batch, 3, arguments.size, arguments.size, device=arguments.device)
    with torch.inference_mode():
        expected = stock.float()(pixels)
    models = {"float32": copy.deepcopy(stock)} if "float32" in arguments.variants else {}
    pixels, models = pixels.to(dtype), models | {"stock": stock.to(dtype), "ours": ours.to(dtype)}
    outputs, runs = {}, {}
    for name in arguments.variants:
        try:
            runs[name] = VARIANTS[name](models, pixels)
            outputs[name] = runs[name]()
        except torch.OutOfMemoryError:
            runs.pop(name, None)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    seconds = interleaved_medians(runs, arguments.repeats, clock=clock)
    baseline = seconds.get("float32", seconds.get("stock", float("nan")))
    for name, value in seconds.items():
        yield {
            "variant": name,
            "seconds": value,
            "ratio": baseline / value,
            **{key: difference(outputs[name][key], expected[key]) for key in OUTPUTS},
        }


def difference(found, expected) -> float:
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def plain(model, pixels):
    def run():
        with torch.inference_mode():
            return model(pixels)

    return run


def compiled(models, pixels):
    return plain(torch.compile(models["ours"]), pixels)


def graph(models, pixels):
    """A CUDA graph of ours, which is replayed with one call."""
    run, stream = plain(models["ours"], pixels), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(), run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = run()
    return lambda: captured.replay() or output


VARIANTS = {
    "float32": lambda models, pixels: plain(models["float32"], pixels.float()),
    "stock": lambda models, pixels: plain(models["stock"], pixels),
    "ours": lambda models, pixels: plain(models["ours"], pixels),
    "compiled": compiled,
    "graph": graph,
}


@torch.inference_mode()
def stages(model, arguments) -> dict:
    """Median seconds of decoding a JPEG, preparing it, the network, and the panoptic result."""
    rng, size = np.random.default_rng(0), arguments.size
    file, coarse = io.BytesIO(), rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((size, size)).save(file, "jpeg")
    processor = Mask2FormerImageProcessor(size={"shortest_edge": size, "longest_edge": size})
    segmenter = Segmenter.of(model, processor, task="panoptic")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder), processor.save_pretrained(folder)
        replayed = Segmenter(folder, task="panoptic", device=arguments.device, dtype=model.dtype)
    for _ in range(3):
        replayed(np.zeros((size, size, 3), np.uint8))
    marks = {name: [] for name in ("decode", "prepare", "network", "result", "together", "replayed")}
    for _ in range(arguments.repeats + 1):
        times = [time.perf_counter()]
        image = np.asarray(Image.open(file).convert("RGB"))
        times.append(time.perf_counter())
        inputs = processor(image, return_tensors="pt")
        pixels = inputs["pixel_values"].to(model.device)
        times.append(time.perf_counter())
        outputs = model(pixels, pixel_mask=inputs["pixel_mask"])
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        processor.post_process_panoptic_segmentation(outputs, target_sizes=[(size, size)])
        times.append(time.perf_counter())
        segmenter(image)
        times.append(time.perf_counter())
        replayed(image)
        times.append(time.perf_counter())
        for name, start, end in zip(marks, times, times[1:], strict=False):
            marks[name].append(end - start)
    return {"stages": {name: statistics.median(values[1:]) for name, values in marks.items()}}


if __name__ == "__main__":
    main()
