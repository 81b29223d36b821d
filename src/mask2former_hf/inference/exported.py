"""An exported checkpoint as a network and its results, in onnxruntime, NumPy and Pillow: no torch.

Letters: B batch, Q queries, K classes, (H, W) an image's canvas.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ..model.channels import image_channels
from ..model.image_geometry import canvas_size, output_size, resize
from ..model.result_defaults import MAX_INSTANCES
from .known_labels import task_of
from .rules import Rules
from .segmentation import Segmentation, instance_result, panoptic_result, semantic_result

REPORT = "export.json"  # by which an exported folder is known
PROCESSOR = "preprocessor_config.json"
MODEL = "model.onnx"
LOGITS = ("class_queries_logits", "masks_queries_logits")
SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
INSTALL = "pip install 'mask2former-hf[runtime]'"


def is_exported(folder) -> bool:
    return isinstance(folder, str | os.PathLike) and (Path(folder) / REPORT).is_file()


class ExportedModel:
    """What `mask2former-hf export` has written.

    Args:
        folder: the export's.
        device: "cpu", or "cuda" with onnxruntime-gpu; None for the CPU.
        threads: of onnxruntime; None for its own choice.

    Raises:
        ImportError: without onnxruntime, with the line that installs it.
        ValueError: for files that are damaged or do not belong together, and devices that are not there.
    """

    def __init__(self, folder: str | os.PathLike, device: str | None = None, threads: int | None = None):
        self.folder, self.threads = Path(folder), threads
        self.providers = _providers(device)
        self.report = _read(self.folder / REPORT)
        self.config = _config(_read(self.folder / "config.json"))
        self.processor = ArrayProcessor(_read(self.folder / PROCESSOR))
        self.task = self.report.get("task")  # whose results are in the graph; None for logits alone
        self.graph, self._result_graphs = self.session(MODEL), {}
        shape = next(i for i in self.graph.get_inputs() if i.name == "pixel_values").shape
        self.channels, self.sides = shape[1], shape[2:]
        self._check_processor()

    def _check_processor(self):
        processor, where = self.processor, self.folder / PROCESSOR
        if all(isinstance(side, int) for side in self.sides):
            pad = None if processor.pad_size is None else [processor.pad_size.height, processor.pad_size.width]
            if pad != self.sides:
                shown = "{}x{}".format(*self.sides)
                raise ValueError(
                    f"{where}: pad_size={pad}, but the graph takes {shown} alone; use the file of the export itself"
                )
        elif (processor.size_divisor or 1) % 32:
            raise ValueError(
                f"{where}: size_divisor={processor.size_divisor}, but the graph takes multiples of 32; set it to 32"
            )
        made = image_channels(processor) or 3
        if made != self.channels:
            raise ValueError(f"{where}: makes images of {made} channels, but the graph takes {self.channels}")

    def session(self, name: str):
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings are about the shapes of intermediate tensors
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        try:
            return runtime.InferenceSession(str(self.folder / name), options, providers=self.providers)
        except Exception as error:  # onnxruntime's classes have no common name
            raise ValueError(
                f"{self.folder / name}: onnxruntime cannot load it ({str(error).splitlines()[0]})"
            ) from error

    def logits(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        """Class logits (B, Q, K + 1) and mask logits (B, Q, H / 4, W / 4) of (B, c, H, W) float32 pixels."""
        if self.task is None:
            return self.graph.run(list(LOGITS), {"pixel_values": pixel_values})
        ones = np.ones(2, dtype=np.int64)  # the smallest result, which nobody asks for
        return self.graph.run(list(LOGITS), {"pixel_values": pixel_values, "image_size": ones, "target_size": ones})

    def results(self, pixels: np.ndarray, image_size, target_size, rules: Rules) -> dict[str, np.ndarray]:
        """The result of an image, by the names of the graph's outputs.

        Args:
            pixels: (1, c, H, W) float32.
            image_size: (rows, columns) of the image in there.
            target_size: (rows, columns) of the result.
        """
        task = rules.task
        feed = {"image_size": np.array(image_size), "target_size": np.array(target_size), **input_numbers(rules)}
        if self.task is None:
            if task not in self._result_graphs:
                self._result_graphs[task] = self.session(f"{task}.onnx")
            graph = self._result_graphs[task]
            feed |= dict(zip(LOGITS, self.graph.run(list(LOGITS), {"pixel_values": pixels}), strict=True))
        else:
            graph, feed = self.graph, {**feed, "pixel_values": pixels}
        names = [output.name for output in graph.get_outputs() if output.name not in LOGITS]
        known = {value.name for value in [*graph.get_inputs(), *graph.get_overridable_initializers()]}
        feed = {name: value for name, value in feed.items() if name in known}
        return dict(zip(names, graph.run(names, feed), strict=True))

    def check(self, rules: Rules):
        """Refuse rules that the graph cannot follow."""
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

    def segment(self, image: np.ndarray, rules: Rules) -> Segmentation:
        """The result of an (H, W, 3) uint8 RGB image, or of (H, W, C) bands."""
        self.check(rules)
        pixels, size = self.processor(image)
        return self.segmentation(self.results(pixels, size, image.shape[:2], rules), rules)

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
        self.size, self.pad_size = (_sides(fields.get(name)) for name in ("size", "pad_size"))
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


def _sides(size):
    return None if size is None else SimpleNamespace(**(dict.fromkeys(SIDES) | dict(size)))


def _config(fields: Mapping) -> SimpleNamespace:
    names = {int(label): name for label, name in fields["id2label"].items()}
    task, stuff = fields.get("task"), fields.get("stuff_label_ids")
    config = SimpleNamespace(task=task, stuff_label_ids=stuff, id2label=names, num_labels=len(names))
    config.task = task_of(config)
    return config


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; the exported folder is not complete") from error
    except ValueError as error:
        raise ValueError(f"{path}: not json ({error}); export the checkpoint again") from error


def _onnxruntime():
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"an exported folder needs onnxruntime: {INSTALL} ({error})") from error
    return onnxruntime


def _providers(device: str | None) -> list:
    kind = str(device or "cpu").split(":")[0]
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    available = _onnxruntime().get_available_providers()
    if name not in available:
        raise ValueError(f"device={str(device)!r}: onnxruntime has {', '.join(available)} here; use 'cpu'")
    if kind == "cpu":
        return [name]
    number = str(device).partition(":")[2] or "0"
    return [(name, {"device_id": int(number)}), "CPUExecutionProvider"]
