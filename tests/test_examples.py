"""The example scripts on real images for a few steps: what they promise about resuming, kills and processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import example_worker
import pytest
import torch
from helpers import SHARED
from processes import python, two_pythons
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

PANOPTIC, CAMVID = SHARED / "data" / "coco_panoptic", SHARED / "data" / "camvid"
WORKER = Path(example_worker.__file__)
pytestmark = pytest.mark.skipif(not PANOPTIC.is_dir(), reason="annotated images (../shared) not found")


def arguments(folder, *more):
    paths = []
    for split in ("train", "val"):  # five images, the last batch of two processes is uneven
        annotations = PANOPTIC / "annotations" / "panoptic_val_clean.json"
        paths += [f"--{split}-images", PANOPTIC / "val", f"--{split}-maps", PANOPTIC / "panoptic_val"]
        paths += [f"--{split}-annotations", annotations]
    fixed = ["--crop", 64, "--queries", 60, "--eval-every", 0, "--cpu", "--learning-rate", 1e-3, "--clip", 0.1]
    return [*paths, *fixed, "--output", folder, *more]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(ours, others, tolerance=0.0):
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(others[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_the_loop_resumes_after_a_kill_while_saving_and_ends_with_equal_weights(tmp_path):
    """Three micro-batches of an epoch of five images: the run stops in the middle of an epoch."""
    options = ["--steps", 6, "--batch-size", 1, "--accumulate", 2, "--save-every", 2, "--keep", 1]
    example_worker.run(arguments(tmp_path / "whole", *options))
    parts = tmp_path / "parts"
    killed = python(WORKER, "--kill-while-saving", 3, "--", *arguments(parts, *options))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert (parts / "checkpoints" / "incomplete" / "model.safetensors").read_bytes() == b"half of a file"
    assert [path.name for path in (parts / "checkpoints").glob("step-*")] == ["step-00000004"]
    load_file(parts / "checkpoints" / "step-00000004" / "model.safetensors")
    example_worker.run(arguments(parts, *options, "--resume"))
    assert_equal_weights(weights(tmp_path / "whole"), weights(parts))
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-00000006"]


def test_micro_batches_and_processes_of_the_loop_give_the_step_of_the_large_batch(tmp_path):
    one, micro, two = (tmp_path / name for name in ("one", "micro", "two"))
    measured = ["--eval-every", 3]
    example_worker.run(arguments(one, "--steps", 1, "--batch-size", 4, *measured), fix_points=True)
    example_worker.run(arguments(micro, "--steps", 1, "--batch-size", 2, "--accumulate", 2), fix_points=True)
    given = arguments(two, "--steps", 1, "--batch-size", 2, *measured)
    for done in two_pythons(WORKER, "--fixed-points", "--", *given):
        assert done.returncode == 0, done.stderr[-3000:]
    # AdamW's first step is the learning rate, 1e-3, in the direction of each gradient's sign, rounding included.
    for other in (micro, two):
        different = [(weights(one)[name] - tensor).abs() > 1e-4 for name, tensor in weights(other).items()]
        assert sum(int(d.sum()) for d in different) < 1e-3 * sum(d.numel() for d in different)
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert figures[0].keys() == figures[1].keys() and figures[0]["pq"] == pytest.approx(figures[1]["pq"], abs=0.02)


def test_the_loop_under_fsdp_saves_a_checkpoint_that_loads(tmp_path):
    config = Path(example_worker.EXAMPLES) / "fsdp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2, "--cpu"]
    command = [*launcher, WORKER, "--fixed-points", "--", *arguments(tmp_path, "--steps", 2, "--batch-size", 1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_trainer_example_learns_label_maps_and_its_checkpoint_predicts(tmp_path, capsys):
    example = example_worker.load("train_with_trainer")
    example.main(CAMVID, tmp_path, steps=2, crop=64, limit=6)
    assert "% of the first image" in capsys.readouterr().out
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert model.config.task == "semantic" and model.config.id2label[3] == "Road"
    Mask2FormerImageProcessor.from_pretrained(tmp_path)


def test_stock_trains_with_our_criterion_and_the_loss_falls():
    losses = example_worker.load("stock_with_our_criterion").main(steps=30)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
