"""Inference of stock transformers' Mask2Former and ours: same process, same weights, same images.

python benchmarks/inference.py [--size 640] [--batch 1] [--repeats 5] [--backbones r50 swin-t]
"""

import argparse

import torch
from common import BACKBONES, equal_models, interleaved_medians, machine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.batch} x {arguments.size} x {arguments.size}, float32, {machine()}")
    print(f"{'backbone':10}{'stock s':>10}{'ours s':>10}{'ratio':>8}{'class diff':>12}{'mask diff':>12}")
    for backbone in arguments.backbones:
        stock, ours = (model.eval() for model in equal_models(backbone))
        pixels = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        outputs = {}

        def run(name, model, pixels=pixels, outputs=outputs):
            with torch.inference_mode():
                outputs[name] = model(pixels)

        seconds = interleaved_medians(
            {"stock": lambda m=stock: run("stock", m), "ours": lambda m=ours: run("ours", m)}, arguments.repeats
        )
        differences = [
            ((outputs["ours"][name] - outputs["stock"][name]).abs().max() / outputs["stock"][name].abs().max()).item()
            for name in ("class_queries_logits", "masks_queries_logits")
        ]
        ratio = seconds["stock"] / seconds["ours"]
        print(
            f"{backbone:10}{seconds['stock']:10.2f}{seconds['ours']:10.2f}{ratio:8.2f}"
            f"{differences[0]:12.1e}{differences[1]:12.1e}"
        )


if __name__ == "__main__":
    main()
