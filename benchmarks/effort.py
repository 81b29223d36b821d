"""Panoptic quality against time as `effort` falls: a small model on generated scenes, one point per decoder layer.

    python benchmarks/effort.py [--layers 6] [--steps 500] [--size 64] [--images 100] [--model FOLDER]

Trains the model of `mask2former-hf demo` with so many decoder layers, unless FOLDER has it already, and measures
held-out scenes. Times are processor time of one thread in the forward pass, each point of every image in turn.
"""

import argparse
import time
from pathlib import Path

import torch
from common import machine
from torch.utils.data import DataLoader

from mask2former_hf.cli.demo import save, train
from mask2former_hf.data.scenes import HELD_OUT_SEED, Scenes, ScenesDataset
from mask2former_hf.evaluation.evaluator import SegmentationEvaluator
from mask2former_hf.inference.effort import at_effort
from mask2former_hf.inference.loading import load_model, load_processor
from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor
from mask2former_hf.training.backbones import new_model
from mask2former_hf.training.collation import SegmentationCollator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--size", type=int, default=64, help="side of a scene")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--model", type=Path, default=Path("effort_model"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu", help="of the training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not (arguments.model / "config.json").is_file():
        train_model(arguments)
    measure(load_model(arguments.model), load_processor(arguments.model), arguments)


def train_model(arguments):
    torch.manual_seed(0)
    processor = Mask2FormerImageProcessor(size={"height": arguments.size, "width": arguments.size})
    predictions = arguments.layers + 1  # which is what the config counts
    model = new_model("tiny", Scenes.classes, "panoptic", decoder_layers=predictions).to(arguments.device)
    dataset = ScenesDataset(4 * arguments.steps, size=arguments.size, seed=0)
    train(model, DataLoader(dataset, batch_size=4, collate_fn=SegmentationCollator(processor)), arguments)
    save(model, processor, arguments.model)


@torch.inference_mode()
def measure(model, processor, arguments):
    model.eval()
    whole = len(model.model.transformer_module.decoder.layers)
    efforts = [layers / whole for layers in range(whole + 1)]
    models = [at_effort(model, effort) for effort in efforts]
    evaluators = [SegmentationEvaluator(model.config, processor, ["pq"]) for _ in efforts]
    seconds = [0.0] * len(efforts)
    scenes = ScenesDataset(arguments.images, size=arguments.size, seed=HELD_OUT_SEED)
    for number, example in enumerate(scenes):
        inputs = processor(example.image, input_data_format="channels_last", return_tensors="pt")
        for point, (reduced, evaluator) in enumerate(zip(models, evaluators, strict=True)):
            start = time.process_time()
            outputs = reduced(**inputs)
            seconds[point] += time.process_time() - start
            evaluator.update(outputs, [example], [number])
    print(machine())
    print("| effort | layers | ms | PQ | things | stuff |\n|---|---|---|---|---|---|")
    for layers, (effort, evaluator) in enumerate(zip(efforts, evaluators, strict=True)):
        summary = evaluator.compute()["pq"]
        quality = " | ".join(f"{100 * summary[part]['pq']:.1f}" for part in ("all", "things", "stuff"))
        print(f"| {effort:.2f} | {layers} | {1000 * seconds[layers] / len(scenes):.1f} | {quality} |")


if __name__ == "__main__":
    main()
