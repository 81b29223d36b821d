"""Measure a model on a dataset, image by image: only the metrics' small states are kept and sent between processes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from ..data.example import Example
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from .average_precision import AveragePrecision
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality

METRICS = {"panoptic": ("pq",), "instance": ("ap",), "semantic": ("miou",)}  # task -> what is measured by default
KNOWN_METRICS = ("pq", "ap", "box_ap", "miou")


class SegmentationEvaluator:
    """Compares a model's results with annotated examples (`data.example.Example`).

    Args:
        config: of the model: its classes, `stuff_label_ids` and `task`.
        processor: post-processes the outputs.
        metrics: some of "pq", "ap", "box_ap", "miou"; by default the one of the task.
        threshold, overlap_threshold: of panoptic results (the original's OBJECT_MASK_THRESHOLD and OVERLAP_THRESHOLD).
        top_k: instances per image (the original's TEST.DETECTIONS_PER_IMAGE).
    """

    def __init__(
        self,
        config,
        processor: Mask2FormerImageProcessor,
        metrics: Sequence[str] | None = None,
        threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        top_k: int = 100,
    ):
        if metrics is None:
            if config.task is None:
                raise ValueError(f"metrics=None and the model's config has no task: choose from {KNOWN_METRICS}")
            metrics = METRICS[config.task]
        unknown = sorted(set(metrics) - set(KNOWN_METRICS))
        if unknown or not metrics:
            raise ValueError(f"metrics={list(metrics)}: choose from {', '.join(KNOWN_METRICS)}")
        self.processor, self.task = processor, config.task
        self.threshold, self.overlap_threshold, self.top_k = threshold, overlap_threshold, top_k
        self.stuff = set(config.stuff_label_ids or ())
        self.num_labels = config.num_labels
        categories = {i: {"name": name, "isthing": i not in self.stuff} for i, name in config.id2label.items()}
        things = {i: category for i, category in categories.items() if category["isthing"]}
        if not things and {"ap", "box_ap"} & set(metrics):
            raise ValueError(f"metrics={list(metrics)}: average precision needs things, and all classes are stuff")
        makers = {
            "pq": lambda: PanopticQuality(categories),
            "ap": lambda: AveragePrecision(things, "segm"),
            "box_ap": lambda: AveragePrecision(things, "bbox"),
            "miou": lambda: MeanIoU(categories, ignore_index=self.num_labels),
        }
        self.metrics = {name: makers[name]() for name in metrics}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The kinds of results that the metrics need."""
        kinds = {"pq": "panoptic", "ap": "instance", "box_ap": "instance", "miou": "semantic"}
        return tuple(dict.fromkeys(kinds[name] for name in self.metrics))

    def update(self, outputs, examples: Sequence[Example | Mapping], image_ids: Sequence) -> list[dict]:
        """Count a batch.

        Args:
            outputs: the model's, for the examples' images.
            examples: `data.example.Example`, or mappings (`Example.of`).
            image_ids: unique over all processes.

        Returns:
            Per image its "panoptic", "instance" and "semantic" results at the image's own size, as far as measured.
        """
        examples = [Example.of(example) for example in examples]
        sizes = [example.size for example in examples]
        found = {}
        if "panoptic" in self.tasks:
            found["panoptic"] = self.processor.post_process_panoptic_segmentation(
                outputs,
                threshold=self.threshold,
                overlap_mask_area_threshold=self.overlap_threshold,
                label_ids_to_fuse=self.stuff,
                target_sizes=sizes,
            )
        if "instance" in self.tasks:
            found["instance"] = self.processor.post_process_instance_segmentation(
                outputs, threshold=0.0, target_sizes=sizes, top_k=self.top_k
            )
        if "semantic" in self.tasks:
            found["semantic"] = self.processor.post_process_semantic_segmentation(
                outputs, target_sizes=sizes, resize_masks_first=self.task != "semantic"
            )
        results = [dict(zip(found, own, strict=True)) for own in zip(*found.values(), strict=True)]
        for example, result, image_id in zip(examples, results, image_ids, strict=True):
            self.count(result, example, image_id)
        return results

    def count(self, result: dict, example: Example | Mapping, image_id):
        """Count an image's results, by task, as `update` returns them."""
        example = Example.of(example)
        if "pq" in self.metrics:
            segments = [{"id": s["id"], "category_id": s["label_id"]} for s in result["panoptic"]["segments_info"]]
            truth = single_map(example, "pq"), example.segments
            self.metrics["pq"].update(result["panoptic"]["segmentation"], segments, *truth)
        if "instance" in self.tasks:
            found = result["instance"]
            is_thing = torch.tensor([label not in self.stuff for label in found["labels"].tolist()]).bool()
            masks, scores, labels = (found[name].cpu()[is_thing] for name in ("masks", "scores", "labels"))
            truth = true_objects(example, self.stuff)
            for name in {"ap", "box_ap"} & set(self.metrics):
                self.metrics[name].update(masks, scores, labels, truth, image_id=image_id)
        if "miou" in self.metrics:
            self.metrics["miou"].update(result["semantic"], label_map(example, self.num_labels))

    def merge(self, other: "SegmentationEvaluator"):
        """Add the counts of other images."""
        for name, metric in self.metrics.items():
            metric.merge(other.metrics[name])

    def compute(self) -> dict[str, dict]:
        """The full summary of every metric, by its name."""
        return {name: metric.compute() for name, metric in self.metrics.items()}


def headline(summaries: dict[str, dict]) -> dict[str, float]:
    """The figures of `SegmentationEvaluator.compute` that are followed during training, flat and in [0, 1]."""
    figures = {}
    if "pq" in summaries:
        summary = summaries["pq"]
        figures |= {"pq": summary["all"]["pq"], "sq": summary["all"]["sq"], "rq": summary["all"]["rq"]}
        figures |= {f"pq_{part}": summary[part]["pq"] for part in ("things", "stuff") if summary[part]["n"]}
    for name, prefix in (("ap", ""), ("box_ap", "box_")):
        if name in summaries:
            keys = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "aps": "APs", "apm": "APm", "apl": "APl"}
            figures |= {prefix + ours: summaries[name][theirs] for ours, theirs in keys.items()}
    if "miou" in summaries:
        keys = {"miou": "mIoU", "fwiou": "fwIoU", "macc": "mACC", "pacc": "pACC"}
        figures |= {ours: summaries["miou"][theirs] for ours, theirs in keys.items()}
    return {name: float(value) for name, value in figures.items()}


def single_map(example: Example, metric: str) -> np.ndarray:
    """The (H, W) map of an example without overlaps, background as void."""
    if len(example.layers) != 1:
        raise ValueError(f"{example.name} has overlapping segments: {metric} is not defined for them; measure 'ap'")
    return np.maximum(example.layers[0], 0)


def label_map(example: Example, ignore_index: int) -> np.ndarray:
    """(H, W) class of each pixel, `ignore_index` where there is none."""
    segmentation = single_map(example, "miou")
    table = np.full(int(segmentation.max(initial=0)) + 1, ignore_index, dtype=np.int64)
    for segment in example.segments:
        if segment["id"] < len(table):
            table[segment["id"]] = segment["category_id"]
    return table[segmentation]


def true_objects(example: Example, stuff: set[int]) -> list[dict]:
    """The things of an example as `AveragePrecision.update` takes them."""
    things = [segment for segment in example.segments if segment["category_id"] not in stuff]
    return [
        {
            "category_id": segment["category_id"],
            "segmentation": mask,
            "iscrowd": segment.get("iscrowd", 0),
            **({"area": segment["area"]} if "area" in segment else {}),
        }
        for segment, mask in zip(things, example.masks(things), strict=True)
    ]


def own_share(dataset) -> Iterable[tuple[int, Example]]:
    """A data set of this process' numbered examples: each one belongs to exactly one process."""
    rank, world_size = process_rank()
    if isinstance(dataset, IterableDataset):  # a stream splits itself
        return _NumberedStream(dataset, rank, world_size)
    return Subset(_Numbered(dataset), range(rank, len(dataset), world_size))


def process_rank() -> tuple[int, int]:
    """(rank, number of processes) of `torch.distributed`; (0, 1) without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def merge_processes(evaluator: SegmentationEvaluator) -> SegmentationEvaluator:
    """The evaluator of all processes' images, in every process."""
    rank, world_size = process_rank()
    if world_size == 1:
        return evaluator
    states = [None] * world_size
    torch.distributed.all_gather_object(states, evaluator.metrics)
    for other, metrics in enumerate(states):
        if other != rank:
            for name, metric in metrics.items():
                evaluator.metrics[name].merge(metric)
    return evaluator


class _Numbered:
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.dataset[index]


class _NumberedStream(IterableDataset):
    def __init__(self, dataset, rank: int, world_size: int):
        self.dataset, self.rank, self.world_size = dataset, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, Example]]:
        for position, example in enumerate(self.dataset):
            yield position * self.world_size + self.rank, example


def evaluation_loader(dataset, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Batches of (number, example) of this process' share."""
    return DataLoader(own_share(dataset), batch_size=batch_size, num_workers=num_workers, collate_fn=list)


@torch.inference_mode()
def run_evaluation(
    model: torch.nn.Module,
    loader: Iterable[list[tuple[int, Example]]],
    evaluator: SegmentationEvaluator,
    on_result: Callable[[Example, dict], None] | None = None,
    progress: bool = True,
    autocast: torch.dtype | None = None,
    segment: Callable[[np.ndarray, str], object] | None = None,
) -> int:
    """Feed all batches to `evaluator`; returns the number of images. Restores the model's mode.

    Args:
        segment: gives an image's result for a task ("panoptic", ...) by other means than the model's plain output,
            such as `inference.results.segment_image`.
    """
    training, images = model.training, 0
    device = next(iter(model.parameters())).device
    model.eval()
    try:
        for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not progress, leave=False):
            examples = [Example.of(example) for _, example in batch]
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                if segment is None:
                    pictures = [example.image for example in examples]
                    inputs = evaluator.processor(pictures, input_data_format="channels_last", return_tensors="pt")
                    outputs = model(**inputs.to(device))
                else:
                    results = [{task: segment(e.image, task) for task in evaluator.tasks} for e in examples]
            if segment is None:
                results = evaluator.update(outputs, examples, [number for number, _ in batch])
            else:
                for result, (number, _), example in zip(results, batch, examples, strict=True):
                    evaluator.count(result, example, number)
            images += len(batch)
            for example, result in zip(examples, results, strict=True):
                if on_result is not None:
                    on_result(example, result)
    finally:
        model.train(training)
    return images


def evaluate(
    model: Mask2FormerForUniversalSegmentation,
    processor: Mask2FormerImageProcessor,
    dataset,
    metrics: Sequence[str] | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    on_result: Callable[[Example, dict], None] | None = None,
    progress: bool = True,
    autocast: torch.dtype | None = None,
    segment: Callable[[np.ndarray, str], object] | None = None,
    **thresholds,
) -> dict[str, dict]:
    """Metrics of a model on a dataset; under `torch.distributed` every process measures its share and gets the whole.

    Args:
        dataset: of annotated examples (`data.example.Example`) or mappings; a process measures every n-th.
        metrics: see `SegmentationEvaluator`, as for `thresholds`.
        on_result: called with every example and its results.
        autocast: half precision of the forward pass.
        segment: see `run_evaluation`.

    Returns:
        The full summary of every metric, by its name; `headline` picks the usual figures.
    """
    check_classes(model.config, dataset)
    evaluator = SegmentationEvaluator(model.config, processor, metrics, **thresholds)
    show = progress and process_rank()[0] == 0
    loader = evaluation_loader(dataset, batch_size, num_workers)
    run_evaluation(model, loader, evaluator, on_result, show, autocast, segment)
    return merge_processes(evaluator).compute()


def check_classes(config, dataset):
    """Refuse a dataset whose classes are not the model's.

    Raises:
        ValueError: naming the first class that differs.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None:
        return
    theirs, ours = dict(classes.id2label), {int(i): name for i, name in config.id2label.items()}
    if theirs != ours:
        differing = next(i for i in range(max(len(theirs), len(ours))) if theirs.get(i) != ours.get(i))
        raise ValueError(
            f"dataset has {len(theirs)} classes and the model {len(ours)}; the first that differs is class "
            f"{differing}: {theirs.get(differing)!r} in the data, {ours.get(differing)!r} in the model. Use the "
            "checkpoint's own classes, or give the model those of the data (training.label_surgery.set_labels)"
        )
