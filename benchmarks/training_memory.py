"""Peak memory of mask prediction, matching, loss and gradients against the number of instances: stock's and ours.

    python benchmarks/training_memory.py [--size 1024] [--instances 10 50 100 200] [--plot FILE.png]

What both get: mask features at a quarter of the image's size, 100 queries' embeddings and class logits of 10 layers,
and the instances' masks as bytes. Stock makes all masks, converts the targets to float32 and compares; ours samples.
Each measurement runs in a process of its own: on a CPU the growth of the process, on a GPU the allocator's peak.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from common import machine
from plot import line_chart
from training_step import process_peak
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss as StockLoss

from mask2former_hf.model.criterion import LossSettings, Mask2FormerLoss
from mask2former_hf.model.mask_logits import LazyMasks
from mask2former_hf.model.mask_losses import loss_weights

LAYERS, QUERIES, CHANNELS, LABELS = 10, 100, 256, 133
CONFIG = transformers.Mask2FormerConfig(num_labels=LABELS)


def inputs(size: int, instances: int, device: str):
    torch.manual_seed(0)
    features = torch.randn(1, CHANNELS, size // 4, size // 4, device=device, requires_grad=True)
    embeddings = (0.05 * torch.randn(LAYERS, 1, QUERIES, CHANNELS, device=device)).requires_grad_()
    classes = torch.randn(LAYERS, 1, QUERIES, LABELS + 1, device=device, requires_grad=True)
    masks = torch.zeros(instances, size, size, dtype=torch.uint8)
    for mask in masks:
        top, left = torch.randint(0, size * 3 // 4, (2,)).tolist()
        mask[top : top + size // 8, left : left + size // 8] = 1
    labels = torch.randint(0, LABELS, (instances,), device=device)
    return features, embeddings, classes, masks.to(device), labels


def stock_step(features, embeddings, classes, masks, labels):
    criterion = StockLoss(CONFIG, loss_weights(CONFIG)).to(features.device)
    logits = [torch.einsum("bqc,bchw->bqhw", layer, features) for layer in embeddings]
    earlier = [
        {"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(logits[:-1], classes[:-1], strict=True)
    ]
    terms = criterion(logits[-1], classes[-1], [masks.float()], [labels], earlier)
    sum(value for name, value in terms.items()).backward()


def our_step(features, embeddings, classes, masks, labels):
    criterion = Mask2FormerLoss(LossSettings.from_config(CONFIG)).to(features.device)
    terms = criterion(classes, LazyMasks(embeddings, features), [masks], [labels], canvas=tuple(masks.shape[-2:]))
    sum(term.sum() for term in terms.values()).backward()


def measure(name: str, arguments) -> float:
    """GB that a step needs beyond its inputs."""
    given = inputs(arguments.size, arguments.instances[0], arguments.device)
    step = {"stock": stock_step, "ours": our_step}[name]
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(*given)
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    before = process_peak()
    step(*given)
    return process_peak() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--instances", type=int, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("stock", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(measure(arguments.only, arguments))
        return
    print(f"1 x {arguments.size} x {arguments.size}, float32, {arguments.device}, {machine()}")
    print(f"{'instances':>9}{'stock GB':>10}{'ours GB':>10}{'stock / ours':>14}")
    rows = {"stock": [], "ours": []}
    for count in arguments.instances:
        for name, values in rows.items():
            command = [sys.executable, __file__, "--only", name, "--instances", str(count)]
            command += ["--size", str(arguments.size), "--device", arguments.device]
            values.append(
                float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            )
        stock, ours = rows["stock"][-1], rows["ours"][-1]
        print(f"{count:9}{stock:10.2f}{ours:10.2f}{stock / ours:14.1f}", flush=True)
    if arguments.plot:
        series = {f"{name}": [values] for name, values in rows.items()}
        title = f"Peak memory of the training loss, 1 x {arguments.size} x {arguments.size}"
        line_chart(arguments.plot, title, "instances in the image", "GB", arguments.instances, series)


if __name__ == "__main__":
    main()
