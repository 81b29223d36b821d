"""Data sets for benchmarks; small models and a resumable training loop for benchmarks/refinement.py."""

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import ResNetConfig

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.data.augmentation import resize_crop
from mask2former_hf.data.classes import BACKGROUND_ID, IGNORE
from mask2former_hf.data.coco import CocoPanoptic
from mask2former_hf.data.folders import InstanceMaps, LabelMaps
from mask2former_hf.data.scenes import HELD_OUT_SEED, ID2LABEL, STUFF_LABEL_IDS, ScenesDataset
from mask2former_hf.training.collation import SegmentationCollator
from mask2former_hf.training.distillation import Distillation
from mask2former_hf.training.optimization import parameter_groups, polynomial_schedule

CHECKPOINT_STEPS = 100  # a run that was stopped loses fewer


class Data:
    """Training and validation examples of a data set, how they are resized, and what its model is for."""

    def __init__(self, name: str, root: Path):
        self.name, self.pipeline, self.labels, self.stuff, self.queries = name, None, ID2LABEL, (), 20
        if name == "scenes":
            self.train, self.val = ScenesDataset(10**6, size=128), ScenesDataset(200, size=128, seed=HELD_OUT_SEED)
            self.task, self.stuff, self.size = "panoptic", STUFF_LABEL_IDS, {"height": 128, "width": 128}
        elif name == "camvid":
            folder = root / "camvid"
            names = json.loads((folder / "classes.json").read_text())["classes"]
            classes = {**dict(enumerate(names)), len(names): IGNORE}
            self.train, self.val = (
                LabelMaps(folder / "images" / split, folder / "labels" / split, classes) for split in ("train", "val")
            )
            self.labels, self.stuff = dict(enumerate(names)), tuple(range(len(names)))
            self.task, self.size = "semantic", {"shortest_edge": 240, "longest_edge": 320}
            self.pipeline = resize_crop(range(180, 361, 20), 10**4, 192, 192, padding_id=0, keep_empty=False)
        elif name == "coco":
            folder = root / "coco_panoptic"
            self.train, self.val = (
                CocoPanoptic(
                    folder / split, folder / "annotations" / f"panoptic_{split}.json", folder / f"panoptic_{split}"
                )
                for split in ("train", "val")
            )
            self.labels, self.task, self.queries = self.train.classes.id2label, "semantic", 60
            self.stuff = self.train.classes.stuff_label_ids
            self.size = {"shortest_edge": 256, "longest_edge": 384}
            self.pipeline = resize_crop(range(192, 385, 32), 10**4, 192, 192, padding_id=0, keep_empty=False)
        elif name == "nuclei":
            folder = root / "nuclei_dsb2018"
            self.train, self.val = (
                InstanceMaps(folder / "images" / split, folder / "instance_labels" / split, "nucleus")
                for split in ("train", "val")
            )
            self.labels, self.task, self.queries = {0: "nucleus"}, "instance", 100
            self.size = {"shortest_edge": 384, "longest_edge": 640}
            options = {"padding_id": BACKGROUND_ID, "keep_empty": False}
            self.pipeline = resize_crop(range(256, 513, 32), 10**4, 256, 256, **options)
        self.processor = Mask2FormerImageProcessor(size=self.size)

    def batch(self, step: int, batch_size: int, seed: int) -> dict:
        """A function of its arguments alone, so that a resumed run goes on as if it had not stopped."""
        rng = np.random.default_rng([seed, step])
        examples = [self.train[int(index)] for index in rng.integers(len(self.train), size=batch_size)]
        if self.pipeline is not None:
            examples = [self.pipeline(example, rng) for example in examples]
        return SegmentationCollator(self.processor, resize=self.pipeline is None)(examples)


def config(data: Data, width: int) -> Mask2FormerConfig:
    """A model from scratch: width 64 has 1.4 M parameters, as in the demo."""
    fields = {
        "backbone_config": ResNetConfig(
            embedding_size=width // 2,
            hidden_sizes=[width // 2, width, 2 * width, 3 * width],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        "feature_size": width,
        "mask_feature_size": width,
        "hidden_dim": width,
        "encoder_feedforward_dim": 4 * width,
        "encoder_layers": 2,
        "decoder_layers": 4,
        "num_attention_heads": 4,
        "dim_feedforward": 8 * width,
        "num_queries": data.queries,
        "train_num_points": 1024,
        "id2label": data.labels,
        "label2id": {name: index for index, name in data.labels.items()},
        "task": data.task,
        "stuff_label_ids": list(data.stuff),
    }
    return Mask2FormerConfig(**fields)


def train(folder: Path, data: Data, model_config, steps: int, seed: int, arguments, teacher=None, labelled=True):
    """The trained model of a run; goes on with a run that was stopped, reads one that is done."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").is_file():
        return Mask2FormerForUniversalSegmentation.from_pretrained(folder).to(arguments.device).eval()
    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(model_config).to(arguments.device).train()
    distillation = None if teacher is None else Distillation(teacher, model, weight=arguments.distillation_weight)
    groups = parameter_groups(model, arguments.learning_rate, backbone_multiplier=1.0)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    schedule, state = polynomial_schedule(optimizer, steps), folder / "state.pt"
    parts, done = {"model": model, "optimizer": optimizer, "schedule": schedule}, 0
    if state.is_file():
        saved = torch.load(state, map_location=arguments.device)
        done = saved.pop("step")
        for name, values in saved.items():
            parts[name].load_state_dict(values)
    for step in tqdm(range(done, steps), desc=folder.name, initial=done, total=steps, unit="step"):
        torch.manual_seed(hash((seed, step)))
        batch = {
            name: [x.to(arguments.device) for x in value] if isinstance(value, list) else value.to(arguments.device)
            for name, value in data.batch(step, arguments.batch_size, seed).items()
        }
        if not labelled:
            batch = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
        outputs = model(**batch, output_hidden_states=True)
        loss = outputs.loss if labelled else 0
        if distillation is not None:
            loss = loss + sum(distillation(outputs, batch).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % CHECKPOINT_STEPS == 0:
            staging = state.with_suffix(".part")
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, staging)
            staging.replace(state)
    model.save_pretrained(folder)
    data.processor.save_pretrained(folder)
    state.unlink(missing_ok=True)
    return model.eval()
