"""Train Mask2Former in a loop of your own with Accelerate: on a CPU, a GPU or many, and resumable at any time.

    python examples/train_with_accelerate.py --output run --steps 5000 --backbone swin-t --classes classes.json
        --train-images images/train --train-maps labels/train --val-images images/val --val-maps labels/val

The same under `accelerate launch` or `torchrun`. With `--train-annotations` and `--val-annotations` (COCO panoptic
jsons) the maps are panoptic PNGs; without them they are PNGs of labels, which `--classes` names. After a stop of any
kind, also a kill while a checkpoint is being written, the same command with `--resume` continues as if nothing had
happened.
"""

import argparse
import json
import os
import shutil
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from mask2former_hf import (
    FROM_PRETRAINED,
    FROM_RANDOM,
    WEIGHT_DECAY,
    AugmentedDataset,
    ClassTable,
    CocoPanoptic,
    LabelMaps,
    SegmentationCollator,
    SegmentationEvaluator,
    augmentation_for,
    evaluation_loader,
    headline,
    loss_normalizers,
    match_gradient_strides,
    merge_processes,
    model_for_classes,
    new_model,
    parameter_groups,
    polynomial_schedule,
    process_group,
    processor_for,
    run_evaluation,
    set_epoch,
)


def main(arguments):
    # Micro-batches are counted below and not by Accelerate, which would divide the loss by their number.
    accelerator = Accelerator(
        cpu=arguments.cpu,
        mixed_precision=arguments.mixed_precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed),
    )
    set_seed(arguments.seed)
    train, val = reader(arguments, "train"), reader(arguments, "val")
    model = model_for(arguments, train)
    processor = processor_for(train.classes, arguments.crop, 2 * arguments.crop)
    loader = loader_for(arguments, train, processor)
    model.to(accelerator.device)
    if accelerator.num_processes > 1:
        match_gradient_strides(model)
    groups = parameter_groups(model, arguments.learning_rate, arguments.weight_decay, arguments.backbone_multiplier)
    optimizer = torch.optim.AdamW(groups)
    schedule = polynomial_schedule(optimizer, arguments.steps)
    # The schedule stays as it is: Accelerate would step it once for every process.
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    position = Position()
    accelerator.register_for_checkpointing(schedule, position)
    set_seed(arguments.seed, device_specific=True)  # every process draws points of its own
    checkpoints = arguments.output / "checkpoints"
    if arguments.resume:
        accelerator.load_state(str(last_checkpoint(checkpoints)))
        if position.step >= arguments.steps and (arguments.output / "config.json").exists():
            accelerator.print(
                f"{arguments.output} is complete: all {position.step} steps are done, nothing is changed"
            )
            return

    steps_per_epoch = -(-len(loader) // arguments.accumulate)
    shown = accelerator.is_main_process
    progress = tqdm(initial=position.step, total=arguments.steps, desc="training", unit="step", disable=not shown)
    model.train()
    while position.step < arguments.steps:
        epoch, done = divmod(position.step, steps_per_epoch)
        loader.set_epoch(epoch)
        set_epoch(loader, epoch)  # of the augmentation too, which Accelerate does not always reach
        batches = iter(accelerator.skip_first_batches(loader, done * arguments.accumulate))
        while position.step < arguments.steps and (micro_batches := list(islice(batches, arguments.accumulate))):
            losses = training_step(accelerator, model, optimizer, micro_batches, arguments.clip)
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            position.step += 1
            progress.update()
            progress.set_postfix({name: f"{value:.2f}" for name, value in losses.items()})
            if position.step % arguments.save_every == 0 or position.step == arguments.steps:
                save(accelerator, checkpoints, position.step, arguments.keep)
            if arguments.eval_every and position.step % arguments.eval_every == 0:
                figures = evaluate(accelerator, model, processor, val, arguments)
                progress.write(f"step {position.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
    progress.close()
    finish(accelerator, model, processor, val, arguments)


def finish(accelerator, model, processor, val, arguments):
    """Write the model and its figures."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(arguments.output, state_dict=state)
        processor.save_pretrained(arguments.output)
    if arguments.eval_every:
        figures = evaluate(accelerator, model, processor, val, arguments)
        if accelerator.is_main_process:
            (arguments.output / "metrics.json").write_text(json.dumps(figures, indent=2))


def reader(arguments, split):
    """The annotated images of a split."""
    images, maps = getattr(arguments, f"{split}_images"), getattr(arguments, f"{split}_maps")
    annotations = getattr(arguments, f"{split}_annotations")
    classes = None if arguments.classes is None else ClassTable.from_json(arguments.classes)
    if annotations is not None:
        return CocoPanoptic(images, annotations, maps, classes)
    if classes is None:
        raise SystemExit("--classes is missing: a json that names the labels of the maps")
    return LabelMaps(images, maps, classes)


def model_for(arguments, train):
    """A checkpoint's with the classes of the data, or a new one."""
    if arguments.model is not None:
        return model_for_classes(arguments.model, train.classes, train.task, arguments.queries)[0]
    fields = {} if arguments.queries is None else {"num_queries": arguments.queries}
    return new_model(arguments.backbone, train.classes, train.task, arguments.random_weights, **fields)


def loader_for(arguments, train, processor):
    """Batches of augmented images."""
    augmented = AugmentedDataset(train, augmentation_for(train.task, arguments.crop), seed=arguments.seed)
    return DataLoader(
        augmented,
        batch_size=arguments.batch_size,
        shuffle=True,
        num_workers=arguments.num_workers,
        collate_fn=SegmentationCollator(processor, resize=False),
        generator=torch.Generator(),  # an iterator more, after a resume, must not move the state that draws points
    )


def training_step(accelerator, model, optimizer, micro_batches, clip):
    """One optimizer step; returns the loss and its terms, summed over layers.

    Every micro-batch's loss is divided by what the whole step's would be divided by, over all processes. So two
    micro-batches, or two processes, give the gradient of one batch of twice the size.
    """
    labels = [labels for batch in micro_batches for labels in batch["class_labels"]]
    bare = accelerator.unwrap_model(model)
    sums = loss_normalizers(labels, bare.config.num_queries, bare.criterion.class_weights())
    sums = accelerator.reduce(sums.to(accelerator.device), "mean")
    totals = {}
    for number, batch in enumerate(micro_batches, 1):
        with accelerator.no_sync(model) if number < len(micro_batches) else nullcontext():
            outputs = model(**batch, normalizers=sums)
            accelerator.backward(outputs.loss)
        terms = {name: values.detach().sum() for name, values in outputs.loss_dict.items()}
        for name, value in {"loss": outputs.loss.detach(), **terms}.items():
            totals[name] = totals.get(name, 0.0) + value
    accelerator.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))


def evaluate(accelerator, model, processor, dataset, arguments):
    """Metrics of all processes' images; only their small states travel."""
    bare = accelerator.unwrap_model(model)
    evaluator = SegmentationEvaluator(bare.config, processor)
    loader = evaluation_loader(dataset, arguments.batch_size, arguments.num_workers)
    run_evaluation(bare, loader, evaluator, progress=accelerator.is_main_process)
    return headline(merge_processes(evaluator).compute())


class Position:
    """Optimizer steps done; with the sampler's seed that is the place in the data as well."""

    def __init__(self):
        self.step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def save(accelerator, folder, step, keep):
    """Model, optimizer, schedule, position and random states; the folder gets its name when all is written."""
    staging = folder / "incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(staging))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(staging, folder / f"step-{step:08d}")
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def last_checkpoint(folder):
    found = sorted(folder.glob("step-*"))
    if not found:
        raise SystemExit(f"--resume: {folder} has no complete checkpoint; train without --resume")
    return found[-1]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="checkpoint to start from")
    parser.add_argument("--backbone", default="tiny", help="without --model: tiny, r50, swin-t, ... or a Hub id")
    parser.add_argument("--random-weights", action="store_true", help="of the backbone; tiny always has them")
    for split in ("train", "val"):
        parser.add_argument(f"--{split}-images", required=True)
        parser.add_argument(f"--{split}-maps", required=True)
        parser.add_argument(f"--{split}-annotations")
    parser.add_argument("--classes")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=4, help="images per process and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--learning-rate", type=float, help="default: by the backbone's weights, as for the next two")
    parser.add_argument("--backbone-multiplier", type=float)
    parser.add_argument("--weight-decay", type=float, default=WEIGHT_DECAY)
    parser.add_argument("--clip", type=float)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"))
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--keep", type=int, default=2, help="checkpoints to keep")
    parser.add_argument("--eval-every", type=int, default=500, help="0: never (FSDP: see examples/README.md)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    arguments = parser.parse_args()
    random = arguments.model is None and (arguments.random_weights or arguments.backbone == "tiny")
    for name, value in (FROM_RANDOM if random else FROM_PRETRAINED).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    try:
        with process_group():
            main(parse_arguments())
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command with --resume goes on from the last checkpoint.") from None
