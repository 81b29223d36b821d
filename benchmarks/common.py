"""What every benchmark needs: models with equal weights, interleaved timing, and a line about the machine."""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import transformers
from transformers import ResNetConfig, SwinConfig

import mask2former_hf

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "r50": lambda: ResNetConfig(out_features=STAGES),
    "swin-t": lambda: SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0.3, out_features=STAGES),
}


def machine() -> str:
    """One line: processor, threads and versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, mask2former_hf {mask2former_hf.__version__}"
    )


def equal_models(backbone: str, num_labels: int = 133, freeze_batch_norm: bool = False, **fields):
    """Stock's model and ours, same random weights; `freeze_batch_norm` is for ours, stock has no such field."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.Mask2FormerConfig(backbone_config=BACKBONES[backbone](), num_labels=num_labels, **fields)
    stock = transformers.Mask2FormerForUniversalSegmentation(config)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        ours = mask2former_hf.Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, freeze_batch_norm=freeze_batch_norm
        )
    return stock, ours


def interleaved_medians(runs: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each callable, run in turn so that a change of the machine's speed hits all alike."""
    seconds = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
