"""Masked attention, attention without masks from the start, and masks annealed: what they learn, how long they take.

    python benchmarks/annealing.py [--data camvid --data-root FOLDER] [--steps 600] [--size 64] [--seeds 0 1 2]
        [--device cuda] [--output annealing] [--timed swin-t --timed-size 640]

Trains the three as `benchmarks/designs.py` does, for the same steps on the same images, and goes on in `--output` if a
call was stopped, or `designs.py` has trained them there. Times are processor time of one thread for one image, of
PyTorch and of the exported graph in ONNX Runtime, the three in turn, of networks with the trained ones' configs;
`--timed` times a network of the paper's size instead. Their weights are random, which is nothing to the time.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from common import BACKBONES, interleaved_medians, machine
from designs import QUALITY, all_runs, table

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.export.modules import Network
from mask2former_hf.export.tracing import trace_network

MASKS = {"mask2former": True, "no_masked_attention": False, "annealed": False}  # in the trained model's attention


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("scenes", "camvid"), default="scenes")
    parser.add_argument("--data-root", type=Path, help="folder with camvid/")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu", help="of the training and its evaluation")
    parser.add_argument("--output", type=Path, default=Path("annealing"))
    parser.add_argument("--timed", choices=BACKBONES)
    parser.add_argument("--timed-size", type=int, default=640)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    if arguments.timed:
        swin = {"backbone_config": BACKBONES[arguments.timed](), "num_labels": 133}
        configs = {name: Mask2FormerConfig(**swin, masked_attention=masks) for name, masks in MASKS.items()}
        del configs["annealed"]  # which is then the one that never had masks
        report(configs, arguments.timed_size, repeats=5)
        return
    table(all_runs([list(MASKS)], arguments), QUALITY)
    configs = {name: trained_config(name, arguments) for name in MASKS}
    report(configs, arguments.size, repeats=50)


def trained_config(name: str, arguments) -> Mask2FormerConfig:
    config = Mask2FormerConfig.from_pretrained(arguments.output / f"{name}_{arguments.seeds[0]}")
    if config.masked_attention is not MASKS[name]:
        raise ValueError(f"the trained {name} has masked_attention={config.masked_attention}")
    return config


def random_model(config: Mask2FormerConfig):
    torch.manual_seed(0)
    return Mask2FormerForUniversalSegmentation(config).eval()


def report(configs: dict[str, Mask2FormerConfig], size: int, repeats: int):
    """Median milliseconds of an image by network, in PyTorch and in ONNX Runtime."""
    pixels, runs = torch.randn(1, 3, size, size), {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for name, config in configs.items():
        model = random_model(config)
        graph = trace_network(Network(model), None, 17).SerializeToString()
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        runs[name, "PyTorch"] = lambda model=model: run(model, pixels)
        runs[name, "ONNX Runtime"] = lambda session=session: session.run(None, {"pixel_values": np.asarray(pixels)})
    seconds = interleaved_medians(runs, repeats, clock=time.process_time)
    print(f"one image of {size} x {size}, ms")
    for (name, runtime), value in seconds.items():
        print(f"{name:22}{runtime:14}{1000 * value:8.1f}{value / seconds['mask2former', runtime]:7.2f} of masked")


@torch.inference_mode()
def run(model, pixels):
    model(pixels)


if __name__ == "__main__":
    main()
