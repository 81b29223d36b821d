"""A training step of a plain ViT under Mask2Former: everything tuned, low-rank updates, and a frozen backbone.

    python benchmarks/frozen_backbone.py [--backbone dinov3-b] [--neck adapter] [--size 512] [--batch 4] [--bf16]
        [--ways full frozen lora]

Prints seconds (median; on a CPU the process' own) and peak memory of forward, criterion, backward and optimizer, with
random weights; on a GPU the allocator's peak, on a CPU no memory.
"""

import argparse
import time

import torch
from common import machine
from training_step import random_batch

from mask2former_hf import new_model
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.training.freezing import freeze_backbone
from mask2former_hf.training.lora import with_lora
from mask2former_hf.training.optimization import parameter_groups, parts_table

RANK = 16  # of the low-rank updates


def build(way: str, arguments):
    torch.manual_seed(0)
    classes = ClassTable.load("coco-panoptic")
    neck = None if arguments.neck == "pyramid" else arguments.neck
    model = new_model(arguments.backbone, classes, "panoptic", random_weights=True, vit_neck=neck)
    if way == "frozen":
        freeze_backbone(model)
    elif way == "lora":
        model = with_lora(model, RANK, new_head=True)
    return model.to(arguments.device).train()


def measure(way: str, arguments, batch) -> tuple[float, float]:
    """Median seconds of a step, and GB at the peak."""
    model = build(way, arguments)
    groups = parameter_groups(model)
    print(f"{way}\n{parts_table(model, groups)}", flush=True)
    optimizer = torch.optim.AdamW(groups)
    pixels, masks, labels = batch
    cuda = arguments.device == "cuda"
    clock = time.perf_counter if cuda else time.process_time  # of the process alone: CPUs are shared
    seconds = []
    for repeat in range(arguments.repeats + 2):
        if cuda:
            torch.cuda.synchronize()
            if repeat == 2:
                torch.cuda.reset_peak_memory_stats()
        start = clock()
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.bf16):
            loss = model.train()(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
    return sorted(seconds[2:])[arguments.repeats // 2], peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov3-b")
    parser.add_argument("--neck", choices=("pyramid", "adapter"), default="adapter")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--targets", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=("full", "frozen", "lora"), default=["full", "frozen", "lora"])
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine())
    batch = random_batch(arguments)
    figures = {way: measure(way, arguments, batch) for way in arguments.ways}
    first = figures[arguments.ways[0]]
    for way, (seconds, peak) in figures.items():
        print(f"{way:8}{seconds:8.3f} s ({seconds / first[0]:.2f}){peak:8.2f} GB ({peak / first[1]:.2f})")


if __name__ == "__main__":
    main()
