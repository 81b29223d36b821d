"""Training in mixed precision on generated scenes: no loss that is not finite, and the panoptic quality it ends with.

python benchmarks/scenes_training.py [--steps 500] [--precision bf16 fp16 none] [--json FILE]
"""

import argparse
import math
import tempfile
import time

import torch
from common import Record, machine

from mask2former_hf import (
    Mask2FormerImageProcessor,
    Mask2FormerTrainer,
    Mask2FormerTrainingArguments,
    Scenes,
    ScenesDataset,
    new_model,
)
from mask2former_hf.data.scenes import HELD_OUT_SEED

SIZE, BATCH = 128, 8


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--eval-images", type=int, default=100)
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp16", "none"), default=["bf16", "fp16"])
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    record = Record(arguments.json)
    print(f"{arguments.steps} steps of {BATCH} scenes of {SIZE} x {SIZE}, {machine()}")
    for precision in arguments.precision:
        row = train(precision, arguments)
        record.add(row)
        first, last = row["losses"][0], row["losses"][-1]
        print(
            f"{precision}: loss {first:.1f} -> {last:.1f}, all finite: {row['finite']}, PQ {100 * row['pq']:.1f} of "
            f"{arguments.eval_images} scenes, {row['seconds']:.0f} s",
            flush=True,
        )


def train(precision: str, arguments) -> dict:
    torch.manual_seed(0)
    model = new_model("tiny", Scenes.classes, "panoptic")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Mask2FormerTrainer(
            model,
            Mask2FormerTrainingArguments(
                output_dir=folder,
                max_steps=arguments.steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=1e-3,  # of a small model from random weights
                backbone_multiplier=1.0,
                max_grad_norm=1.0,
                bf16=precision == "bf16",
                fp16=precision == "fp16",
                use_cpu=not torch.cuda.is_available(),
                dataloader_num_workers=arguments.workers,
                logging_steps=max(1, arguments.steps // 20),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processor=Mask2FormerImageProcessor(size={"height": SIZE, "width": SIZE}),
            train_dataset=ScenesDataset(arguments.steps * BATCH, size=SIZE, seed=0),
            eval_dataset=ScenesDataset(arguments.eval_images, size=SIZE, seed=HELD_OUT_SEED),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        pq = trainer.evaluate()["eval_pq"]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    finite = all(map(math.isfinite, losses))
    return {"precision": precision, "losses": losses, "finite": finite, "pq": pq, "seconds": seconds}


if __name__ == "__main__":
    main()
