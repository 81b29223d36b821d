"""The doctor for checkpoints: tensors, labels, task, processor, and the range of 16-bit numbers."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..data.findings import ERROR, WARNING, Finding
from ..inference.known_labels import named_task, stuff_of, task_of
from ..inference.loading import PROCESSOR_FILES, LoadingError, load_processor, not_finite, read_model
from ..model.channels import image_channels, model_channels
from ..model.design_rules import classifies_pixels

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TRAINED_ON_IMAGENET = ("swin", "resnet", "convnext", "dinov2", "dinov3_vit")  # backbones; others vary
HALF = torch.finfo(torch.float16).max
CLOSE = HALF / 8  # images differ: a noise image that comes so near does not promise that none exceeds it
SIDE = 128  # of that image
_PLACEHOLDER = re.compile(r"LABEL_\d+|class[ _-]?\d+|\d+", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it was read: the model, transformers' report, and the processor or None."""

    name: str
    model: torch.nn.Module
    report: dict
    processor: object = None

    @property
    def config(self):
        return self.model.config


def examine_checkpoint(name: str) -> list[Finding]:
    """What is wrong or suspicious in a checkpoint, a folder or Hub id; nothing, if it is well.

    Returns:
        `Finding`s with `severity` ("error" or "warning"), `where`, `what`, `why` and `repair`, in words.
    """
    name, found = os.fspath(name), []
    try:
        model, report = read_model(name, ignore_mismatched_sizes=True)
    except LoadingError as error:
        return [Finding(ERROR, name, str(error), "nothing can be loaded", "give a complete checkpoint's folder or id")]
    processor = None
    try:
        if not os.path.isdir(name) or any(os.path.exists(os.path.join(name, file)) for file in PROCESSOR_FILES):
            processor = load_processor(name)
        else:
            found.append(
                Finding(
                    WARNING,
                    name,
                    f"there is no {PROCESSOR_FILES[0]}",
                    "size and normalisation of the training are unknown, and the defaults are taken",
                    "save the processor of the training beside the model",
                )
            )
    except LoadingError as error:
        found.append(Finding(ERROR, name, str(error), "images cannot be prepared", "save the processor anew"))
    checkpoint = Checkpoint(name, model.eval(), report, processor)
    return found + [finding for check in CHECKS for finding in check(checkpoint)]


def missing_tensors(checkpoint: Checkpoint) -> Iterator[Finding]:
    if missing := sorted(checkpoint.report["missing_keys"]):
        yield Finding(
            ERROR,
            checkpoint.name,
            f"{len(missing)} tensors of the model are missing, such as {missing[0]}",
            "with random ones in their place the results are worthless",
            "use a complete checkpoint; to fine-tune a backbone alone, give it as --backbone",
        )


def foreign_tensors(checkpoint: Checkpoint) -> Iterator[Finding]:
    if foreign := sorted(checkpoint.report["unexpected_keys"]):
        yield Finding(
            WARNING,
            checkpoint.name,
            f"{len(foreign)} tensors are none of the model's, such as {foreign[0]}",
            "they are not used: the config may be that of another design or depth",
            "compare config.json with the training's; `mask2former-hf convert` takes other implementations' files",
        )


def wrong_shapes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Those of the classifier tell how many labels the weights were trained for."""
    wrong = {name: tuple(stored) for name, stored, *_ in checkpoint.report["mismatched_keys"]}
    labels = next((shape for name, shape in wrong.items() if name.endswith("class_predictor.weight")), None)
    if labels is not None:
        yield Finding(
            ERROR,
            checkpoint.name,
            f"the classifier has {labels[0] - 1} labels and config.json {checkpoint.config.num_labels}",
            "they are no labels of these weights, and the checkpoint is not loaded",
            "put the training's id2label into config.json",
        )
    elif wrong:
        name, shape = next(iter(wrong.items()))
        yield Finding(
            ERROR,
            checkpoint.name,
            f"{len(wrong)} tensors have another shape than config.json says, such as {name} with {shape}",
            "the checkpoint is not loaded",
            "take the config.json that belongs to these weights",
        )


def nan(checkpoint: Checkpoint) -> Iterator[Finding]:
    known = {*checkpoint.report["missing_keys"], *(name for name, *_ in checkpoint.report["mismatched_keys"])}
    if broken := [name for name in not_finite(checkpoint.model) if name not in known]:
        yield Finding(
            ERROR,
            checkpoint.name,
            f"{len(broken)} tensors have values that are nan or infinite, such as {broken[0]}",
            "its training failed, or the file is damaged; every result is nan",
            "go back to an earlier checkpoint, with a smaller learning rate or without fp16",
        )


def names(checkpoint: Checkpoint) -> Iterator[Finding]:
    labels = [str(label) for label in checkpoint.config.id2label.values()]
    double = sorted({label for label in labels if labels.count(label) > 1})
    if len(labels) > 1 and all(_PLACEHOLDER.fullmatch(label) for label in labels):
        yield Finding(
            WARNING,
            checkpoint.name,
            f"its labels are {', '.join(labels[:3])}, which are no names",
            "classes of data are found by name, and readers of results know nothing",
            "put the names into id2label of config.json",
        )
    elif double:
        yield Finding(
            WARNING,
            checkpoint.name,
            f"{len(double)} names stand for several labels, such as {double[0]!r}",
            "classes of data are found by name",
            "give every label a name of its own in id2label",
        )


def task_and_stuff(checkpoint: Checkpoint) -> Iterator[Finding]:
    config = checkpoint.config
    if not classifies_pixels(config) and getattr(config, "task", None) is None and named_task(config) is None:
        yield Finding(
            WARNING,
            checkpoint.name,
            "neither config.json nor the name says the task",
            f"{task_of(config)} is guessed from the labels, which decides on the kind of results and the metrics",
            'put "task": "panoptic", "instance" or "semantic" into config.json',
        )
    stuff = stuff_of(config, checkpoint.processor)
    if stuff is None and task_of(config) == "panoptic":
        yield Finding(
            WARNING,
            checkpoint.name,
            "nothing says which labels are stuff",
            "pieces of sky or road are then objects of their own, which costs panoptic quality",
            'put "stuff_label_ids" into config.json: a list of labels, [] for none',
        )
    if stuff and not set(stuff) <= set(range(config.num_labels)):
        yield Finding(
            ERROR,
            checkpoint.name,
            f"stuff are the labels {stuff[:8]}, of {config.num_labels} labels",
            "they are the ids of another numbering, so that the wrong classes are merged",
            f"stuff_label_ids are indices, 0 to {config.num_labels - 1}",
        )
    fused = getattr(checkpoint.processor, "label_ids_to_fuse", None)
    own = getattr(config, "stuff_label_ids", None)
    if own is not None and fused is not None and set(own) != set(fused):
        yield Finding(
            WARNING,
            checkpoint.name,
            f"config.json says that the stuff is {sorted(own)[:8]}, the processor {sorted(fused)[:8]}",
            "results depend on who is asked: stock transformers' users pass the processor's",
            "make them equal",
        )


def stretching(checkpoint: Checkpoint) -> Iterator[Finding]:
    processor = checkpoint.processor
    size = dict(getattr(processor, "size", None) or {})
    if processor is not None and {"height", "width"} <= set(size):
        yield Finding(
            WARNING,
            checkpoint.name,
            f"the processor stretches every image to {size['height']} x {size['width']}",
            "the model was trained on images that keep their aspect; what is stretched is found worse",
            '"size": {"shortest_edge": 800, "longest_edge": 1333}, with the numbers of the training',
        )
    if processor is not None and not processor.do_resize:
        yield Finding(
            WARNING,
            checkpoint.name,
            "the processor does not resize images (do_resize is false)",
            "things then have another size than in training, and large images take much memory",
            "set do_resize to true and size to that of the training",
        )


def normalisation(checkpoint: Checkpoint) -> Iterator[Finding]:
    processor = checkpoint.processor
    if processor is None or image_channels(processor) is not None:  # bands have statistics of their own
        return
    mean, std, factor = processor.image_mean, processor.image_std, processor.rescale_factor
    reason, repair = "pixels are others than those that the model was trained on", "take the training's processor"
    bytes_scale = max(mean) > 1 if isinstance(mean, list | tuple) else mean > 1
    wrong_scale = processor.do_rescale and processor.do_normalize and bytes_scale != (factor == 1)
    if not processor.do_normalize or not processor.do_rescale and not bytes_scale:
        off = "do_normalize" if not processor.do_normalize else "do_rescale"
        yield Finding(ERROR, checkpoint.name, f"the processor has {off} false", reason, f"set {off} to true")
    elif wrong_scale:
        what = f"image_mean {list(mean)} is on another scale than rescale_factor {factor:g}"
        text = "with means up to 255 rescale_factor is 1, with means up to 1 it is 1/255"
        yield Finding(ERROR, checkpoint.name, what, reason, text)
    elif getattr(checkpoint.config.backbone_config, "model_type", None) in TRAINED_ON_IMAGENET and not _is_imagenet(
        mean, std, factor
    ):
        yield Finding(
            WARNING,
            checkpoint.name,
            f"the processor normalises with mean {list(mean)} and deviation {list(std)}, not with ImageNet's",
            f"unless it was trained so, {reason}",
            f"{repair}; ImageNet's are {list(IMAGENET[0])} and {list(IMAGENET[1])}",
        )


def _is_imagenet(mean, std, factor: float) -> bool:
    scale = 1 / (255 * factor)
    pairs = zip((*mean, *std), (*IMAGENET[0], *IMAGENET[1]), strict=False)
    return all(abs(value * scale - usual) < 0.01 for value, usual in pairs)


def divisor(checkpoint: Checkpoint) -> Iterator[Finding]:
    number = getattr(checkpoint.processor, "size_divisor", 32)
    if number is None or number % 32:
        yield Finding(
            WARNING,
            checkpoint.name,
            f"the processor pads to multiples of {number}",
            "the coarsest map has a stride of 32; other sizes than multiples of it are rounded on the way",
            "set size_divisor to 32",
        )


@torch.inference_mode()
def half_precision(checkpoint: Checkpoint) -> Iterator[Finding]:
    """The largest number on the way of a noise image."""
    if checkpoint.report["missing_keys"] or checkpoint.report["mismatched_keys"] or not_finite(checkpoint.model):
        return
    model, largest = checkpoint.model.float(), {}

    def note(name: str):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                largest[name] = output.abs().max().item()

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if not list(m.children())]
    noise = torch.randn(1, model_channels(model.config), SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    try:
        model(pixel_values=noise)
    finally:
        for hook in hooks:
            hook.remove()
    name = max(largest, key=largest.get)
    if not largest[name] < CLOSE:
        yield Finding(
            WARNING,
            checkpoint.name,
            f"numbers grow to {largest[name]:.3g} in {name}",
            f"float16 ends at {HALF:.0f}, beyond which results are infinite or nan",
            "use bfloat16 (--bf16) or float32, not float16",
        )


@torch.inference_mode()
def finds_nothing(model, processor, images) -> bool:
    """Whether every query of every image says "no object"."""
    for image in images:
        logits = model(**processor(image, return_tensors="pt")).class_queries_logits  # (1, Q, K + 1)
        if (logits.argmax(-1) != logits.shape[-1] - 1).any():
            return False
    return bool(len(images))


CHECKS: tuple[Callable[[Checkpoint], Iterator[Finding]], ...] = (
    missing_tensors,
    foreign_tensors,
    wrong_shapes,
    nan,
    names,
    task_and_stuff,
    stretching,
    normalisation,
    divisor,
    half_precision,
)
