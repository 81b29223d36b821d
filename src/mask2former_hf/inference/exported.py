"""An exported checkpoint as a network and its results, in ONNX Runtime or OpenVINO, NumPy and Pillow: no torch.

Letters: B batch, Q queries, K classes, (H, W) an image's canvas.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..model.channels import image_channels
from ..model.image_geometry import canvas_size, output_size, resize
from ..model.number_checks import NOT_FINITE
from ..model.result_defaults import MAX_INSTANCES
from .export_files import AGAIN, CONFIG, PROCESSOR, REPORT, Sides, read_config, read_json, read_processor
from .rules import Rules, rules_of
from .runtimes import OPENVINO_MODEL, RUNTIMES, OnnxGraph, runtime_of
from .segmentation import Segmentation, instance_result, panoptic_result, semantic_result

MODEL = "model.onnx"
LOGITS = ("class_queries_logits", "masks_queries_logits")  # optimum's names


def is_exported(folder) -> bool:
    return isinstance(folder, str | os.PathLike) and (Path(folder) / REPORT).is_file()


class ExportedModel:
    """What `mask2former-hf export` has written.

    Args:
        folder: the export's.
        device: "cpu", or "cuda" with onnxruntime-gpu; None for the CPU.
        threads: of the runtime; None for its own choice.
        runtime: "onnxruntime" or "openvino"; None for what the folder is for (`runtimes.runtime_of`).

    Raises:
        ImportError: without the runtime, with the line that installs it.
        ValueError: for files that are damaged or do not belong together, and devices that are not there.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        device: str | None = None,
        threads: int | None = None,
        runtime: str | None = None,
    ):
        self.folder, self.device, self.threads = Path(folder), device, threads
        self.runtime = runtime or runtime_of(self.folder, device)
        self.report = read_json(self.folder / REPORT)
        self.config = read_config(self.folder / CONFIG)
        self.task = self.report.get("task")  # whose results are in the graph; None for logits alone
        name = MODEL if self.runtime == OnnxGraph.name else OPENVINO_MODEL
        self.graph, self._result_graphs = self._open(name), {}
        inputs, outputs = self.graph.inputs, self.graph.outputs
        if "pixel_values" not in inputs or not {*LOGITS} <= {*outputs}:
            raise ValueError(f"{self.folder / name}: is no graph from pixel_values to {' and '.join(LOGITS)}")
        self._check_classes(name, outputs)
        self.channels, self.sides = inputs["pixel_values"][1], inputs["pixel_values"][2:]
        self.processor = ArrayProcessor(read_processor(self.folder / PROCESSOR, self.channels))
        self._check_processor()

    def _check_classes(self, name: str, shapes: Mapping):
        found, expected = shapes.get(LOGITS[0], [None])[-1], self.config.num_labels
        if found != expected + 1:
            raise ValueError(
                f"{self.folder / CONFIG}: has {expected} classes, but {name} was made for {found and found - 1}; "
                f"{AGAIN}"
            )

    def _check_processor(self):
        processor, where = self.processor, self.folder / PROCESSOR
        pad = None if processor.pad_size is None else [processor.pad_size.height, processor.pad_size.width]
        if all(isinstance(side, int) for side in self.sides):
            if pad != self.sides:
                shown = "{}x{}".format(*self.sides)
                raise ValueError(f"{where}: pad_size={pad}, but the graph takes {shown} alone; {AGAIN}")
        elif (processor.size_divisor or 1) % 32:
            raise ValueError(
                f"{where}: size_divisor={processor.size_divisor}, but the graph takes multiples of 32; set it to 32"
            )
        elif pad is not None and any(side % 32 for side in pad):
            raise ValueError(f"{where}: pad_size={pad}, but the graph takes multiples of 32; set it to such")
        made = image_channels(processor) or 3
        if made != self.channels:
            raise ValueError(f"{where}: makes images of {made} channels, but the graph takes {self.channels}")

    def _open(self, name: str):
        return RUNTIMES[self.runtime](self.folder / name, self.device, self.threads)

    def logits(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        """Class logits (B, Q, K + 1) and mask logits (B, Q, H / 4, W / 4) of (B, c, H, W) float32 pixels."""
        shape = pixel_values.shape
        if len(shape) != 4 or not shape[0] or shape[1] != self.channels:  # of no image OpenVINO ends the process
            shown = "x".join(map(str, shape))
            raise ValueError(f"pixel_values of {shown}: must be (B, {self.channels}, H, W) with B > 0")
        feed = {"pixel_values": pixel_values}
        if self.task is not None:  # the smallest result: nobody asks for it
            feed |= _result_inputs(self.graph, (1, 1), (1, 1), rules_of(self.config, self.task))
        logits = self.graph.run(LOGITS, feed)
        _check_finite(*logits)
        return logits

    def results(self, pixels: np.ndarray, image_size, target_size, rules: Rules) -> dict[str, np.ndarray]:
        """The result of an image, by the names of the graph's outputs.

        Args:
            pixels: (1, c, H, W) float32.
            image_size: (rows, columns) of the image in there.
            target_size: (rows, columns) of the result.
        """
        if self.task is None:
            return self._results_of(self.logits(pixels), image_size, target_size, rules)
        return _results(self.graph, {"pixel_values": pixels}, image_size, target_size, rules)

    def _results_of(self, logits: list[np.ndarray], image_size, target_size, rules: Rules) -> dict[str, np.ndarray]:
        feed = dict(zip(LOGITS, logits, strict=True))
        return _results(self._result_graph(rules.task), feed, image_size, target_size, rules)

    def _result_graph(self, task: str):
        if task not in self._result_graphs:
            name = f"{task}.onnx"
            graph = self._open(name)
            self._check_classes(name, graph.inputs)
            self._result_graphs[task] = graph
        return self._result_graphs[task]

    def check(self, rules: Rules):
        """Refuse rules that the graph cannot follow, and a graph of results that cannot be read."""
        if self.task is not None and rules.task != self.task:
            raise ValueError(
                f"task={rules.task!r}: the graph gives {self.task} results alone; export again with --task "
                f"{rules.task}, or without --task for all"
            )
        if rules.top_k != MAX_INSTANCES and rules.task == "instance":
            raise ValueError(
                f"top_k={rules.top_k}: an exported graph looks at {MAX_INSTANCES}; leave it out, or use the checkpoint"
            )
        if rules.task == "instance" and rules.overlap_threshold:
            raise ValueError(
                f"overlap_threshold={rules.overlap_threshold}: exported graphs drop no instance by its overlap; leave "
                "it out, or use the checkpoint"
            )
        if self.task is None:
            self._result_graph(rules.task)

    def check_batch(self, batch_size: int):
        """Refuse to take several images at a time with a graph that gives the result of one."""
        if self.task is not None and batch_size > 1:
            raise ValueError(
                f"batch_size={batch_size}: the graph gives {self.task} results of one image at a time; leave it out, "
                "or export without --task"
            )

    def segment(self, images: list[np.ndarray], rules: Rules) -> list[Segmentation]:
        """The results of (H, W, 3) uint8 RGB images, or of (H, W, C) bands; those of the same canvas go through the
        network together."""
        self.check(rules)
        self.check_batch(len(images))
        prepared = [self.processor(image) for image in images]
        targets = [image.shape[:2] for image in images]
        if self.task is not None:
            rows = zip(prepared, targets, strict=True)
            return [self.segmentation(self.results(*own, target, rules), rules) for own, target in rows]
        results, canvases = {}, {}
        for number, (pixels, _) in enumerate(prepared):
            canvases.setdefault(pixels.shape, []).append(number)
        for numbers in canvases.values():
            logits = self.logits(np.concatenate([prepared[number][0] for number in numbers]))
            for row, number in enumerate(numbers):
                own = [values[row : row + 1] for values in logits]
                found = self._results_of(own, prepared[number][1], targets[number], rules)
                results[number] = self.segmentation(found, rules)
        return [results[number] for number in range(len(images))]

    @staticmethod
    def segmentation(found: Mapping[str, np.ndarray], rules: Rules) -> Segmentation:
        """Of what `results` gives."""
        named = rules.id2label, rules.stuff_label_ids
        if rules.task == "semantic":
            return semantic_result(found["segmentation"], *named)
        if rules.task == "panoptic":
            columns = (found[f"segment_{name}"].tolist() for name in ("labels", "scores", "areas"))
            rows = enumerate(zip(*columns, strict=True), start=1)
            segments = [{"id": n, "label_id": label, "score": score, "area": area} for n, (label, score, area) in rows]
            return panoptic_result(found["segmentation"], segments, *named)
        return instance_result(found["masks"], found["scores"].tolist(), found["labels"].tolist(), *named)


def input_numbers(rules: Rules) -> dict[str, np.ndarray]:
    """The graph's inputs that have a default."""
    stuff = np.zeros(len(rules.id2label), dtype=bool)
    stuff[list(rules.stuff_label_ids)] = True
    return {
        "stuff": stuff,
        "threshold": np.array(rules.threshold, dtype=np.float32),
        "mask_threshold": np.array(rules.mask_threshold, dtype=np.float32),
        "overlap_threshold": np.array(rules.overlap_threshold),  # float64: shares of whole numbers are compared
    }


class ArrayProcessor:
    """What `Mask2FormerImageProcessor` does to one image, in NumPy and Pillow: the same pixels to 1e-6.

    Args:
        fields: of `preprocessor_config.json`, complete.
    """

    def __init__(self, fields: Mapping):
        self.fields = dict(fields)
        self.label_ids_to_fuse = fields.get("label_ids_to_fuse")
        self.size_divisor = fields.get("size_divisor")
        self.size, self.pad_size = (
            None if fields.get(name) is None else Sides(fields[name]) for name in ("size", "pad_size")
        )
        self.num_channels, self.image_mean, self.image_std = map(
            fields.get, ("num_channels", "image_mean", "image_std")
        )

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """(1, c, H, W) float32 of an (h, w, c) image, zero beyond it; and its (rows, columns) in there."""
        fields = self.fields
        if fields["do_resize"]:
            image = resize(image, output_size(*image.shape[:2], self.size), fields["resample"])
        size, c = image.shape[:2], image.shape[2]
        factor = fields["rescale_factor"] if fields["do_rescale"] else 1.0
        mean, std = (fields["image_mean"], fields["image_std"]) if fields["do_normalize"] else (0.0, 1.0)
        scale = np.broadcast_to(factor / np.asarray(std), c).astype(np.float32)
        shift = np.broadcast_to(-np.divide(mean, std), c).astype(np.float32)
        pixels = np.zeros((1, c, *canvas_size([size], self.size_divisor, self.pad_size)), dtype=np.float32)
        pixels[0, :, : size[0], : size[1]] = (image * scale + shift).transpose(2, 0, 1)
        return pixels, size


def _results(graph, feed: Mapping, image_size, target_size, rules: Rules) -> dict[str, np.ndarray]:
    feed = {**feed, **_result_inputs(graph, image_size, target_size, rules)}
    found = dict(zip(graph.outputs, graph.run(graph.outputs, feed), strict=True))
    if {*LOGITS} <= {*found}:  # of a graph from pixels to results
        _check_finite(*(found.pop(name) for name in LOGITS))
    return found


def _result_inputs(graph, image_size, target_size, rules: Rules) -> dict[str, np.ndarray]:
    """What a graph of results takes besides pixels or logits."""
    values = {"image_size": np.array(image_size), "target_size": np.array(target_size), **input_numbers(rules)}
    return {name: value for name, value in values.items() if name in graph.inputs}


def _check_finite(class_logits: np.ndarray, mask_logits: np.ndarray):
    """`model.argument_checks.check_logits` without torch."""
    if class_logits.size and not np.isfinite(class_logits.max(-1)).all():
        raise ValueError(f"class_logits {NOT_FINITE}")
    if mask_logits.size and not np.isfinite([mask_logits.min(), mask_logits.max()]).all():
        raise ValueError(f"mask_logits {NOT_FINITE}")
