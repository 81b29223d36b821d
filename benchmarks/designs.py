"""The designs that the paper compares, in small: tables 4 and 5 of Mask2Former and table 3 of MaskFormer on scenes.

    python benchmarks/designs.py [--designs NAME ...] [--steps 300] [--size 64] [--seeds 0 1 2] [--output designs]
        [--data camvid --data-root FOLDER] [--device cuda] [--picture FILE.png]
    python benchmarks/designs.py --times [--designs NAME ...] [--size 64]

Every design is trained from random weights for the same number of steps on the same images. Printed are parameters,
PQ (where the design knows segments) and mIoU of 100 held-out scenes, or mIoU of CamVid's validation images. A finished
run is kept in `--output`: a call that was stopped goes on, and calls at the same time share the runs between them.
`--designs` given twice trains all seeds of the first designs before the others.

`--times` trains nothing: time of one thread of this processor for a training step and for an image, and what a step
keeps for its backward. `--picture` draws what a query of each design attends to.
"""

import argparse
import functools
import json
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from common import machine, run_once
from PIL import Image, ImageDraw
from refinement_runs import Data

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.data.json_files import write_json
from mask2former_hf.data.scenes import HELD_OUT_SEED, ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate
from mask2former_hf.training.annealing import anneal_masks, masked_shares
from mask2former_hf.training.backbones import new_model
from mask2former_hf.training.collation import SegmentationCollator, on_device
from mask2former_hf.training.optimization import parameter_groups, polynomial_schedule

MASKFORMER = {"pixel_decoder_type": "fpn", "decoder_type": "standard"}
WHOLE = {"matching_on": "masks", "loss_on": "masks"}
DESIGNS = {
    "mask2former": {},
    "no_masked_attention": {"masked_attention": False},
    "annealed": {},  # masked attention that is taken away in training
    "stride_32": {"attended_stride": 32},
    "stride_16": {"attended_stride": 16},
    "stride_8": {"attended_stride": 8},
    "query_features_not_learned": {"learned_query_features": False},
    "self_attention_first": {"self_attention_first": True},
    "dropout": {"dropout": 0.1},
    "fpn": {"pixel_decoder_type": "fpn"},
    "transformer_fpn": {"pixel_decoder_type": "transformer_fpn"},
    "matching_on_masks": {"matching_on": "masks"},
    "loss_on_masks": {"loss_on": "masks"},
    "both_on_masks": WHOLE,
    "maskformer": MASKFORMER | {"decoder_layers": 3},
    "per_pixel": {"pixel_decoder_type": "fpn", "head_type": "per_pixel"},
    "per_pixel_plus": MASKFORMER | {"head_type": "per_pixel_plus", "decoder_layers": 3},
}
QUALITY = {"k parameters": ("parameters", 1e-3), "PQ": ("pq", 100), "mIoU": ("miou", 100)}
TIMES = {"step, ms": ("step", 1e3), "image, ms": ("image", 1e3), "kept, MB": ("kept", 1e-6)}
ANNEALING = 1 / 6, 5 / 6  # of the steps, as EoMT's
PICTURED = ("mask2former", "no_masked_attention", "stride_32", "maskformer")
BATCH, LEARNING_RATE, GRADIENT_NORM = 4, 1e-3, 1.0
TIMED_STEPS = 12


class Batches:
    """Collated batches of images that are read and prepared once, however often they are drawn."""

    def __init__(self, dataset, processor):
        self.dataset, collate = dataset, SegmentationCollator(processor)
        self.of_one = functools.cache(lambda index: collate([dataset[index]]))

    def __call__(self, indices) -> dict:
        """What the collator makes of these images together: all have one size, so there is nothing to pad."""
        parts = [self.of_one(int(index)) for index in indices]
        batch = {name: torch.cat([part[name] for part in parts]) for name in ("pixel_values", "pixel_mask")}
        for name in ("mask_labels", "class_labels"):
            batch[name] = [part[name][0] for part in parts]
        if any("ignore_masks" in part for part in parts):
            nothing = torch.zeros(batch["pixel_mask"].shape[1:], dtype=torch.bool)
            batch["ignore_masks"] = [part.get("ignore_masks", [nothing])[0] for part in parts]
        return batch


def data(arguments, seed: int):
    """Batches to train on, other images to measure on, and their processor."""
    size = arguments.size
    if arguments.data == "camvid":
        return camvid(arguments.data_root, size)
    processor = Mask2FormerImageProcessor(size={"height": size, "width": size})
    scenes = ScenesDataset(arguments.steps * BATCH, size, seed)
    return Batches(scenes, processor), ScenesDataset(100, size, HELD_OUT_SEED), processor


@functools.cache
def camvid(root: Path, size: int):
    both, processor = Data("camvid", root), Mask2FormerImageProcessor(size={"height": size, "width": size})
    return Batches(both.train, processor), both.val, processor


def finished(name: str, seed: int, arguments) -> dict | None:
    """The figures of a run, which is trained unless `--output` has it; None while another call trains it."""
    path = arguments.output / f"{name}_{seed}.json"
    return run_once(path, lambda: write_json(path, run(name, seed, arguments), indent=None))


def run(name: str, seed: int, arguments) -> dict:
    batches, held_out, processor = data(arguments, seed)
    model, device = new_design(name, seed, arguments.data, batches.dataset.classes), torch.device(arguments.device)
    model, start = model.to(device), time.perf_counter()
    optimizer = torch.optim.AdamW(parameter_groups(model, LEARNING_RATE, backbone_multiplier=1.0))
    schedule = polynomial_schedule(optimizer, arguments.steps)
    order = np.random.default_rng(seed).permutation(arguments.steps * BATCH) % len(batches.dataset)
    layers = model.config.decoder_layers - 1
    for step in range(arguments.steps):
        if name == "annealed":
            anneal_masks(model, masked_shares(step / arguments.steps, *ANNEALING, layers))
        batch = batches(order[step * BATCH : (step + 1) * BATCH])
        loss = model.train()(**on_device(batch, device)).loss
        update(model, loss, optimizer)
        schedule.step()
    if name == "annealed":
        anneal_masks(model, [0.0] * layers)
    seconds = time.perf_counter() - start
    metrics = ["miou"] if model.config.task == "semantic" else ["pq", "miou"]
    summary = evaluate(model.eval(), processor, held_out, metrics=metrics, progress=False)
    for part in (model, processor):
        part.save_pretrained(arguments.output / f"{name}_{seed}")
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pq": summary["pq"]["all"]["pq"] if "pq" in summary else None,
        "miou": summary["miou"]["mIoU"],
        "steps": arguments.steps,
        "loss": loss.item(),
        "seconds": round(seconds, 1),
        "machine": machine(),
    }
    print(name, seed, figures, flush=True)
    return figures


def new_design(name: str, seed: int, dataset: str, classes):
    """A model with random weights."""
    torch.manual_seed(seed)
    fields = DESIGNS[name]
    task = "semantic" if "head_type" in fields or dataset == "camvid" else "panoptic"
    return new_model("tiny", classes, task, **fields)


def update(model, loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()


def times(name: str, arguments) -> dict:
    """Processor seconds of a training step and of an image, and bytes that a step keeps; of random weights."""
    arguments = argparse.Namespace(**vars(arguments) | {"steps": TIMED_STEPS})
    batches, _, _ = data(arguments, 0)
    model = new_design(name, 0, arguments.data, batches.dataset.classes)
    optimizer = torch.optim.AdamW(parameter_groups(model, LEARNING_RATE, backbone_multiplier=1.0))
    seconds, kept = [], 0
    for step in range(TIMED_STEPS):
        batch = batches(range(step * BATCH, (step + 1) * BATCH))
        start = time.process_time()
        loss, kept = forward(model.train(), batch, measure=step == 0, kept=kept)
        update(model, loss, optimizer)
        seconds.append(time.process_time() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "step": statistics.median(seconds[2:]),
        "image": inference_seconds(model.eval(), arguments.size),
        "kept": kept,
    }


def forward(model, batch, measure: bool, kept: int):
    """The loss, and with `measure` the bytes of all different tensors that wait for the backward."""
    if not measure:
        return model(**batch).loss, kept
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return loss, sum(size for place, size in storages.items() if place not in own)


@torch.no_grad()
def inference_seconds(model, size: int) -> float:
    pixels, seconds = torch.randn(1, 3, size, size), []
    for _ in range(12):
        start = time.process_time()
        model(pixels)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[2:])


def table(runs: dict[str, list[dict]], columns: dict[str, tuple[str, float]]):
    """A row per design: the figure of each seed, and of several their mean and deviation.

    Args:
        columns: title -> key of the figure and what it is multiplied with.
    """

    def cell(rows, key, scale):
        values = [row[key] * scale for row in rows if row[key] is not None]
        if len(set(values)) < 2:
            return f"{values[0]:.1f}" if values else "–"
        each = ", ".join(f"{value:.1f}" for value in values)
        return f"{each} ({statistics.mean(values):.1f} ± {statistics.stdev(values):.1f})"

    print("| design | seeds | " + " | ".join(columns) + " |\n" + "|---" * (2 + len(columns)) + "|")
    for name, rows in runs.items():
        print(f"| `{name}` | {len(rows)} | " + " | ".join(cell(rows, *column) for column in columns.values()) + " |")


@torch.no_grad()
def picture(folder: Path, arguments, path: Path, scenes: int = 3, side: int = 192):
    """A row per scene: the scene, then per design where the query of its largest thing looks in the last layer."""
    held_out = ScenesDataset(scenes, 2 * arguments.size, HELD_OUT_SEED)
    header = 18
    sheet = Image.new("RGB", ((1 + len(PICTURED)) * side, scenes * side + header), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("scene", *PICTURED)):
        draw.text((column * side + 4, 3), title, fill="black")
    for column, name in enumerate(PICTURED, start=1):
        model = Mask2FormerForUniversalSegmentation.from_pretrained(folder / f"{name}_{arguments.seeds[0]}").eval()
        processor = Mask2FormerImageProcessor(size={"height": 2 * arguments.size, "width": 2 * arguments.size})
        for row, example in enumerate(held_out):
            things = [segment for segment in example.segments if segment["isthing"]]
            areas = [(example.segmentation == segment["id"]).sum() for segment in things]
            thing = torch.from_numpy(example.segmentation == things[int(np.argmax(areas))]["id"])
            attention, outline = attended(model, processor(example.image, return_tensors="pt"), thing)
            pixels = Image.fromarray(example.image).resize((side, side))
            sheet.paste(pixels, (0, row * side + header))
            sheet.paste(overlaid(pixels, attention, outline), (column * side, row * side + header))
    sheet.quantize(128).save(path)


def attended(model, inputs, thing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, W) attention, mean over heads, of the query whose mask fits the (H, W) thing best; and its mask."""
    output = model(**inputs, output_attentions=True)
    size = tuple(thing.shape)
    masks = torch.nn.functional.interpolate(output.masks_queries_logits, size, mode="bilinear")[0] > 0
    fit = (masks & thing).flatten(1).sum(1) / (masks | thing).flatten(1).sum(1)
    query = int(fit.argmax())
    cells = output.cross_attentions[-1][0, :, query].mean(0)  # (h * w,)
    stride = round((size[0] * size[1] / len(cells)) ** 0.5)
    attention = cells.view(1, 1, size[0] // stride, size[1] // stride)
    return torch.nn.functional.interpolate(attention / attention.amax(), size, mode="nearest")[0, 0], masks[query]


def overlaid(image: Image.Image, attention: torch.Tensor, mask: torch.Tensor) -> Image.Image:
    """Attention as light on a dark image, and the mask's outline."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.35
    heat = np.asarray(Image.fromarray((attention.numpy() * 255).astype(np.uint8)).resize(image.size, 0), np.float32)
    pixels = grey + heat[..., None] * np.array([0.75, 0.55, 0.1], dtype=np.float32)
    inside = np.asarray(Image.fromarray(mask.numpy()).resize(image.size, 0))
    edge = inside & ~(np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1) & np.roll(inside, -1, 1))
    pixels[edge] = (0, 255, 255)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def all_runs(groups: list[list[str]], arguments) -> dict[str, list[dict]]:
    """The figures of every design and seed that there are; what nobody has trained is trained here."""
    for names in groups:
        for seed in arguments.seeds:
            for name in names:
                try:
                    finished(name, seed, arguments)
                except Exception:  # of one design, which is no reason to leave the others out
                    traceback.print_exc()
    runs = {}
    for name in (name for names in groups for name in names):
        paths = [arguments.output / f"{name}_{seed}.json" for seed in arguments.seeds]
        if rows := [json.loads(path.read_text()) for path in paths if path.is_file()]:
            runs[name] = rows
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, action="append")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", choices=("scenes", "camvid"), default="scenes")
    parser.add_argument("--data-root", type=Path, help="folder with camvid/")
    parser.add_argument("--device", default="cpu", help="of the training and its evaluation")
    parser.add_argument("--output", type=Path, default=Path("designs"))
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    groups = arguments.designs or [list(DESIGNS)]
    torch.set_num_threads(1)
    if arguments.times:
        print(machine(), flush=True)
        table({name: [times(name, arguments)] for names in groups for name in names}, TIMES)
        return
    print(f"{arguments.steps} steps of {BATCH} images of {arguments.size} x {arguments.size}, {machine()}", flush=True)
    table(all_runs(groups, arguments), QUALITY)
    if arguments.picture:
        picture(arguments.output, arguments, arguments.picture)


if __name__ == "__main__":
    main()
