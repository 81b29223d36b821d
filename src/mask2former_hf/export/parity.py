"""Is an exported graph the checkpoint? Logits and results of both on noise, at sizes that were not traced."""

import copy
import math

import numpy as np
import torch
from torch import nn

from ..inference.exported import LOGITS, ExportedModel
from ..inference.results import segment_logits
from ..inference.rules import Rules
from ..model.channels import model_channels
from .errors import ExportError
from .tracing import TRACED_SIZE

SIZES = ((1, *TRACED_SIZE), (2, 160, 128), (1, 224, 192))  # batch, height, width
TOLERANCES = {"float32": 1e-4, "float16": 5e-2}  # in units of the largest logit
DRAWS = 3  # of noise; see `compare_logits`
SAME_PIXELS = 0.999


def reference_of(model: nn.Module) -> nn.Module:
    """What an export has to equal: the model, or a copy if it is of another dtype than float32 or in training."""
    return copy.deepcopy(model).float().eval() if model.training or model.dtype != torch.float32 else model


def compare_logits(model: nn.Module, exported: ExportedModel, dtype: str, size: tuple[int, int] | None) -> list[dict]:
    """Largest differences to the checkpoint, in units of its largest logit: a row per input.

    One bit of an attention mask, at a logit of zero to within rounding, may fall the other way and move logits of
    random weights by 1e-3. That hits one image of noise; a graph that is wrong differs on every one.

    Args:
        size: the only one that the graph takes.

    Raises:
        ExportError: above the dtype's tolerance, saying where; int8 has none.
    """
    channels = model_channels(model.config)
    sizes = SIZES if size is None else ((1, *size), (2, *size))
    rows = []
    for B, H, W in sizes:
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            pixels = torch.randn(B, channels, H, W, generator=generator)
            row = {"input": [B, channels, H, W], **differences(model, exported, pixels)}
            worst = max(LOGITS, key=lambda name: row[name] if row[name] == row[name] else np.inf)
            if dtype not in TOLERANCES or row[worst] <= TOLERANCES[dtype]:
                break
        else:
            raise ExportError(
                f"{worst} of the graph differ from the checkpoint's by {row[worst]:.1e} of the largest, for "
                f"pixel_values of {B}x{channels}x{H}x{W}; {TOLERANCES[dtype]:.0e} is allowed for {dtype}. Nothing was "
                "written; please report it"
            )
        rows.append(row)
    return rows


@torch.inference_mode()
def differences(model: nn.Module, exported: ExportedModel, pixels: torch.Tensor) -> dict[str, float]:
    outputs = model(pixels.to(model.device), return_dict=True)
    pairs = zip(LOGITS, exported.logits(pixels.numpy()), strict=True)
    return {name: largest(logits, outputs[name].float().cpu().numpy()) for name, logits in pairs}


def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Difference, in units of the largest of `theirs`; infinite if shapes differ, as of a traced batch."""
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare_results(exported: ExportedModel, rules: Rules, size: tuple[int, int] | None):
    """The graph's result of an image against `model.postprocessing`'s from the graph's logits.

    Raises:
        ExportError: unless segments are the same, and pixels but for one in a thousand. Of semantic results, whose
            labels are those of the pixels, where two classes may be as probable, that is all.
    """
    height, width = size or TRACED_SIZE
    pixels = torch.randn(1, exported.channels, height, width, generator=torch.Generator().manual_seed(0)).numpy()
    image_size, target_size = (height - 9, width - 20), (61, 83)
    ours = exported.segmentation(exported.results(pixels, image_size, target_size, rules), rules)
    class_logits, mask_logits = (torch.from_numpy(x[0]) for x in exported.logits(pixels))
    theirs = segment_logits((class_logits, mask_logits, (height, width), image_size, target_size), rules)
    same = (ours.map == theirs.map).mean()
    labels = [[segment.label_id for segment in result.segments] for result in (ours, theirs)]
    if (rules.task != "semantic" and labels[0] != labels[1]) or same < SAME_PIXELS:
        raise ExportError(
            f"{rules.task} results of the graph have {len(labels[0])} segments, the checkpoint's {len(labels[1])}, "
            f"and {100 * same:.2f} % of the pixels are the same. Nothing was written; please report it"
        )
