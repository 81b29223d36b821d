"""Measure a model on a dataset, image by image: only the metrics' small states are kept and sent between processes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm import tqdm

from ..data.example import Example
from ..data.reader import read_bands_of
from ..data.windows import ImageWindows
from ..inference.known_labels import task_of, window_of
from ..inference.results import segment_outputs
from ..inference.rules import rules_of
from ..inference.segmentation import Segmentation
from ..inference.segmenter import Segmenter
from ..inference.tiles import OVERLAP
from ..model.channels import check_same_channels, image_channels
from ..model.image_processing_mask2former import Mask2FormerImageProcessor
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation
from .average_precision import AveragePrecision
from .findings import Findings
from .matching_classes import with_classes_of
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality
from .processes import process_rank
from .truth import label_map, single_map, true_objects

METRICS = {"panoptic": ("pq",), "instance": ("ap",), "semantic": ("miou",)}  # task -> what is measured by default
KINDS = {"pq": "panoptic", "ap": "instance", "box_ap": "instance", "miou": "semantic"}  # metric -> results it needs
KNOWN_METRICS = tuple(KINDS)


class SegmentationEvaluator:
    """Compares a model's results with annotated examples (`data.example.Example`).

    Args:
        config: of the model, ours or transformers'; what it does not say of task and stuff is known of its labels.
        processor: of the model.
        metrics: some of "pq", "ap", "box_ap", "miou"; by default the one of the model's task (`METRICS`).
        threshold, overlap_threshold: of panoptic results; None for the checkpoint's own. Instances are all taken,
            because average precision is defined over every score.
        top_k: instances per image (the original's TEST.DETECTIONS_PER_IMAGE).
        refine: "otsu" or "crf" (`inference.rules.Rules`).
        max_detections: instances of a class and image that count for average precision; COCO's are 100, images in
            tiles may have thousands.
        findings: also gather what a report shows (`findings.Findings`); costs a second matching per image.

    Raises:
        ValueError: for unknown metrics, and numbers that none of them is measured by.
    """

    def __init__(
        self,
        config,
        processor: Mask2FormerImageProcessor,
        metrics: Sequence[str] | None = None,
        threshold: float | None = None,
        overlap_threshold: float | None = None,
        top_k: int | None = None,
        refine: str | None = None,
        max_detections: int | None = None,
        findings: bool = False,
    ):
        metrics = METRICS[task_of(config)] if metrics is None else metrics
        unknown = sorted(set(metrics) - set(KNOWN_METRICS))
        if unknown or not metrics:
            raise ValueError(f"metrics={list(metrics)}: choose from {', '.join(KNOWN_METRICS)}")
        self.processor = processor
        kinds = dict.fromkeys(KINDS[name] for name in metrics)
        given = {
            "panoptic": {"threshold": threshold, "overlap_threshold": overlap_threshold},
            "instance": {"top_k": top_k},
            "semantic": {},
        }
        for kind, numbers in given.items():
            unread = [name for name, value in numbers.items() if value is not None and kind not in kinds]
            if unread:
                raise ValueError(
                    f"{unread[0]}={numbers[unread[0]]!r}: metrics={list(metrics)} are not measured on {kind} results, "
                    "which it is about; leave it out"
                )
        given["instance"]["threshold"] = 0.0
        self.rules = {
            kind: rules_of(config, kind, processor=processor, refine=refine, **given[kind]) for kind in kinds
        }
        rules = next(iter(self.rules.values()))
        self.stuff, self.num_labels = set(rules.stuff_label_ids), len(rules.id2label)
        categories = {i: {"name": name, "isthing": i not in self.stuff} for i, name in rules.id2label.items()}
        things = {i: category for i, category in categories.items() if category["isthing"]}
        if not things and {"ap", "box_ap"} & set(metrics):
            raise ValueError(f"metrics={list(metrics)}: average precision needs things, and all classes are stuff")
        limits = (1, 10, 100) if max_detections is None else tuple(sorted({1, 10, max_detections}))
        makers = {
            "pq": lambda: PanopticQuality(categories),
            "ap": lambda: AveragePrecision(things, "segm", limits),
            "box_ap": lambda: AveragePrecision(things, "bbox", limits),
            "miou": lambda: MeanIoU(categories, ignore_index=self.num_labels),
        }
        self.metrics = {name: makers[name]() for name in metrics}
        self.findings = Findings(self.rules, categories) if findings else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The kinds of results that the metrics need."""
        return tuple(self.rules)

    def update(
        self, outputs, examples: Sequence[Example | Mapping], image_ids: Sequence
    ) -> list[dict[str, Segmentation]]:
        """Count a batch.

        Args:
            outputs: the model's, for the examples' images.
            examples: `data.example.Example`, or mappings (`Example.of`).
            image_ids: unique over all processes.

        Returns:
            Per image its "panoptic", "instance" and "semantic" results at the image's own size, as far as measured.
        """
        examples = [Example.of(example) for example in examples]
        images, sizes = ([getattr(example, name) for example in examples] for name in ("image", "size"))
        found = {task: segment_outputs(outputs, rules, sizes, images) for task, rules in self.rules.items()}
        results = [dict(zip(found, own, strict=True)) for own in zip(*found.values(), strict=True)]
        for example, result, image_id in zip(examples, results, image_ids, strict=True):
            self.count(result, example, image_id)
        return results

    def count(self, results: dict[str, Segmentation], example: Example | Mapping, image_id):
        """Count an image's results, by task, as `update` returns them."""
        example = Example.of(example)
        if "pq" in self.metrics:
            result = results["panoptic"]
            segments = [{"id": segment.id, "category_id": segment.label_id} for segment in result.segments]
            self.metrics["pq"].update(result.map, segments, single_map(example, "pq"), example.segments)
        if "instance" in self.rules:
            found = [entry for entry in results["instance"].to_coco() if entry["category_id"] not in self.stuff]
            masks, scores, labels = ([e[key] for e in found] for key in ("segmentation", "score", "category_id"))
            truth = true_objects(example, self.stuff)
            for name in {"ap", "box_ap"} & set(self.metrics):
                self.metrics[name].update(masks, np.array(scores), np.array(labels), truth, image_id=image_id)
        if "miou" in self.metrics:
            self.metrics["miou"].update(results["semantic"].map, label_map(example, self.num_labels))
        if self.findings is not None:
            self.findings.update(results, example, image_id)

    @property
    def parts(self) -> dict:
        """What is merged with other evaluators', by name."""
        return self.metrics if self.findings is None else self.metrics | {"findings": self.findings}

    def merge(self, other: "SegmentationEvaluator"):
        """Add the counts of other images."""
        for name, part in self.parts.items():
            part.merge(other.parts[name])

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


def own_share(dataset) -> Iterable[tuple[int, Example]]:
    """A data set of this process' numbered examples: each one belongs to exactly one process."""
    rank, world_size = process_rank()
    if isinstance(dataset, IterableDataset):  # a stream splits itself
        return _NumberedStream(dataset, rank, world_size)
    return Subset(_Numbered(dataset), range(rank, len(dataset), world_size))


def merge_processes(evaluator: SegmentationEvaluator) -> SegmentationEvaluator:
    """The evaluator of all processes' images, in every process."""
    rank, world_size = process_rank()
    if world_size == 1:
        return evaluator
    states = [None] * world_size
    torch.distributed.all_gather_object(states, evaluator.parts)
    for other, parts in enumerate(states):
        if other != rank:
            for name, part in evaluator.parts.items():
                part.merge(parts[name])
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
    tta: bool = False,
    tile: int | str | None = None,
    overlap: float = OVERLAP,
) -> int:
    """Feed all batches to `evaluator`; returns the number of images. Restores the model's mode.

    Args:
        autocast: half precision of the forward pass. By default it has that of the weights, as in the original,
            also inside a training in mixed precision: a checkpoint's figures are the same whoever measures it.
        tta: average over several sizes and both directions (`inference.tta`).
        tile, overlap: of `Segmenter`; a batch is then of tiles, as large as one of images.
    """
    training, images = model.training, 0
    device = next(iter(model.parameters())).device
    model.eval()
    # which knows of views, windows and tiles; otherwise one forward serves every task
    several = tta or tile is not None or window_of(model.config) is not None
    segmenter = Segmenter.of(model, evaluator.processor, tta=tta, tile=tile, overlap=overlap) if several else None
    try:
        with forward_in(autocast, model, device):
            for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not progress, leave=False):
                examples = [Example.of(example) for _, example in batch]
                numbers = [number for number, _ in batch]
                if several:
                    results = [_by_segmenter(segmenter, evaluator, example.image, len(batch)) for example in examples]
                    for result, example, number in zip(results, examples, numbers, strict=True):
                        evaluator.count(result, example, number)
                else:
                    pictures = [example.image for example in examples]
                    inputs = evaluator.processor(pictures, input_data_format="channels_last", return_tensors="pt")
                    results = evaluator.update(model(**inputs.to(device)), examples, numbers)
                images += len(batch)
                for example, result in zip(examples, results, strict=True):
                    if on_result is not None:
                        on_result(example, result)
    finally:
        model.train(training)
    return images


@contextlib.contextmanager
def forward_in(dtype: torch.dtype | None, model: torch.nn.Module, device: torch.device):
    """The model's forward pass, and nothing around it, in autocast; with None also without that of Accelerate.

    Accelerate puts the autocast of a training in mixed precision into `forward` itself, and leaves the forward that
    was there before in `_original_forward`.
    """
    attributes = vars(model)
    before, own = attributes.get("forward"), attributes.get("_original_forward", model.forward)
    attributes["forward"] = own if dtype is None else torch.autocast(device.type, dtype)(own)
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before


def _by_segmenter(segmenter: Segmenter, evaluator, image: np.ndarray, batch_size: int) -> dict[str, Segmentation]:
    windows = ImageWindows(image)
    return {task: segmenter.segment_windows(windows, rules, batch_size) for task, rules in evaluator.rules.items()}


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
    tta: bool = False,
    tile: int | str | None = None,
    overlap: float = OVERLAP,
    report: Callable[[SegmentationEvaluator], None] | None = None,
    **options,
) -> dict[str, dict]:
    """Metrics of a model on a dataset; under `torch.distributed` every process measures its share and gets the whole.

    Args:
        dataset: of annotated examples (`data.example.Example`) or mappings; a process measures every n-th. A reader is
            told which bands the processor takes (`Reader.channels`). Its classes are found in the model by name
            (`matching_classes.with_classes_of`).
        metrics, options: of `SegmentationEvaluator`; without metrics, and a task in the config, those of the data
            set's task.
        on_result: called with every example and its results.
        autocast, tta, tile, overlap: see `run_evaluation`.
        report: called at the end in the first process with the evaluator of all images and its findings, such as
            `functools.partial(evaluation.report.write_report, "FOLDER")`.

    Returns:
        The full summary of every metric, by its name; `headline` picks the usual figures.
    """
    check_same_channels(model.config, processor)
    read_bands_of(dataset, image_channels(processor))
    dataset = with_classes_of(model.config, dataset)
    if metrics is None and getattr(model.config, "task", None) is None:
        metrics = METRICS.get(getattr(dataset, "task", None))
    evaluator = SegmentationEvaluator(model.config, processor, metrics, findings=report is not None, **options)
    show = progress and process_rank()[0] == 0
    loader = evaluation_loader(dataset, batch_size, num_workers)
    run_evaluation(model, loader, evaluator, on_result, show, autocast, tta, tile, overlap)
    evaluator = merge_processes(evaluator)
    if report is not None and process_rank()[0] == 0:
        report(evaluator)
    return evaluator.compute()
