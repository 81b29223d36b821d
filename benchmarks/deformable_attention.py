"""Multi-scale deformable attention: stock transformers' function, our PyTorch formula, and the compiled kernel.

    python benchmarks/deformable_attention.py [--repeats 7] [--dtype float32]

At the shapes of the pixel decoder's encoder: queries are the cells of the levels, 8 heads of 32 channels, 4 points.
All start from raw offsets and attention logits: softmax and location arithmetic count for everyone.
On a CPU stock always computes in float32: in bfloat16 PyTorch's grid_sample crashes there (torch 2.13).
"""

import argparse

import torch
from common import interleaved_medians, machine
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention as stock_attention

from mask2former_hf.deformable_attention import multi_scale_deformable_attention
from mask2former_hf.kernels import deformable_attention, select
from mask2former_hf.modeling_mask2former import cell_centres

IMAGES = {"640x640": (640, 640), "800x1216": (800, 1216)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    print(f"batch {arguments.batch}, {arguments.dtype}, {device}, {machine()}")
    if select(device, dtype) is None:
        raise SystemExit(f"No compiled kernel runs on {device} in {arguments.dtype}: nothing to compare")
    print(f"{'image':10}{'pass':20}{'stock ms':>10}{'formula ms':>12}{'kernel ms':>11}{'stock / kernel':>16}")
    for name, image in IMAGES.items():
        compare(name, image, arguments, device, dtype)


def compare(name, image, arguments, device, dtype):
    torch.manual_seed(0)
    shapes = [(image[0] // stride, image[1] // stride) for stride in (32, 16, 8)]
    B, S, h, D, L, P = arguments.batch, sum(H * W for H, W in shapes), 8, 32, 3, 4
    value = torch.randn(B, S, h, D, device=device, dtype=dtype, requires_grad=True)
    offsets = (torch.randn(B, S, h, L, P, 2, device=device) * 3).requires_grad_()
    logits = torch.randn(B, S, h, L * P, device=device, requires_grad=True)
    points = torch.cat([cell_centres(shape, device) for shape in shapes])
    sizes = torch.tensor([(W, H) for H, W in shapes], dtype=torch.float32, device=device)
    incoming = torch.randn(B, S, h * D, device=device, dtype=dtype)

    def arithmetic(function):
        locations = points.view(1, S, 1, 1, 1, 2) + offsets / sizes.view(1, 1, 1, L, 1, 2)
        weights = logits.softmax(-1).view(B, S, h, L, P)
        stock_dtype = torch.float32 if device.type == "cpu" else dtype
        return function(value.to(stock_dtype), shapes, locations.to(stock_dtype), weights.to(stock_dtype))

    def formula():
        locations = points.view(1, S, 1, 1, 1, 2) + offsets / sizes.view(1, 1, 1, L, 1, 2)
        return multi_scale_deformable_attention(value, shapes, locations, logits.softmax(-1).view(B, S, h, L, P))

    functions = {
        "stock": lambda: arithmetic(stock_attention),
        "formula": formula,
        "kernel": lambda: deformable_attention(value, shapes, points, offsets, logits),
    }

    def forward(function):
        with torch.no_grad():
            function()

    def backward(function):
        output = function()
        torch.autograd.grad(output, [value, offsets, logits], incoming.to(output.dtype))

    for label, run in (("forward", forward), ("forward + backward", backward)):
        seconds = interleaved_medians(
            {key: lambda f=function, run=run: run(f) for key, function in functions.items()}, arguments.repeats
        )
        stock, plain, kernel = (1000 * seconds[key] for key in functions)
        print(f"{name:10}{label:20}{stock:10.1f}{plain:12.1f}{kernel:11.1f}{stock / kernel:16.1f}")


if __name__ == "__main__":
    main()
