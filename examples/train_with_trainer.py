"""Train a semantic segmentation model on images and label maps with `Mask2FormerTrainer`, then use it.

    python examples/train_with_trainer.py DATA OUTPUT

DATA holds `images/train`, `images/val`, `labels/train`, `labels/val` and `classes.json`, which names the labels.
"""

import sys
from pathlib import Path

import torch

from mask2former_hf import (
    AugmentedDataset,
    ClassTable,
    LabelMaps,
    Mask2FormerTrainer,
    Mask2FormerTrainingArguments,
    Segmenter,
    augmentation_for,
    new_model,
    process_group,
    processor_for,
)


def main(data: Path, output: Path, steps: int = 2000, crop: int = 192, limit: int | None = None):
    classes = ClassTable.from_json(data / "classes.json")
    train, val = (LabelMaps(data / "images" / split, data / "labels" / split, classes) for split in ("train", "val"))
    if limit is not None:
        val = torch.utils.data.Subset(val, range(limit))
    # "tiny" is for CPUs; "swin-t" is the paper's; a folder or Hub id is a pretrained backbone. To fine-tune a
    # checkpoint: model, _ = model_for_classes("facebook/mask2former-...", classes, "semantic")
    model = new_model("tiny", classes, "semantic")
    processor = processor_for(classes, shortest_edge=crop, longest_edge=2 * crop)

    trainer = Mask2FormerTrainer(
        model,
        Mask2FormerTrainingArguments(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            learning_rate=1e-3,  # of a small model from random weights; the paper's 1e-4 is the default
            backbone_multiplier=1.0,
            max_grad_norm=1.0,
            eval_strategy="steps",
            eval_steps=max(1, steps // 4),
            save_steps=max(1, steps // 4),
            load_best_model_at_end=True,
            metric_for_best_model="miou",
            save_total_limit=1,
            report_to="none",
        ),
        processor=processor,
        train_dataset=AugmentedDataset(train, augmentation_for("semantic", crop), seed=0),
        augmented=True,
        eval_dataset=val,
    )
    trainer.train()
    trainer.save_model(output)

    result = Segmenter(output)(val[0].image)
    for segment in result.segments:
        print(f"{segment.label:12} {100 * segment.area / result.map.size:.1f} % of the first image")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    with process_group():  # also under torchrun or accelerate launch
        main(Path(sys.argv[1]), Path(sys.argv[2]))
