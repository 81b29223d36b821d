"""The metrics as `evaluate.Metric`: `add`, `add_batch` and `compute`, offline and in several processes.

Each image is reduced to counts or matches when it is added. `compute` writes this state into the shared cache
folder, where process 0 merges all of them. The files are pickles: the folder must be one that only you can write to.

    metric = PanopticQualityMetric(PanopticQuality(categories), num_process=2, process_id=rank, experiment_id="run 7",
                                   cache_dir="/a/folder/all/processes/see")
    metric.add_batch(predictions=processor.post_process_panoptic_segmentation(...), references=examples)
    figures = metric.compute()  # None but in process 0
"""

import copy
import pickle
from abc import abstractmethod

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError(
        "mask2former_hf.evaluation.adapters needs evaluate and datasets: pip install evaluate"
    ) from error

from .average_precision import AveragePrecision
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality


class ImageMetric(evaluate.Metric):
    """What the adapters share.

    Args:
        metric: an empty metric, which is copied.
        options: of `evaluate.Metric`, for several processes `num_process`, `process_id`, `experiment_id` and a
            `cache_dir` that all of them see; process 0 waits `timeout` seconds (100) for the slowest.
    """

    inputs: str
    paper: str

    def __init__(self, metric, **options):
        self._empty, self._counted = copy.deepcopy(metric), copy.deepcopy(metric)
        super().__init__(**options)
        self._name, self._computed = self.experiment_id, 0

    @abstractmethod
    def _count(self, prediction, reference):
        """Add one image to `self._counted`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation=self.paper,
            inputs_description=self.inputs,
            features=datasets.Features({"predictions": datasets.Value("binary")}),  # what the cache file holds
        )

    def add(self, *, prediction, reference):
        """Count one image."""
        self._count(prediction, reference)

    def add_batch(self, *, predictions, references):
        """Count images, given as two lists of equal length."""
        if references is None or len(predictions) != len(references):
            given = "no" if references is None else len(references)
            raise ValueError(f"{len(predictions)} predictions for {given} references: each image needs both")
        for prediction, reference in zip(predictions, references, strict=True):
            self._count(prediction, reference)

    def compute(self, *, predictions=None, references=None):
        """The metric's figures over all images of all processes, and start anew; None but in process 0."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        # Files of its own each time: otherwise a fast process writes its next state over one not yet read.
        self.info.experiment_id = f"{self._name}-{self._computed}"
        super().add_batch(predictions=[pickle.dumps(self._counted)])
        figures = super().compute()
        self._counted, self._computed = copy.deepcopy(self._empty), self._computed + 1
        return figures

    def _compute(self, predictions):
        first, *others = map(pickle.loads, predictions)
        for other in others:
            first.merge(other)
        return first.compute()


class PanopticQualityMetric(ImageMetric):
    """Panoptic quality as `evaluate.Metric`; takes a `PanopticQuality`."""

    inputs = """
Predictions and references: per image `{"segmentation": (H, W) ids with 0 for void, "segments_info": [{"id",
"category_id" (a prediction may call it "label_id"), "iscrowd" (references, optional)}]}`.
"""
    paper = "Kirillov et al., Panoptic Segmentation, CVPR 2019"

    def __init__(self, metric: PanopticQuality, **options):
        super().__init__(metric, **options)

    def _count(self, prediction, reference):
        predicted = [
            {"id": s["id"], "category_id": s["category_id"] if "category_id" in s else s["label_id"]}
            for s in prediction["segments_info"]
        ]
        self._counted.update(
            prediction["segmentation"], predicted, reference["segmentation"], reference["segments_info"]
        )


class AveragePrecisionMetric(ImageMetric):
    """Average precision as `evaluate.Metric`; takes an `AveragePrecision`."""

    inputs = """
Predictions: per image `{"masks", "scores", "labels"}`; references: `{"image_id", "segments_info"}`, the latter left
out if the metric was made with `from_coco`. Their forms are those of `AveragePrecision.update`.
"""
    paper = "Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014"

    def __init__(self, metric: AveragePrecision, **options):
        super().__init__(metric, **options)

    def _count(self, prediction, reference):
        self._counted.update(
            prediction["masks"],
            prediction["scores"],
            prediction["labels"],
            reference.get("segments_info"),
            image_id=reference["image_id"],
        )


class MeanIoUMetric(ImageMetric):
    """Mean IoU as `evaluate.Metric`; takes a `MeanIoU`."""

    inputs = """
Predictions and references: per image an (H, W) map of class ids.
"""
    paper = "Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2015"

    def __init__(self, metric: MeanIoU, **options):
        super().__init__(metric, **options)

    def _count(self, prediction, reference):
        self._counted.update(prediction, reference)
