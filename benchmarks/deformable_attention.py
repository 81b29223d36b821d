"""Multi-scale deformable attention: stock transformers' function, our PyTorch formula, and the compiled kernel.

    python benchmarks/deformable_attention.py [--device cpu] [--dtype float32] [--batch 1] [--repeats 7] [--json FILE]

At the shapes of the pixel decoder's encoder: queries are the cells of the levels, 8 heads of 32 channels, 4 points.
All start from raw offsets and attention logits: softmax and location arithmetic count for everyone.
On a CPU stock always computes in float32: in bfloat16 PyTorch's grid_sample crashes there (torch 2.13).
On a GPU the kernels that others have published are timed as well, if they are installed: the original's
(`MultiScaleDeformableAttention`) and mmcv's, both of which compute in float32 only.

On a GPU every call is a CUDA graph, so that the time is that of the kernels and not of Python.

GB/s counts what has to move, each input read once and each output written once, over the kernel's time; the percentage
is of what a copy of a large tensor reaches on the same machine. Samples read again are not counted.
"""

import argparse
import importlib
from functools import cache
from itertools import product

import torch
from common import Record, interleaved_medians, machine
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention as stock_attention

from mask2former_hf.kernels import deformable_attention, select, triton_gpu
from mask2former_hf.model.deformable_attention import multi_scale_deformable_attention
from mask2former_hf.model.pixel_decoder import cell_centres

# Image name -> padded to the size divisor, 32.
IMAGES = {
    "cpu": {"640x640": (640, 640), "800x1216": (800, 1216), "128x128": (128, 128)},
    "cuda": {"800x1333": (800, 1344), "1024x1024": (1024, 1024)},
}
BATCHES = {"cpu": (1,), "cuda": (1, 8)}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
CALLS = {"cpu": 1, "cuda": 10}  # per timing: a GPU works through them while Python prepares the next
HEADS, CHANNELS, LEVELS, POINTS = 8, 32, 3, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--image", nargs="+", help="names of sizes (default: two sizes of photos)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    record = Record(arguments.json)
    print(machine())
    for device_type in arguments.device:
        if device_type == "cuda" and not torch.cuda.is_available():
            print("\nNo GPU: the figures of the Triton kernel are missing. Run this again where there is one.")
            continue
        device, published = torch.device(device_type), published_kernels() if device_type == "cuda" else {}
        bandwidth = copy_bandwidth(device)
        print(f"\n{device_type}: a copy moves {bandwidth / 1e9:.0f} GB/s; times in ms")
        if device_type == "cuda" and not published:
            print("No published kernel is installed: their figures are missing.")
        names = ["stock", "formula", "kernel", *published]
        heading = "".join(f"{name:>10}" for name in names)
        print(f"{'image':10}{'batch':>5} {'dtype':9}{'pass':19}{heading}{'stock/kernel':>14}{'GB/s':>7}{'of copy':>9}")
        cases = product(
            arguments.image or list(IMAGES[device_type])[:2],
            arguments.batch or BATCHES[device_type],
            arguments.dtype or DTYPES[device_type],
        )
        for name, batch, dtype_name in cases:
            dtype = getattr(torch, dtype_name)
            if select(device, dtype) is None:
                print(f"{name:10}{batch:5} {dtype_name:9}no compiled kernel (mask2former-hf env says why)")
                continue
            problem = Problem(IMAGES[device_type][name], batch, dtype, device)
            for row in problem.time(published, arguments.repeats, CALLS[device_type]):
                label, seconds, size = row
                record.add(
                    {"image": name, "batch": batch, "dtype": dtype_name, "pass": label, "bytes": size}
                    | {"copy_bandwidth": bandwidth, "seconds": seconds}
                )
                times = "".join(f"{1000 * seconds[key]:10.2f}" if key in seconds else f"{'-':>10}" for key in names)
                ratio = f"{seconds['stock'] / seconds['kernel']:.1f}" if "stock" in seconds else "-"
                rate = size / seconds["kernel"]
                print(
                    f"{name:10}{batch:5} {dtype_name:9}{label:19}{times}{ratio:>14}{rate / 1e9:7.1f}"
                    f"{rate / bandwidth:9.0%}",
                    flush=True,
                )
        if device_type == "cuda":
            record.add({"tuned": triton_gpu.tuned_configurations()})


class Problem:
    """Inputs of one image size, batch size and dtype, and everyone who attends to them."""

    def __init__(self, image: tuple[int, int], batch: int, dtype: torch.dtype, device: torch.device):
        torch.manual_seed(0)
        self.shapes = [(image[0] // stride, image[1] // stride) for stride in (32, 16, 8)]
        S = sum(H * W for H, W in self.shapes)
        self.value = torch.randn(batch, S, HEADS, CHANNELS, device=device, dtype=dtype, requires_grad=True)
        self.offsets = (torch.randn(batch, S, HEADS, LEVELS, POINTS, 2, device=device) * 3).requires_grad_()
        self.logits = torch.randn(batch, S, HEADS, LEVELS * POINTS, device=device, requires_grad=True)
        self.points = torch.cat([cell_centres(shape, device) for shape in self.shapes])
        self.sizes = torch.tensor([(W, H) for H, W in self.shapes], dtype=torch.float32, device=device)
        self.incoming = torch.randn(batch, S, HEADS * CHANNELS, device=device, dtype=dtype)

    def plain(self, function, dtype: torch.dtype, coordinates: torch.dtype = torch.float32):
        """Run a function of value, shapes, locations and weights."""
        reference = self.points.view(1, -1, 1, 1, 1, 2)
        locations = reference + self.offsets / self.sizes.view(1, 1, 1, LEVELS, 1, 2)
        weights = self.logits.softmax(-1).unflatten(-1, (LEVELS, POINTS))
        return function(self.value.to(dtype), self.shapes, locations.to(coordinates), weights.to(dtype))

    def time(self, published: dict, repeats: int, calls: int):
        """Label, seconds by name, and the bytes that have to move, of the forward pass and of forward + backward."""
        dtype, float32 = self.value.dtype, torch.float32
        stock_dtype = float32 if self.value.device.type == "cpu" else dtype
        functions = {
            "stock": lambda: self.plain(stock_attention, stock_dtype, stock_dtype),
            "formula": lambda: self.plain(multi_scale_deformable_attention, dtype),
            "kernel": lambda: deformable_attention(self.value, self.shapes, self.points, self.offsets, self.logits),
        } | {name: lambda f=function: self.plain(f, float32) for name, function in published.items()}
        inputs = [self.value, self.offsets, self.logits]
        once = sum(x.nbytes for x in (*inputs, self.points, self.incoming))
        again = once + sum(x.nbytes for x in inputs)  # incoming gradient instead of the output; gradients written

        def forward(function):
            with torch.no_grad():
                function()

        def backward(function):
            output = function()
            torch.autograd.grad(output, inputs, self.incoming.to(output.dtype))

        for label, run, size in (("forward", forward, once), ("forward + backward", backward, once + again)):
            runs = {}
            for name, function in functions.items():
                try:
                    one = lambda f=function, run=run: run(f)  # noqa: E731
                    one()  # also tunes the kernel
                    one = one if self.value.device.type == "cpu" else captured(one)
                except torch.OutOfMemoryError:
                    continue
                runs[name] = lambda one=one: [one() for _ in range(calls)]
            seconds = interleaved_medians(runs, repeats)
            yield label, {name: x / calls for name, x in seconds.items()}, size


def captured(function):
    """A CUDA graph of the function: its kernels without Python between them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor that fits no cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = interleaved_medians({"copy": lambda: [target.copy_(source) for _ in range(5)]}, repeats=5)["copy"]
    return 5 * 2 * source.nbytes / seconds


def published_kernels() -> dict:
    """Name -> function of value, shapes, locations and weights, of those that are installed."""
    found = {}
    try:
        found["original"] = _original(importlib.import_module("MultiScaleDeformableAttention"))
    except ImportError:
        pass
    try:
        found["mmcv"] = _published(
            importlib.import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
        )
    except ImportError:
        pass
    return found


def _original(library):
    """The original's compiled module has a function for each direction."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors_and_step):
            *tensors, ctx.step = tensors_and_step
            ctx.save_for_backward(*tensors)
            return library.ms_deform_attn_forward(*tensors, ctx.step)

        @staticmethod
        def backward(ctx, gradient):
            value, locations, weights = library.ms_deform_attn_backward(
                *ctx.saved_tensors, gradient.contiguous(), ctx.step
            )
            return value, None, None, locations, weights, None

    return _published(Function)


def _published(function):
    @cache
    def levels(shapes, device):
        sizes = torch.tensor(shapes, device=device)
        return sizes, torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))

    def run(value, shapes, locations, weights):
        return function.apply(value, *levels(tuple(shapes), value.device), locations, weights, 128)

    return run


if __name__ == "__main__":
    main()
