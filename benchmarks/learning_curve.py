"""Do stock transformers' Mask2Former and ours learn the same? Panoptic quality on held-out scenes while they train.

    python benchmarks/learning_curve.py [--steps 400] [--seeds 0 1 2] [--models stock ours] [--output learning_curve]
        [--plot FILE.png]

Both start from the same weights and see the same images in the same order with the same optimizer, schedule and
clipping; only the points that the losses are computed at are drawn apart. Both are measured by our post-processing and
metric, so that the training alone is compared. Figures are kept in `--output`: a finished run is not run again, and
calls at the same time share the runs between them.
"""

import argparse
import statistics
from pathlib import Path

import torch
import transformers
from common import machine, run_once
from plot import line_chart
from tqdm import tqdm

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.json_files import write_json
from mask2former_hf.data.scenes import HELD_OUT_SEED, Scenes, ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate
from mask2former_hf.training.backbones import new_model
from mask2former_hf.training.collation import SegmentationCollator
from mask2former_hf.training.optimization import parameter_groups, polynomial_schedule

MODELS = ("stock", "ours")
SIZE, BATCH, LEARNING_RATE, GRADIENT_NORM = 128, 4, 1e-3, 1.0


def run(name: str, seed: int, steps: int, every: int, path: Path):
    """Write the panoptic quality after 0, `every`, ... steps, each as soon as it is known."""
    torch.manual_seed(seed)
    ours = new_model("tiny", Scenes.classes, "panoptic")
    model = ours
    if name == "stock":
        fields = ours.config.to_dict()
        fields["backbone_config"] = ours.config.backbone_config
        model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**fields))
        model.load_state_dict(ours.state_dict())
    processor = Mask2FormerImageProcessor(size={"height": SIZE, "width": SIZE})
    collate = SegmentationCollator(processor)
    scenes, held_out = ScenesDataset(steps * BATCH, SIZE, seed), ScenesDataset(100, SIZE, HELD_OUT_SEED)
    optimizer = torch.optim.AdamW(parameter_groups(model, LEARNING_RATE, backbone_multiplier=1.0))
    schedule = polynomial_schedule(optimizer, steps)
    qualities = {0: 0.0}  # nothing is above the threshold
    for step in tqdm(range(steps), desc=f"{name}, seed {seed}", unit="step"):
        batch = collate([scenes[step * BATCH + index] for index in range(BATCH)])
        if name == "stock":
            batch["mask_labels"] = [masks.float() for masks in batch["mask_labels"]]
            batch.pop("ignore_masks", None)  # there are none in scenes, and stock does not know them
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            if name == "stock":
                ours.load_state_dict(model.state_dict())
            summary = evaluate(ours.eval(), processor, held_out, metrics=["pq"], progress=False)
            qualities[step + 1] = summary["pq"]["all"]["pq"]
            write_json(path, qualities)


def curve_of(name: str, seed: int, arguments) -> dict[str, float]:
    """The figures of a run that there are by now, by step."""
    steps, every = arguments.steps, arguments.every
    path = arguments.output / f"{name}_{steps}_{every}_{seed}.json"
    last = str(steps // every * every)
    return run_once(path, lambda: run(name, seed, steps, every, path), is_done=lambda curve: last in curve) or {}


def table(runs: dict[str, list[dict[str, float]]], steps: list[int]):
    print(f"{'steps':>6}" + "".join(f"{name:>18}" for name in runs) + "   (PQ, mean and spread of the seeds)")
    for step in steps:
        cells = [[100 * curve[str(step)] for curve in curves] for curves in runs.values()]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in cells]
        row = [f"{statistics.mean(v):10.1f} ± {s:4.1f}" for v, s in zip(cells, spreads, strict=True)]
        print(f"{step:6}" + "".join(f"{cell:>18}" for cell in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("learning_curve"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(machine())
    transformers.logging.set_verbosity_error()
    runs = {name: [] for name in arguments.models}
    for seed in arguments.seeds:
        for name, curves in runs.items():
            curves.append(curve_of(name, seed, arguments))
    known = [set(curve) for curves in runs.values() for curve in curves]
    steps = sorted(map(int, set.intersection(*known)))
    if not steps:
        print("other calls are at these runs: there are no figures of all of them yet")
        return
    table(runs, steps)
    if arguments.plot:
        series = {
            name: [[100 * curve[str(step)] for step in steps] for curve in curves] for name, curves in runs.items()
        }
        line_chart(arguments.plot, "Panoptic quality on held-out scenes", "steps", "PQ", steps, series)


if __name__ == "__main__":
    main()
