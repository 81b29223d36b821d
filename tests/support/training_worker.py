"""A small training run for the tests, on its own or under torchrun: same global batch, same points, same weights.

python training_worker.py OUTPUT [--steps N] [--batch B] [--accumulate A] [--resume] [--plain] [--dropout] ...
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from helpers import tiny_config
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.data.augmentation import AugmentedDataset, augmentation_for
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS, ScenesDataset
from mask2former_hf.evaluation.processes import process_group
from mask2former_hf.training.collation import SegmentationCollator
from mask2former_hf.training.trainer import Mask2FormerTrainer, Mask2FormerTrainingArguments


def fixed_points(purpose, image, layers, shape, device, generator):
    """Points that do not depend on how images are spread over batches and processes."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(purpose)))


class Epochs(TrainerCallback):
    """The epoch of the data at every step."""

    def __init__(self, data, seen):
        self.data, self.seen = data, seen

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.data.epoch)


def build(arguments):
    torch.use_deterministic_algorithms(True)
    set_seed(0)
    config = tiny_config(
        arguments.backbone, id2label=ID2LABEL, stuff_label_ids=list(STUFF_LABEL_IDS), task="panoptic", num_queries=12
    )
    model = Mask2FormerForUniversalSegmentation(config)
    if arguments.fixed_points:
        model.criterion.draw_points = fixed_points
    processor = Mask2FormerImageProcessor(do_resize=False, label_ids_to_fuse=list(STUFF_LABEL_IDS))
    options = {
        "output_dir": arguments.output,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": arguments.accumulate,
        "save_strategy": "steps",
        "save_steps": arguments.save_steps,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "save_total_limit": arguments.limit,
        "dataloader_num_workers": arguments.workers,
        "dataloader_persistent_workers": arguments.persistent,
        "dataloader_pin_memory": False,
        "eval_strategy": "steps" if arguments.evaluate else "no",
        "eval_steps": arguments.save_steps,
        "load_best_model_at_end": arguments.evaluate,
        "bf16": arguments.bf16,
    }
    data = ScenesDataset(arguments.images, size=64)
    if arguments.augment:
        data = AugmentedDataset(data, augmentation_for("panoptic", 64), seed=3)
    held_out = ScenesDataset(5, size=64, seed=9)
    if arguments.plain:
        return Trainer(
            model,
            TrainingArguments(**options, remove_unused_columns=False, learning_rate=1e-3),
            data_collator=SegmentationCollator(processor),
            train_dataset=data,
        )
    if arguments.evaluate:
        options |= {"metric_for_best_model": "pq", "greater_is_better": True}
    settings = Mask2FormerTrainingArguments(
        **options, learning_rate=1e-3, eval_metrics=["pq", "ap", "miou"], max_grad_norm=0.1
    )
    return Mask2FormerTrainer(
        model,
        settings,
        processor=processor,
        train_dataset=data,
        augmented=arguments.augment,
        eval_dataset=held_out,
        eval_thresholds={"threshold": 0.1},
    )


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--backbone", default="swin")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=2)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--workers", type=int, default=0)
    for flag in ("fixed-points", "resume", "plain", "evaluate", "augment", "persistent", "bf16"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--stop-at", type=int, help="end the process without warning after this step")
    parser.add_argument(
        "--kill-while-saving", type=int, help="SIGKILL in the middle of writing this step's checkpoint"
    )
    arguments = parser.parse_args(argv)
    trainer = build(arguments)
    if arguments.kill_while_saving:
        save = trainer._save_optimizer_and_scheduler

        def save_or_die(folder):
            if folder.endswith(f"checkpoint-{arguments.kill_while_saving}"):
                os.kill(os.getpid(), 9)
            save(folder)

        trainer._save_optimizer_and_scheduler = save_or_die
    if arguments.stop_at:

        class Stop(TrainerCallback):
            def on_save(self, settings, state, control, **kwargs):
                if state.global_step == arguments.stop_at:
                    control.should_training_stop = True

        trainer.add_callback(Stop())
    epochs = []
    if arguments.augment:
        trainer.add_callback(Epochs(trainer.train_dataset, epochs))
    trainer.train(resume_from_checkpoint=True if arguments.resume else None)
    if trainer.is_world_process_zero():
        folder = Path(arguments.output)
        torch.save(trainer.model.state_dict(), folder / "final.pt")
        (folder / "epochs.json").write_text(json.dumps(epochs))
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    if arguments.evaluate:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            (folder / "metrics.json").write_text(json.dumps(metrics))
    return trainer


if __name__ == "__main__":
    with process_group():
        main()
