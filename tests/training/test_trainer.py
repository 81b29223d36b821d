"""Training with Trainer: normalisation, resume, best model, several processes, and a kill in the middle of saving."""

import functools
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import training_worker
from processes import python, two_pythons
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerForUniversalSegmentation
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate, headline
from mask2former_hf.training.checkpoints import last_complete_checkpoint
from mask2former_hf.training.trainer import Mask2FormerTrainingArguments

WORKER = Path(training_worker.__file__)
METRICS = ["pq", "ap", "miou"]  # of the worker


@pytest.fixture(autouse=True)
def nondeterministic_again():
    yield
    torch.use_deterministic_algorithms(False)


def run(folder, *flags):
    return training_worker.main([str(folder), *map(str, flags)])


def run_in_two_processes(folder, *flags):
    for done in two_pythons(WORKER, folder, *flags):
        assert done.returncode == 0, done.stderr[-3000:]


def assert_equal_weights(ours, others, tolerance=0.0):
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(others[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_accumulated_micro_batches_give_the_step_of_the_large_batch(tmp_path):
    large = run(tmp_path / "large", "--fixed-points", "--steps", 2, "--batch", 4)
    small = run(tmp_path / "small", "--fixed-points", "--steps", 2, "--batch", 1, "--accumulate", 4)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (large, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    norms = [[row["grad_norm"] for row in t.state.log_history if "loss" in row] for t in (large, small)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_terms_of_the_loss_are_logged_and_sum_to_it(tmp_path):
    history = run(tmp_path, "--steps", 3, "--batch", 2, "--accumulate", 2).state.log_history
    rows = [row for row in history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        terms = [row[name] for name in ("loss_cross_entropy", "loss_mask", "loss_dice")]
        assert sum(terms) == pytest.approx(row["loss"], rel=1e-3)


def test_training_in_mixed_precision_measures_a_checkpoint_as_evaluate_does(tmp_path):
    trainer = run(tmp_path, "--steps", 2, "--images", 4, "--backbone", "resnet", "--bf16", "--evaluate")
    assert trainer.accelerator.mixed_precision == "bf16" and hasattr(trainer.model, "_original_forward")
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-2")
    summaries = evaluate(model, trainer.processor, trainer.eval_dataset, METRICS, 2, threshold=0.1, progress=False)
    measured = json.loads((tmp_path / "metrics.json").read_text())
    figures = headline(summaries)
    assert figures["miou"] > 0
    assert figures == pytest.approx({name: measured[f"eval_{name}"] for name in figures}, abs=0, nan_ok=True)


@pytest.mark.parametrize("plain", [(), ("--plain",)], ids=["ours", "transformers"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tmp_path, plain):
    """With a Swin backbone, whose tensors have other names in files: stock's model keeps its old backbone."""
    whole = run(tmp_path / "whole", "--steps", 4, *plain)
    run(tmp_path / "parts", "--steps", 4, "--stop-at", 2, *plain)
    if plain:
        (tmp_path / "parts" / "checkpoint-2" / "complete").touch()
        trainer = training_worker.build(arguments_of(tmp_path / "parts", *plain))
        trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    else:
        trainer = run(tmp_path / "parts", "--steps", 4, "--resume")
    assert trainer.state.global_step == 4
    assert_equal_weights(whole.model.state_dict(), trainer.model.state_dict())


AUGMENTED = ("--augment", "--images", 6, "--steps", 8, "--save-steps", 1)  # three steps per epoch
WAYS = {
    "one process": ("--batch", 2),
    "workers": ("--batch", 2, "--workers", 2),
    "workers that stay": ("--batch", 2, "--workers", 1, "--persistent"),
    "accumulation": ("--batch", 1, "--accumulate", 2),
}


def take_up(whole, step, folder):
    """A folder as a run that was stopped after a step leaves it."""
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that augment and never stop, by their way; each is made once."""

    @functools.cache
    def made(way):
        folder = tmp_path_factory.mktemp("whole")
        run(folder, *AUGMENTED, *WAYS[way])
        return folder

    return made


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_augments_resumes_exactly_in_every_epoch_and_at_a_border(whole, tmp_path, way):
    assert json.loads((whole(way) / "epochs.json").read_text()) == [0, 0, 0, 1, 1, 1, 2, 2]
    for step in (2, 3, 5, 7):
        folder = take_up(whole(way), step, tmp_path / f"from-{step}")
        run(folder, *AUGMENTED, *WAYS[way], "--resume")
        weights = (load_file(place / "checkpoint-8" / "model.safetensors") for place in (whole(way), folder))
        assert_equal_weights(*weights)


def test_workers_see_the_epoch_that_the_process_itself_would(whole):
    models = [torch.load(whole(way) / "final.pt") for way in WAYS if way != "accumulation"]
    for model in models[1:]:
        assert_equal_weights(models[0], model)


def test_two_processes_see_new_pixels_in_every_epoch_and_resume_exactly(tmp_path):
    way = (*AUGMENTED, "--batch", 1)
    run_in_two_processes(tmp_path / "whole", *way)
    assert json.loads((tmp_path / "whole" / "epochs.json").read_text()) == [0, 0, 0, 1, 1, 1, 2, 2]
    folder = take_up(tmp_path / "whole", 5, tmp_path / "parts")
    run_in_two_processes(folder, *way, "--resume")
    weights = (load_file(place / "checkpoint-8" / "model.safetensors") for place in (tmp_path / "whole", folder))
    assert_equal_weights(*weights)


@pytest.mark.parametrize("way", [(), ("--workers", 1), ("--workers", 1, "--persistent")], ids=str)
def test_a_stream_of_the_hub_is_shuffled_anew_in_every_pass(tmp_path, way):
    datasets = pytest.importorskip("datasets", reason="datasets is an extra")
    rows = datasets.Dataset.from_dict({"number": list(range(6))}).to_iterable_dataset().shuffle(seed=0, buffer_size=6)
    seen = []

    class Stream(torch.utils.data.IterableDataset):
        """As `HubStream`, with scenes for pictures."""

        def __iter__(self):
            for row in rows:
                yield replace(ScenesDataset(6, size=64)[row["number"]], image_id=row["number"])

        def set_epoch(self, epoch):
            rows.set_epoch(epoch)

    trainer = training_worker.build(arguments_of(tmp_path, way=way))
    collate = trainer.data_collator
    trainer.train_dataset = Stream()
    trainer.data_collator = lambda examples: collate(examples) | {"numbers": [e.image_id for e in examples]}
    compute_loss = trainer.compute_loss

    def record(model, inputs, **kwargs):
        seen.extend(inputs.pop("numbers"))
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = record
    trainer.train()
    passes = [seen[start : start + 6] for start in (0, 6)]
    expected = []
    for epoch in range(2):
        rows.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(Stream(), batch_size=None, num_workers=int("--workers" in way))
        expected.append([example.image_id for example in loader])
    assert passes == expected and expected[0] != expected[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that was measured, and its trainer."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder, "--evaluate", "--steps", 4)


def test_resuming_a_finished_run_trains_nothing_and_gives_its_best_model(finished):
    folder, trainer = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")}
    again = run(folder, "--evaluate", "--steps", 4, "--resume")
    assert again.state.global_step == 4
    assert {path: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*/*")} == before
    assert_equal_weights(trainer.model.state_dict(), again.model.state_dict())


def test_metrics_of_ones_own_under_the_trainer_of_transformers(tmp_path):
    """As in its instance segmentation example: predictions and labels come as tuples, batch by batch."""
    seen, metrics = [], []

    def compute_metrics(evaluation, compute_result):
        class_logits, mask_logits = evaluation.predictions[:2]
        mask_labels, class_labels = evaluation.label_ids
        output = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
        sizes = [tuple(masks.shape[-2:]) for masks in mask_labels]
        results = processor.post_process_instance_segmentation(
            output, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
        for result, size in zip(results, sizes, strict=True):
            assert result["segmentation"].shape == (len(result["segments_info"]), *size)
        assert [len(masks) for masks in mask_labels] == [len(labels) for labels in class_labels]
        seen.append((class_logits, mask_logits, class_labels))
        metrics.append(compute_result)
        return {"images": sum(len(logits) for logits, _, _ in seen)}

    trainer = training_worker.build(arguments_of(tmp_path, "--plain"))
    data = trainer.train_dataset
    processor = trainer.data_collator.processor
    trainer.args.batch_eval_metrics, trainer.args.eval_do_concat_batches = True, False
    trainer.compute_metrics = compute_metrics
    figures = trainer.evaluate(torch.utils.data.Subset(data, range(4)))  # of a smaller last batch it cuts the labels
    assert figures["eval_images"] == 4
    assert metrics == [False, True]
    index = 0
    for class_logits, mask_logits, class_labels in seen:
        batch = trainer.data_collator([data[index + i] for i in range(len(class_logits))])
        with torch.no_grad():
            expected = trainer.model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
        torch.testing.assert_close(class_logits, expected.class_queries_logits)
        torch.testing.assert_close(mask_logits, expected.masks_queries_logits)
        for labels, truth in zip(class_labels, batch["class_labels"], strict=True):
            assert labels.tolist() == truth.tolist()
        index += len(class_logits)


def arguments_of(folder, *flags, way=()):
    from types import SimpleNamespace

    return SimpleNamespace(
        output=str(folder), backbone="swin", steps=4, batch=4, accumulate=1, save_steps=2, limit=None,
        fixed_points=False, resume=False, plain="--plain" in flags, evaluate=False, images=24, augment=False,
        workers=int("--workers" in way), persistent="--persistent" in way, bf16=False,
    )  # fmt: skip


def test_the_best_checkpoint_is_loaded_at_the_end_with_its_backbone(finished):
    _, trainer = finished
    best = trainer.state.best_model_checkpoint
    scores = {row["step"]: row["eval_pq"] for row in trainer.state.log_history if "eval_pq" in row}
    assert best.endswith(f"checkpoint-{max(scores, key=scores.get)}")
    expected = Mask2FormerForUniversalSegmentation.from_pretrained(best)
    assert_equal_weights(expected.state_dict(), trainer.model.state_dict())


def test_two_processes_train_and_measure_like_one(tmp_path):
    """Same global batch; five images to evaluate, three on one process and two on the other."""
    flags = ("--fixed-points", "--steps", "2", "--evaluate", "--backbone", "convnext")
    run(tmp_path / "one", *flags, "--batch", 4)
    run_in_two_processes(tmp_path / "two", *flags, "--batch", 2)
    one, two = (torch.load(tmp_path / name / "final.pt") for name in ("one", "two"))
    assert_equal_weights(one, two, tolerance=2e-3)  # AdamW's first steps turn rounding of tiny gradients into steps
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two")]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    for name in ("eval_pq", "eval_ap", "eval_miou"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=2e-2), name


def test_a_run_killed_while_saving_resumes_from_the_last_complete_checkpoint(tmp_path):
    result = python(WORKER, tmp_path, "--steps", 6, "--kill-while-saving", 4, "--limit", 1)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()  # half of a checkpoint is there
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    trainer = run(tmp_path, "--steps", 6, "--resume", "--limit", 1)
    assert trainer.state.global_step == 6
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert not (tmp_path / "checkpoint-2").exists()


def test_resuming_without_a_complete_checkpoint_says_so(tmp_path):
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        run(tmp_path, "--resume")


def test_schedule_and_milestones_must_fit(tmp_path):
    with pytest.raises(ValueError, match="schedule='cosine': must be one of poly, multistep, trainer"):
        Mask2FormerTrainingArguments(str(tmp_path), schedule="cosine")
    with pytest.raises(ValueError, match="'multistep' takes the steps"):
        Mask2FormerTrainingArguments(str(tmp_path), schedule="multistep")
