"""Quality against time as `effort` falls: one point per decoder layer, and one of all layers with fewer queries.

    python benchmarks/effort.py [--layers 6] [--encoder-layers 6 --encoder-exits] [--steps 500] [--checkpoint FOLDER]
    python benchmarks/effort.py --data camvid|coco --data-root DATA [--backbone FOLDER] [--checkpoint FOLDER]
    python benchmarks/effort.py --timed swin-t [--timed-size 640]

Trains the model of `mask2former-hf demo` with so many decoder layers, or that on another backbone, unless --checkpoint
has one already, and measures held-out scenes, or CamVid's validation images, or the 19 images of COCO's subset that it
was trained on, as in docs/results.md: so few teach nothing about others (DATA holds `camvid/` and `coco_panoptic/`);
by the metric of the checkpoint's task, classes matched by name. Times are processor time of one thread in the forward
pass, on a GPU those until it is done, each point of every image in turn. `--only-train` leaves the measurement to
another call. `--timed` is the time alone, of a network of the paper's size with random weights, of whose 100 queries
20 are kept, and of the product that its last mask logits are.
"""

import argparse
import time
from pathlib import Path

import torch
from common import BACKBONES, interleaved_medians, machine
from refinement_runs import Data
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.cli.demo import save, train
from mask2former_hf.data.coco import CocoPanoptic
from mask2former_hf.data.scenes import HELD_OUT_SEED, ScenesDataset
from mask2former_hf.evaluation.evaluator import METRICS, SegmentationEvaluator
from mask2former_hf.evaluation.matching_classes import with_classes_of
from mask2former_hf.inference import effort
from mask2former_hf.inference.effort import at_effort
from mask2former_hf.inference.loading import load_model, load_processor
from mask2former_hf.model.image_processing_mask2former import Mask2FormerImageProcessor
from mask2former_hf.training.backbones import TINY, TINY_FIELDS, new_model, normalisation_of
from mask2former_hf.training.collation import SegmentationCollator

ALL_LAYERS = 0.999  # with the queries that `effort` below 1 keeps
COCO_SIZE, COCO_QUERIES = {"shortest_edge": 192, "longest_edge": 256}, 60  # docs/results.md's
COLUMNS = {
    "pq": {"PQ": lambda s: s["all"]["pq"], "things": lambda s: s["things"]["pq"], "stuff": lambda s: s["stuff"]["pq"]},
    "ap": {"AP": lambda s: s["AP"], "AP50": lambda s: s["AP50"]},
    "miou": {"mIoU": lambda s: s["mIoU"], "pixel accuracy": lambda s: s["pACC"]},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--encoder-layers", type=int, default=TINY_FIELDS["encoder_layers"], help="of a new model")
    parser.add_argument("--encoder-exits", action="store_true", help="of a new model: see docs/effort.md")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--size", type=int, default=64, help="side of a scene")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--checkpoint", type=Path, default=Path("effort_model"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--timed", choices=BACKBONES)
    parser.add_argument("--timed-size", type=int, default=640)
    parser.add_argument("--data", choices=("scenes", "camvid", "coco"), default="scenes")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--backbone", default=TINY, help="as `train` has it: a name, or a folder with its weights")
    parser.add_argument("--device", default="cpu", help="of training and measurement")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare CamVid's images")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training images")
    parser.add_argument("--only-train", action="store_true")
    arguments = parser.parse_args()
    if arguments.data != "scenes" and arguments.data_root is None:
        parser.error(f"--data {arguments.data} needs --data-root, the folder that holds it")
    torch.set_num_threads(1)
    if arguments.timed:
        time_large(arguments.timed, arguments.timed_size, arguments.encoder_exits)
        return
    if not (arguments.checkpoint / "config.json").is_file():
        train_model(arguments)
    if arguments.only_train:
        return
    measure(load_model(arguments.checkpoint).to(arguments.device), load_processor(arguments.checkpoint), arguments)


def train_model(arguments):
    torch.manual_seed(arguments.seed)
    fields = TINY_FIELDS | {
        "decoder_layers": arguments.layers + 1,  # predictions, which is what the config counts
        "encoder_layers": arguments.encoder_layers,
        "encoder_exits": arguments.encoder_exits,
    }
    normalisation = normalisation_of(arguments.backbone)
    if arguments.data == "camvid":
        data = Data("camvid", arguments.data_root)
        data.processor = processor = Mask2FormerImageProcessor(size=data.size, **normalisation)
        task, classes = data.task, data.train.classes
        batches = DataLoader(
            Drawn(data, arguments.steps, arguments.seed), batch_size=None, num_workers=arguments.workers
        )
    else:
        task, size = "panoptic", {"height": arguments.size, "width": arguments.size}
        dataset, sampler = ScenesDataset(4 * arguments.steps, size=arguments.size, seed=arguments.seed), None
        if arguments.data == "coco":
            dataset, size, fields["num_queries"] = coco(arguments), COCO_SIZE, COCO_QUERIES
            sampler = RandomSampler(dataset, replacement=True, num_samples=4 * arguments.steps)
        processor, classes = Mask2FormerImageProcessor(size=size, **normalisation), dataset.classes
        batches = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=SegmentationCollator(processor))
    model = new_model(arguments.backbone, classes, task, **fields).to(arguments.device)
    train(model, batches, arguments)
    save(model, processor, arguments.checkpoint)


def held_out(arguments):
    if arguments.data == "scenes":
        return ScenesDataset(arguments.images, size=arguments.size, seed=HELD_OUT_SEED)
    return Data("camvid", arguments.data_root).val if arguments.data == "camvid" else coco(arguments)


def clock(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def coco(arguments) -> CocoPanoptic:
    """The images of COCO's subset whose licences let everybody have them."""
    folder = arguments.data_root / "coco_panoptic"
    return CocoPanoptic(
        folder / "train", folder / "annotations" / "panoptic_train_clean.json", folder / "panoptic_train"
    )


class Drawn(Dataset):
    """The batches of a training by their number."""

    def __init__(self, data: Data, steps: int, seed: int):
        self.data, self.steps, self.seed = data, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict:
        return self.data.batch(step, batch_size=4, seed=self.seed)


@torch.inference_mode()
def measure(model, processor, arguments):
    model.eval()
    layers = model.model.transformer_module.decoder.layers
    efforts = [*(count / len(layers) for count in range(len(layers))), ALL_LAYERS, 1]
    models, metric = [at_effort(model, share) for share in efforts], METRICS[model.config.task][0]
    evaluators = [SegmentationEvaluator(model.config, processor, [metric]) for _ in efforts]
    seconds, queries, seen = [0.0] * len(efforts), [0] * len(efforts), []
    for layer in layers:  # which the models share
        layer.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[1]))
    examples = with_classes_of(model.config, held_out(arguments))
    count = min(arguments.images, len(examples))
    for number in range(count):
        example = examples[number]
        inputs = processor(example.image, input_data_format="channels_last", return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.device)
        for point, (reduced, evaluator) in enumerate(zip(models, evaluators, strict=True)):
            seen.clear()
            start = clock(model.device)
            outputs = reduced(**inputs)
            seconds[point] += clock(model.device) - start
            queries[point] += seen[-1] if seen else 0
            evaluator.update(outputs, [example], [number])
    print(machine())
    with_exits = model.config.encoder_exits
    columns = ["effort", *(["encoder layers"] * with_exits), "layers", "queries of the last", "ms", *COLUMNS[metric]]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for point, (share, evaluator) in enumerate(zip(efforts, evaluators, strict=True)):
        values = COLUMNS[metric].values()
        quality = " | ".join(f"{100 * value(evaluator.compute()[metric]):.1f}" for value in values)
        parts = models[point].model
        done = str(len(parts.transformer_module.decoder.layers))
        if with_exits:
            done = f"{len(parts.pixel_level_module.decoder.encoder.layers)} | {done}"
        time_of = f"{queries[point] / count:.1f} | {1000 * seconds[point] / count:.1f}"
        typed = share if share >= ALL_LAYERS else int(100 * share) / 100  # below the fraction: layers are rounded up
        print(f"| {typed:g} | {done} | {time_of} | {quality} |")


@torch.inference_mode()
def time_large(backbone: str, size: int, exits: bool, kept: int = 20):
    torch.manual_seed(0)
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone](), encoder_exits=exits)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    pixels = torch.randn(1, 3, size, size)
    early = at_effort(model, effort.EARLY)(pixels).class_queries_logits[0]
    effort.HOPELESS = (1 - early.softmax(-1)[:, -1]).sort(descending=True).values[kept - 1 : kept + 1].mean().item()
    models = {share: at_effort(model, share) for share in (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, ALL_LAYERS, 1)}
    runs = {share: lambda reduced=reduced: reduced(pixels) for share, reduced in models.items()}
    seconds = interleaved_medians(runs, repeats=5, clock=time.process_time)
    print(machine(), f"one image of {size} x {size}, {backbone}", sep="\n")
    for share, value in seconds.items():
        print(f"effort {share:.3f}: {1000 * value:.0f} ms, {value / seconds[1]:.2f} of the whole")
    outputs = model.model(pixels, mask_logits="none")
    embeddings = model.model.mask_embeddings(outputs.transformer_decoder_intermediate_states[-1])
    maps = {
        count: lambda some=embeddings[:, :count]: model.model.mask_maps(some, outputs.pixel_decoder_last_hidden_state)
        for count in (kept, embeddings.shape[1])
    }
    for count, value in interleaved_medians(maps, repeats=9, clock=time.process_time).items():
        print(f"mask logits of {count} queries: {1000 * value:.0f} ms, {value / seconds[1]:.3f} of the whole")


if __name__ == "__main__":
    main()
