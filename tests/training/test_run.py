"""A training run from Python: its settings, what it refuses, and that the command line only builds settings."""

import json
from dataclasses import fields

import pytest

import mask2former_hf
from mask2former_hf import Mask2FormerForUniversalSegmentation, TrainingRun, TrainingSettings
from mask2former_hf.cli.main import main
from mask2former_hf.data.scenes import Scenes, ScenesDataset
from mask2former_hf.training.backbones import new_model, queries_for


def scenes(output, **changes):
    """Settings of two steps on a few scenes."""
    given = {"data": "scenes", "train_limit": 6, "val_limit": 3, "backbone": "tiny", "crop": 64, "steps": 2}
    given |= {"batch_size": 2, "eval_every": 1, "cpu": True, "output": output}
    return TrainingSettings(**given | changes)


def test_a_run_from_python_leaves_what_the_command_leaves(tmp_path):
    figures = TrainingRun(scenes(tmp_path / "python")).train()
    flags = [
        "--data",
        "scenes",
        "--train-limit",
        6,
        "--val-limit",
        3,
        "--backbone",
        "tiny",
        "--crop",
        64,
        "--steps",
        2,
    ]
    flags += ["--batch-size", 2, "--eval-every", 1, "--cpu", "--output", tmp_path / "command"]
    assert main(["train", *map(str, flags)]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("python", "command")]
    for result in results:
        result["settings"].pop("output")
        result["metrics"] = {k: v for k, v in result["metrics"].items() if "second" not in k and "runtime" not in k}
    assert results[0] == results[1] and figures["pq"] == results[0]["metrics"]["pq"]
    Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "python")


def test_a_run_takes_readers_and_a_recipe_from_python(tmp_path):
    """A recipe's batch is that of a step, and its milestones move with the number of steps."""
    settings = scenes(tmp_path, recipe="coco-panoptic-r50", data=None, batch_size=None, steps=100, accumulate=4)
    run = TrainingRun(settings, train_data=Scenes("val"), val_data=Scenes("val"), show=False)
    assert run.settings.batch_size == 4 and run.settings.queries == 100
    assert run.trainer.args.milestones == [89, 96]  # 327778 and 355092 of 368750
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"output": None}, "output= is missing"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"anneal_masks": [0.5]}, "anneal_masks=0.5: must be two shares of the run's steps"),
        ({"anneal_masks": [0.8, 0.2]}, "anneal_masks=0.8 0.2: must be two shares"),
        ({"anneal_masks": [0, 1], "decoder_type": "standard"}, "the model has decoder_type='standard'"),
        ({"task": "depth"}, "task=depth: must be one of"),
        ({"augmentation": "flip"}, "augmentation=flip: must be one of lsj"),
        ({"data": "coco"}, "data=coco: no such kind; choose one of coco-panoptic"),
        ({"data": "label-maps"}, "data=label-maps needs train_images=, train_maps="),
        ({"train_limit": 0}, "train_limit=0: must be at least 1"),
        ({"backbone": None, "model": "no/such"}, "model=no/such: no checkpoint found"),
        ({"queries": 1}, "give queries="),
        ({"steps": 10**20}, "steps=100000000000000000000: must be at most 1000000000"),
        ({"steps": None, "epochs": 1e30}, "epochs=1e.30: must be above 0 and at most 1000000000"),
        ({"batch_size": 10**8}, "batch_size=100000000: must be at most 65536"),
        ({"accumulate": 10**9}, "accumulate=1000000000: must be at most 65536"),
        ({"num_workers": 10**6}, "num_workers=1000000: must be at most 1024"),
        ({"eval_every": 10**20}, "eval_every=10+: must be at most"),
        ({"log_every": 10**20}, "log_every=10+: must be at most"),
        ({"learning_rate": float("inf")}, "learning_rate=inf: must be finite"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: must be a number"),
        ({"classes": 5}, "classes=5: must be of type str or Path or Sequence or Mapping or ClassTable or None"),
        ({"steps": "many"}, "steps='many': must be of type int or None"),
        ({"steps": True}, "steps=True: must be of type int or None"),
        ({"cpu": 1}, "cpu=1: must be of type bool"),
        ({"metrics": "pq"}, r"metrics='pq': must be of type list\[str\] or None"),
        ({"test_size": [1.5]}, r"test_size=\[1.5\]: must be of type list\[int\] or None"),
    ],
)
def test_a_setting_that_does_not_work_is_an_error_that_names_it(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TrainingRun(scenes(**{"output": tmp_path / "run"} | changes), show=False)
    assert not (tmp_path / "run").exists()


class Crowded(ScenesDataset):
    """Scenes with more things than the tiny model has queries."""

    def __init__(self, things=70):
        super().__init__(4, size=96, num_things=(things, things))


def test_a_new_model_has_queries_for_the_fullest_image(tmp_path):
    crowded, few = {"train_data": Crowded(), "val_data": Scenes("val"), "show": False}, Crowded(3)
    run = TrainingRun(scenes(tmp_path / "run", data=None, val_limit=None, steps=1), **crowded)
    most = max(len(crowded["train_data"][index].segments) for index in range(4))
    assert most > 20 and run.model.config.num_queries == queries_for(most)
    assert (
        run.queries_reason == f"a tenth more than the {most} segments of the fullest image to train on, instead of 20"
    )
    usual = TrainingRun(scenes(tmp_path / "few", data=None), **crowded | {"train_data": few})
    assert usual.model.config.num_queries == 20 and usual.queries_reason.startswith("as usual; the fullest image")
    given = TrainingRun(scenes(tmp_path / "given", data=None, queries=most), **crowded)
    assert given.model.config.num_queries == most and given.queries_reason == "as given"
    with pytest.raises(
        ValueError, match=f"queries={most - 1}: an image .* {most} segments.*queries={queries_for(most)}"
    ):
        TrainingRun(scenes(tmp_path / "too_few", data=None, queries=most - 1), **crowded)


def test_a_checkpoint_keeps_its_queries_and_is_refused_where_they_are_too_few(tmp_path):
    new_model("tiny", Scenes.classes, "panoptic").save_pretrained(tmp_path / "start")
    start = {"backbone": None, "model": str(tmp_path / "start"), "data": None}
    run = TrainingRun(scenes(tmp_path / "run", **start), Scenes("val"), Scenes("val"), show=False)
    assert run.model.config.num_queries == 20 and run.queries_reason == "the checkpoint's own"
    with pytest.raises(ValueError, match="start has 20 queries: .*, which keeps those of the checkpoint and adds new"):
        TrainingRun(scenes(tmp_path / "run", **start), Crowded(), Scenes("val"), show=False)


@pytest.mark.parametrize("segments, queries", [(0, 0), (9, 10), (10, 20), (100, 110), (258, 290)])
def test_queries_are_a_tenth_more_than_segments_in_tens(segments, queries):
    assert queries_for(segments) == queries


def test_every_setting_is_documented_and_public():
    text = mask2former_hf.TrainingSettings.__doc__
    assert all(f"        {entry.name}: {entry.metadata['help']}" in text for entry in fields(TrainingSettings))
