"""What every benchmark needs: models with equal weights, interleaved timing, and a line about the machine."""

import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import ResNetConfig, SwinConfig

import mask2former_hf
from mask2former_hf.data.file_lock import FileLock, Locked

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "r50": lambda: ResNetConfig(out_features=STAGES),
    "swin-t": lambda: SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0.3, out_features=STAGES),
    "swin-l": lambda: SwinConfig(
        embed_dim=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        drop_path_rate=0.3,
        out_features=STAGES,
    ),
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


class Record:
    """Rows of figures in a JSON file, complete after every row: a benchmark that is stopped keeps what it has."""

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self.content = {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": []}

    def add(self, row: dict):
        self.content["rows"].append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)


def run_once(path: Path, run: Callable[[], object], is_done: Callable[[dict], bool] = bool) -> dict | None:
    """What a run has written to its file; it runs unless that is there, or another process is at it.

    So processes with the same list of runs and the same folder share the work, and one that was stopped goes on.

    Args:
        run: writes `path` (`mask2former_hf.data.json_files.write_json`).
        is_done: of what the file has; a run that writes several times is done after the last.

    Returns:
        What there is by now, which need not be all; None if there is nothing.
    """

    def written():
        return json.loads(path.read_text()) if path.is_file() else None

    if (content := written()) is not None and is_done(content):
        return content
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.take()
    except Locked:
        return content
    try:
        if (content := written()) is None or not is_done(content):  # another may have ended it meanwhile
            run()
        return written()
    finally:
        lock.release()


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


def interleaved_medians(
    runs: dict[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each callable, run in turn so that a change of the machine's speed hits all alike.

    Args:
        clock: `time.process_time` for a machine that is busy with other work, and one thread: others wait by spinning.
    """
    seconds = {name: [] for name in runs}
    for repeat in range(warmup + repeats):
        for name, run in runs.items():
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= warmup:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
