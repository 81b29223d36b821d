"""Runtimes of one network: stock and ours in PyTorch, and exports of ours; same weights, threads and pixels, in turn.

python benchmarks/export.py [--size 640] [--repeats 5] [--backbones r50 swin-t] [--no-compile] [--processor-time]
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import BACKBONES, equal_models, interleaved_medians, machine

from mask2former_hf import Mask2FormerImageProcessor, export_model
from mask2former_hf.inference.exported import ExportedModel


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread, for a machine that is busy with other work"
    )
    arguments = parser.parse_args()
    if arguments.processor_time:
        arguments.threads = 1
    torch.set_num_threads(arguments.threads)
    clock = "processor time" if arguments.processor_time else "time"
    print(f"{clock} of 1 x {arguments.size} x {arguments.size}, {machine()}", flush=True)
    for backbone in arguments.backbones:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(backbone, Path(folder), arguments)
        for name, value in seconds.items():
            print(
                f"{backbone:8}{name:26}{value:8.2f} s{seconds['stock'] / value:8.2f} times as fast as stock",
                flush=True,
            )


def measure(backbone: str, folder: Path, arguments) -> dict[str, float]:
    """Median seconds by runtime."""
    stock, ours = (model.eval() for model in equal_models(backbone))
    processor = Mask2FormerImageProcessor(size={"height": arguments.size, "width": arguments.size})
    noise = np.random.default_rng(0).integers(0, 256, (4, arguments.size, arguments.size, 3), dtype=np.uint8)
    has_openvino = importlib.util.find_spec("openvino") is not None
    export_model(ours, processor, folder / "float32", openvino=has_openvino)
    export_model(ours, processor, folder / "int8", dtype="int8", calibration=list(noise), openvino=has_openvino)
    pixels = torch.randn(1, 3, arguments.size, arguments.size)

    def torch_run(model):
        with torch.inference_mode():
            model(pixels)

    runs = {"stock": lambda: torch_run(stock), "ours": lambda: torch_run(ours)}
    if not arguments.no_compile:
        compiled = torch.compile(ours)
        runs["ours, compiled"] = lambda: torch_run(compiled)
    exports = {}
    for dtype in ("float32", "int8"):
        options = {"threads": arguments.threads}
        exports[f"ONNX Runtime, {dtype}"] = ExportedModel(folder / dtype, **options, runtime="onnxruntime")
        if has_openvino:
            exports[f"OpenVINO, {dtype}"] = ExportedModel(folder / dtype, **options, runtime="openvino")
    runs |= {name: lambda own=own: own.logits(pixels.numpy()) for name, own in exports.items()}
    clock = time.process_time if arguments.processor_time else time.perf_counter
    return interleaved_medians(runs, arguments.repeats, clock=clock)


if __name__ == "__main__":
    main()
