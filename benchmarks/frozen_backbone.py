"""A training step of a backbone under Mask2Former: all tuned, low-rank updates, a frozen backbone, its maps kept.

    python benchmarks/frozen_backbone.py [--backbone dinov3-b] [--neck adapter] [--size 512] [--batch 4] [--bf16]
        [--ways full frozen cached lora] [--count]

Prints seconds (median of interleaved steps; on a CPU the process' own) and memory of forward, criterion, backward and
optimizer, with random weights. Memory is the allocator's peak on a GPU; on a CPU what has to be there at the end of
the forward: weights, gradients, AdamW's two moments, and the tensors that autograd keeps. `--count` prints no time,
but the arithmetic of a forward by part and the share of a full step that it leaves to the other ways (a backward
counted as two forwards; sampling, norms and optimizer not counted).
"""

import argparse
import statistics
import tempfile
import time
from contextlib import nullcontext

import torch
from common import machine
from torch.utils.flop_counter import FlopCounterMode
from training_step import random_batch

from mask2former_hf import new_model
from mask2former_hf.data.classes import ClassTable
from mask2former_hf.training.feature_cache import FeatureCache
from mask2former_hf.training.freezing import freeze_backbone
from mask2former_hf.training.lora import with_lora
from mask2former_hf.training.optimization import parameter_groups, parts_table

WAYS = ("full", "frozen", "cached", "lora")
RANK = 16  # of the low-rank updates
PARTS = {  # title -> end of the module's name
    "backbone": "pixel_level_module.encoder",
    "neck": "pixel_level_module.neck",
    "pixel decoder": "pixel_level_module.decoder",
    "transformer decoder": "model.transformer_module",
}


def build(way: str, arguments):
    torch.manual_seed(0)
    classes = ClassTable.load("coco-panoptic")
    neck = None if arguments.neck == "pyramid" else arguments.neck
    model = new_model(arguments.backbone, classes, "panoptic", random_weights=True, vit_neck=neck)
    if way in ("frozen", "cached"):
        freeze_backbone(model)
    elif way == "lora":
        model = with_lora(model, RANK, new_head=True)
    return model.to(arguments.device).train()


class Stepper:
    """A model with its optimizer; `step` returns seconds."""

    def __init__(self, way: str, arguments, batch):
        self.model, self.arguments, self.batch = build(way, arguments), arguments, batch
        groups = parameter_groups(self.model)
        print(f"{way}\n{parts_table(self.model, groups)}", flush=True)
        self.optimizer = torch.optim.AdamW(groups)
        self.seconds, self.cuda = [], arguments.device == "cuda"
        self.cache = FeatureCache(self.model, arguments.folder) if way == "cached" else nullcontext()

    def forward(self) -> torch.Tensor:
        pixels, masks, labels = self.batch
        with self.cache, torch.autocast(self.arguments.device, dtype=torch.bfloat16, enabled=self.arguments.bf16):
            return self.model.train()(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss

    def step(self):
        clock = time.perf_counter if self.cuda else time.process_time  # of the process alone: CPUs are shared
        start = self._time(clock)
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(self._time(clock) - start)

    def _time(self, clock) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return clock()

    def memory(self) -> float:
        """GB."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            self.seconds.pop()
            return (torch.cuda.max_memory_allocated() - before + self._state()) / 1e9
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.model.state_dict().values()}
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.forward()
        del loss
        return (sum(kept.values()) + self._state()) / 1e9

    def _state(self) -> int:
        """Bytes of weights, gradients and moments."""
        sizes = [(x.numel() * x.element_size(), x.requires_grad) for x in self.model.parameters()]
        return sum(4 * size if trained else size for size, trained in sizes)


def count(arguments):
    """Arithmetic of a forward by part, and what shares of a full step it leaves."""
    with torch.device("meta"):
        model = build("full", arguments).eval().requires_grad_(False)
        pixels = torch.empty(arguments.batch, 3, arguments.size, arguments.size)
    with FlopCounterMode(display=False, depth=5) as counter, torch.no_grad():
        model.model(pixels)
    work = {name: sum(counts.values()) / 1e9 for name, counts in counter.flop_counts.items()}
    parts = {title: sum(x for name, x in work.items() if name.endswith(end)) for title, end in PARTS.items()}
    print(", ".join(f"{title} {x:.0f}" for title, x in parts.items()), f"GFLOP, together {work['Global']:.0f}")
    backbone, rest = parts["backbone"], work["Global"] - parts["backbone"]
    for way, forwards in {"frozen": 1, "lora": 2}.items():
        print(f"{way:8}{(forwards * backbone + 3 * rest) / (3 * (backbone + rest)):.2f} of a full step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov3-b")
    parser.add_argument("--neck", choices=("pyramid", "adapter"), default="adapter")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--targets", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--count", action="store_true")
    arguments = parser.parse_args()
    if arguments.count:
        arguments.device = "meta"
        return count(arguments)
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine())
    batch = random_batch(arguments)
    with tempfile.TemporaryDirectory() as arguments.folder:
        steppers = {way: Stepper(way, arguments, batch) for way in arguments.ways}
        for _ in range(arguments.repeats + 2):
            for stepper in steppers.values():
                stepper.step()
        figures = {way: (statistics.median(one.seconds[2:]), one.memory()) for way, one in steppers.items()}
    first = figures[arguments.ways[0]]
    for way, (seconds, peak) in figures.items():
        print(f"{way:8}{seconds:8.3f} s ({seconds / first[0]:.2f}){peak:8.2f} GB ({peak / first[1]:.2f})")


if __name__ == "__main__":
    main()
