"""A training step of stock transformers' Mask2Former and ours: same weights, batch and number of points.

    python benchmarks/training_step.py [--backbone swin-t] [--size 512] [--batch 2] [--targets 12] [--repeats 3]
        [--bf16] [--freeze-batch-norm] [--compile] [--json FILE] [--profile FILE] [--only ours]

Prints the median seconds of forward + criterion + backward, interleaved, and the peak memory of each (on a CPU the
growth of the process, measured in a process of its own; on a GPU the allocator's peak).
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import torch
from common import BACKBONES, Record, equal_models, interleaved_medians, machine


def models_in_training(arguments) -> dict[str, torch.nn.Module]:
    stock, ours = equal_models(arguments.backbone, freeze_batch_norm=arguments.freeze_batch_norm)
    stock.train(), ours.train()
    if arguments.freeze_batch_norm:  # by hand, as stock's users have to
        for module in stock.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    models = {"stock": stock, "ours": ours}
    if arguments.compile:
        models["compiled"] = torch.compile(copy.deepcopy(ours))
    return models


def random_batch(arguments):
    torch.manual_seed(1)
    size, device = arguments.size, arguments.device
    pixels = torch.randn(arguments.batch, 3, size, size, device=device)
    masks = torch.zeros(arguments.batch, arguments.targets, size, size, dtype=torch.uint8)
    for image in masks:
        for mask in image:
            top, left = torch.randint(0, size * 3 // 4, (2,)).tolist()
            height, width = torch.randint(size // 16, size // 2, (2,)).tolist()
            mask[top : top + height, left : left + width] = 1
    labels = torch.randint(0, 133, (arguments.batch, arguments.targets), device=device)
    return pixels, list(masks.to(device)), list(labels)


def step(model, batch, arguments):
    pixels, masks, labels = batch
    if type(model).__module__.startswith("transformers."):
        masks = [mask.float() for mask in masks]  # stock's image processor makes floats, its loss takes nothing else
    with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=arguments.bf16):
        loss = model(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def peak_memory(name: str) -> float:
    """GB at the peak of one step in a fresh process, less what the process had before it."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def process_peak() -> float:
    """GB; Linux' high-water mark (getrusage's would include the parent process)."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**20


def measure_alone(arguments):
    models = models_in_training(arguments)
    model = models.pop(arguments.only).to(arguments.device)
    models.clear()
    batch = random_batch(arguments)
    before = process_peak()
    step(model, batch, arguments)
    print(process_peak() - before)


def peak_on_the_gpu(model, batch, arguments) -> float:
    """GB of the allocator's peak in a step, less what was allocated before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, batch, arguments)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def write_profile(path: str, run):
    """The operations that take most of the device, and most of the host, in a step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profiler.key_averages()
    keys = ["self_device_time_total"] * torch.cuda.is_available() + ["self_cpu_time_total"]
    tables = [events.table(sort_by=key, row_limit=30, max_name_column_width=70) for key in keys]
    Path(path).write_text("\n".join(tables), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=BACKBONES, default="swin-t")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--targets", type=int, default=12, help="targets of each image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--freeze-batch-norm", action="store_true", help="as in the original's ResNet recipes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also ours under torch.compile")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--profile", help="file for where the time of our step goes")
    parser.add_argument(
        "--only",
        choices=("stock", "ours", "compiled"),
        help="print the GB of a step of this model in this process, and no more; on CPUs the table is made so",
    )
    arguments = parser.parse_args()
    if arguments.only:
        return measure_alone(arguments)
    print(
        f"{arguments.backbone}, {arguments.batch} x {arguments.size} x {arguments.size}, {arguments.targets} targets "
        f"each, {'bfloat16 autocast' if arguments.bf16 else 'float32'}"
        f"{', frozen batch norm' if arguments.freeze_batch_norm else ''}, {arguments.device}, {machine()}"
    )
    models = {name: model.to(arguments.device) for name, model in models_in_training(arguments).items()}
    batch = random_batch(arguments)
    runs, record = {}, Record(arguments.json)
    settings = {key: getattr(arguments, key) for key in ("backbone", "size", "batch", "targets", "bf16")}
    for name, model in models.items():
        try:
            step(model, batch, arguments)  # also compiles and tunes
            runs[name] = lambda model=model: step(model, batch, arguments)
        except torch.OutOfMemoryError:
            print(f"{name} does not fit the device's memory")
            record.add({**settings, "variant": name, "seconds": None, "gigabytes": None})
            model.zero_grad(set_to_none=True)
    seconds = interleaved_medians(runs, arguments.repeats)
    if arguments.device == "cuda":  # what the first step allocated is given back before each is measured
        memory = {name: peak_on_the_gpu(models[name], batch, arguments) for name in runs}
    else:
        memory = {name: peak_memory(name) for name in seconds}
    print(f"{'':8}{'seconds':>10}{'peak GB':>10}")
    for name in seconds:
        print(f"{name:8}{seconds[name]:10.3f}{memory[name]:10.2f}")
        record.add({**settings, "variant": name, "seconds": seconds[name], "gigabytes": memory[name]})
    if arguments.profile:
        write_profile(arguments.profile, runs["ours"])
    if {"stock", "ours"} <= set(seconds):
        speed, share = seconds["stock"] / seconds["ours"], memory["ours"] / memory["stock"]
        print(f"ours is {speed:.2f} times as fast and takes {share:.2f} of the memory")


if __name__ == "__main__":
    main()
