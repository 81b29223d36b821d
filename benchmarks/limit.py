"""How near inference and a training step come to the speed at which this CPU multiplies matrices.

    python benchmarks/limit.py [--backbones r50 swin-t] [--dtype float32 bfloat16] [--size 640] [--train-size 512]
        [--repeats 3] [--processor-time] [--only inference training] [--json FILE]

Operations are counted by torch.utils.flop_counter: products, convolutions and attention, a multiplication and its
addition as two. The limit is the time in which a product of two matrices of 2048 x 2048 does as many, measured in turn
with the models. What has to be done is what the one with fewer operations does, so both are held against the same
limit; norms, activations, bilinear samples, the matching and all copies count as nothing, so 100 % cannot be reached,
but for products that are faster than that one, and a convolution that takes fewer multiplications than are counted
(kernels/convolution_cpu.cpp).
In bfloat16 inference has weights in bfloat16, a training step autocast. Every training step draws the same random
numbers: paths that stochastic depth drops are not computed in ours, and so are no part of what has to be done.
"""

import argparse
import math
import time
from itertools import product
from types import SimpleNamespace

import torch
from common import BACKBONES, Record, equal_models, interleaved_medians, machine
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from training_step import random_batch, step

from mask2former_hf import use_kernel

SIDE = 2048  # of the matrices: large enough for the full speed, 16 MB each in float32
TARGETS = 12


def convolution_operations(x, *others, out_shape, **options) -> int:
    """Of shapes; a residual that is added stands before the weight."""
    weight = others[1] if len(others) > 10 else others[0]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


UNKNOWN = {  # to the counter: attention on CPUs, and oneDNN's operators (model/onednn.py)
    torch.ops.mkldnn._convolution_pointwise: convolution_operations,
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *others, **options: 2 * math.prod(x) * weight[0],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *args, **options: (
        sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *args, **options: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["r50", "swin-t"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=640, help="of an image of inference, alone (default: 640)")
    parser.add_argument("--train-size", type=int, default=512, help="of two images of a step (default: 512)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--processor-time", action="store_true", help="of one thread, for a machine that is busy with other work"
    )
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if arguments.processor_time else arguments.threads)
    record = Record(arguments.json)
    print(machine())
    print(f"{'':32}{'GFLOP':>8}{'GFLOP/s':>9}{'limit s':>9}{'seconds':>9}{'of the limit':>14}")
    for backbone, kind, dtype in product(arguments.backbones, arguments.only, arguments.dtype):
        rows = measure(backbone, kind, getattr(torch, dtype), arguments)
        for name, row in rows.items():
            record.add({"backbone": backbone, "run": kind, "dtype": dtype, "variant": name, **row})
            print(
                f"{backbone:7}{kind:10}{dtype:9}{name:6}{row['gflop']:8.0f}{row['speed']:9.0f}"
                f"{row['limit']:9.3f}{row['seconds']:9.3f}{100 * row['limit'] / row['seconds']:12.0f} %",
                flush=True,
            )


def measure(backbone: str, kind: str, dtype: torch.dtype, arguments) -> dict[str, dict[str, float]]:
    models = dict(zip(("stock", "ours"), equal_models(backbone), strict=True))
    runs = {name: RUNS[kind](model, dtype, arguments) for name, model in models.items()}
    operations = {name: counted(run) for name, run in runs.items()}
    factors = [torch.randn(SIDE, SIDE).to(dtype) for _ in range(2)]
    clock = time.process_time if arguments.processor_time else time.perf_counter
    seconds = interleaved_medians({"product": lambda: factors[0] @ factors[1], **runs}, arguments.repeats, clock=clock)
    speed = 2 * SIDE**3 / seconds["product"]
    return {
        name: {
            "gflop": operations[name] / 1e9,
            "speed": speed / 1e9,
            "limit": min(operations.values()) / speed,
            "seconds": seconds[name],
        }
        for name in runs
    }


def counted(run) -> int:
    """Operations of torch's operators, with the package's own kernels, which the counter does not see, turned off."""
    with use_kernel("reference"), FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        run()
    return counter.get_total_flops()


def inference(model, dtype: torch.dtype, arguments):
    model = model.eval().requires_grad_(False).to(dtype)  # the counter asks parameters for a graph otherwise
    torch.manual_seed(1)
    pixels = torch.randn(1, 3, arguments.size, arguments.size).to(dtype)

    def run():
        with torch.inference_mode():
            model(pixels)

    return run


def training(model, dtype: torch.dtype, arguments):
    model.train()
    settings = SimpleNamespace(
        size=arguments.train_size, batch=2, targets=TARGETS, device="cpu", bf16=dtype == torch.bfloat16
    )
    batch = random_batch(settings)

    def run():
        torch.manual_seed(1)  # so that stochastic depth drops what it dropped when operations were counted
        step(model, batch, settings)

    return run


RUNS = {"inference": inference, "training": training}


if __name__ == "__main__":
    main()
