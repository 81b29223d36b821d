"""The doctor names what went wrong in a run, and is silent about one that went well."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import tiny_model

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.findings import ERROR, WARNING
from mask2former_hf.training.doctor import examine_run

STEPS = 20
FALLING = [40 * 0.95**step for step in range(STEPS)]
SETTINGS = {"learning_rate": 1e-4, "backbone_multiplier": 0.1, "crop": 256, "data": "coco-panoptic"}


def write(folder, losses=FALLING, metrics=(0.1, 0.2, 0.3, 0.35), rates=None, start="trained", done=True, **settings):
    """What a run leaves, in the form of `training.run_log`."""
    lines = [f"learning rate 0.1, gradients clipped at 0.01 (as the backbone starts from {start} weights)"]
    for step, loss in enumerate(losses):
        figure = f"loss {loss:.6g}, " if np.isfinite(loss) else ""
        lines.append(f"step {step}: {figure}grad_norm 2.5, learning_rate {rates or 1e-4}, epoch 0.1")
    every = STEPS // len(metrics)
    lines += [f"step {k * every}: eval_pq {pq}, eval_runtime 1.5, epoch 0.1" for k, pq in enumerate(metrics, 1)]
    (folder / "log.txt").write_text("".join(f"2026-01-01 10:00:00  {line}\n" for line in lines))
    if done:
        results = {"steps": STEPS, "metrics": {"pq": metrics[-1]}, "settings": SETTINGS | settings}
        (folder / "results.json").write_text(json.dumps(results))
    else:
        (folder / "settings.json").write_text(json.dumps(SETTINGS | settings))
    return folder


SICK = {
    "nan": (dict(losses=[*FALLING[:10], *[float("nan")] * 10]), ERROR, "loss is nan.*10 of 20", "learning-rate"),
    "flat": (dict(losses=[30.0] * STEPS), WARNING, "does not fall: 30 in the first", "first_batch"),
    "diverging": (dict(losses=[*FALLING[:10], *[45.0] * 10]), WARNING, "loss rises again", "smaller --learning"),
    "metric 0": (dict(metrics=[0.0] * 4), WARNING, "pq was 0 in all 4", "first_batch"),
    "metric flat": (dict(metrics=[0.2, 0.2001, 0.2]), WARNING, "pq stays at 0.200", "freeze-backbone"),
    "learnt by heart": (dict(metrics=[0.2, 0.4, 0.3, 0.2]), WARNING, "was 0.400 and ended at 0.200", "fewer"),
    "random backbone": (dict(start="random"), WARNING, "random weights with a learning rate of 0.0001", "1 --clip 1"),
    "frozen and random": (dict(start="random", freeze_backbone="all"), ERROR, "frozen and random", "trained --back"),
    "fast backbone": (
        dict(learning_rate=1e-2, backbone_multiplier=1.0),
        WARNING,
        "trained backbone has a learning rate of 0.01",
        "multiplier 0.1",
    ),
    "rate 0": (dict(rates="0"), ERROR, "learning rate was 0", "warmup"),
    "other size": (dict(test_size=[800]), WARNING, "about 256 pixels and is measured at 800", "--test-size 256"),
    "unfinished": (dict(done=False), WARNING, "ends at step 19 without results", "--resume"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_found_and_the_repair_is_named(tmp_path, name):
    options, severity, what, repair = SICK[name]
    (found,) = examine_run(write(tmp_path, **options))
    assert found.severity == severity
    assert re.search(f"(?s){what}.*{repair}", f"{found.what}\n{found.repair}"), found


def test_a_run_that_went_well_is_passed_in_silence(tmp_path):
    assert examine_run(write(tmp_path)) == []


def test_a_run_of_trainer_alone_is_read_from_the_state_of_its_last_checkpoint(tmp_path):
    for number, loss in ((9, 20.0), (10, 30.0)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        rows = [{"step": k, "loss": loss, "learning_rate": 1e-4} for k in range(STEPS)]
        (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert "30 in the first third" in examine_run(tmp_path)[0].what


def test_a_model_that_learnt_to_say_no_object_is_found_on_the_images_to_measure_on(tmp_path):
    model = tiny_model("resnet", decoder_layers=1, task="panoptic", stuff_label_ids=[])
    with torch.no_grad():
        model.class_predictor.bias[-1] = 100
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size=64).save_pretrained(tmp_path)
    (found,) = examine_run(write(tmp_path, data="scenes", crop=64))
    assert found.severity == ERROR and "no object" in found.what and "4 images" in found.what


def test_a_folder_without_a_run_is_an_error(tmp_path):
    (found,) = examine_run(tmp_path)
    assert found.severity == ERROR and "no run wrote there" in found.what
