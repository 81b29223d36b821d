"""Training of models of clips: batches, a start from images, and what is learnt."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from youtube_vis import write_youtube_vis

from mask2former_hf import (
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoProcessor,
    MovingScenes,
    TrainingSettings,
    loss_normalizers,
)
from mask2former_hf.cli.main import main
from mask2former_hf.data.clips import NO_LABEL, Clip
from mask2former_hf.training.checkpoints import last_complete_checkpoint
from mask2former_hf.training.clips import ClipCollator, video_model
from mask2former_hf.training.video_run import VideoRun

PROCESSOR = Mask2FormerVideoProcessor(size={"shortest_edge": 48, "longest_edge": 48})


def test_a_batch_has_clips_of_different_sizes_and_objects_without_a_label():
    clips = []
    for size, labels in (((40, 60), [2, NO_LABEL]), ((64, 32), [])):
        masks = np.zeros((len(labels), 3, *size), bool)
        masks[:, 1, :10] = True
        clips.append(
            Clip(np.full((3, *size, 3), 255, np.uint8), masks, np.array(labels, np.int64), (), 0, (0, 1, 2), {})
        )
    batch = ClipCollator(PROCESSOR, num_labels=5)(clips)
    assert batch["pixel_values_videos"].shape == (2, 3, 3, 64, 64)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 60, 64 * 32]
    assert [labels.tolist() for labels in batch["class_labels"]] == [[2, 5], []]
    assert batch["mask_labels"][0].shape == (2, 3, 40, 60) and batch["mask_labels"][0].sum((0, 2, 3)).tolist() == [
        0,
        1200,
        0,
    ]
    model = Mask2FormerForVideoSegmentation(tiny_config("resnet")).train()
    assert model(**batch).loss.isfinite()


def test_a_model_of_clips_starts_from_a_model_of_images():
    image = tiny_model("swin")
    clips = video_model(image)
    assert all(torch.equal(tensor, clips.state_dict()[name]) for name, tensor in image.state_dict().items())
    clips.class_predictor.weight.data.zero_()
    assert image.class_predictor.weight.any(), "a copy"


def run_settings(output, **changes):
    """Four steps on a few generated videos, a checkpoint after two."""
    given = {"data": "moving-scenes", "train_limit": 6, "val_limit": 1, "backbone": "tiny", "short_sides": [48]}
    given |= {"steps": 4, "eval_every": 2, "batch_size": 2, "cpu": True, "output": output, "log_every": 1}
    return TrainingSettings(**given | changes)


class PressCtrlC(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    VideoRun(run_settings(tmp_path / "whole")).train()
    run = VideoRun(run_settings(tmp_path / "parts"))
    run.trainer.add_callback(PressCtrlC())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert last_complete_checkpoint(tmp_path / "parts").endswith("checkpoint-2")
    figures = VideoRun(run_settings(tmp_path / "parts", resume=True)).train()
    last = "checkpoint-4/model.safetensors"  # the output has the best model
    whole, parts = (load_file(tmp_path / name / last) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert {"ap", "ap50", "switches", "found"} <= set(figures)
    logs = [row.split(",")[0] for row in (tmp_path / "parts" / "metrics.csv").read_text().split()[1:]]
    assert logs == ["4"], "an interrupted run saves without measuring, so that nothing is lost"


def test_the_loss_falls(tmp_path):
    run = VideoRun(run_settings(tmp_path, steps=14, eval_every=14, train_limit=4, backbone="tiny"))
    run.trainer.train()
    losses = [row["loss"] for row in run.trainer.state.log_history if "loss" in row]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_the_loss_of_a_step_is_normalised_over_its_micro_batches():
    """Clips of one and of three objects: gradients of parts add up to the gradient of the batch."""
    torch.manual_seed(0)
    model = Mask2FormerForVideoSegmentation(tiny_config("resnet", num_labels=3)).eval()
    model.criterion.draw_points = lambda purpose, clip, layers, shape, device, generator: torch.rand(
        shape, generator=torch.Generator().manual_seed(len(purpose))
    )
    pixels, labels = torch.randn(2, 2, 3, 64, 64), [torch.tensor([0]), torch.tensor([1, 2, 3])]
    masks = [(torch.rand(len(own), 2, 64, 64) > 0.5).byte() for own in labels]
    whole = model(pixels, mask_labels=masks, class_labels=labels).loss
    sums = loss_normalizers(labels, model.config.num_queries, model.criterion.class_weights())
    parts = [
        model(pixels[n : n + 1], mask_labels=masks[n : n + 1], class_labels=labels[n : n + 1], normalizers=sums).loss
        for n in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop": 64}, "crop=64: is for images"),
        ({"data": "scenes"}, "data=scenes: must be one of youtube-vis, davis, moving-scenes"),
        ({"steps": "many"}, "steps='many': must be of type int"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"queries": 3}, "queries=3: a video to train on has 5 objects, .* give queries=10"),
        ({"recipe": "coco-instance-r50"}, "trains on images; those for videos begin with ytvis-"),
        ({"backbone": None, "model": "no/such"}, "model=no/such: no checkpoint found"),
        ({"train_maps": "x"}, "data=moving-scenes does not take train_maps="),
        ({"batch_size": 60000, "short_sides": [30000]}, "clips of 2 frames of 30000 x 30000 pixels"),
    ],
)
def test_a_setting_that_does_not_work_is_an_error_that_names_it(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VideoRun(run_settings(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has a model, which would be overwritten"):
        VideoRun(run_settings(tmp_path))


def test_the_command_trains_on_youtube_vis_and_measures(tmp_path, capsys):
    videos = MovingScenes(3, 4, size=48)
    annotations = write_youtube_vis(videos, tmp_path)
    data = [f"--{split}-{name}={path}" for split in ("train", "val") for name, path in annotations.items()]
    common = ["train", "--data", "youtube-vis", "--cpu", "--steps", "2", "--batch-size", "2", "--short-sides", "48"]
    assert main([*common, *data, "--backbone", "tiny", "--output", str(tmp_path / "first")]) == 0
    shown = capsys.readouterr().out
    assert "3 videos to train on" in shown and "switches" in shown
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert results["steps"] == 2 and 0 <= results["metrics"]["ap"] <= 1
    assert {"first_batch.png", "metrics.csv", "log.txt", "README.md", "checkpoint-2"} <= {
        path.name for path in (tmp_path / "first").iterdir()
    }
    measured = ["evaluate", "--data", "youtube-vis", "--model", str(tmp_path / "first"), "--device", "cpu"]
    measured += [f"--{name}={path}" for name, path in annotations.items()] + ["--json", str(tmp_path / "figures.json")]
    assert main(measured) == 0 and "ap per class" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["AP"] == pytest.approx(results["metrics"]["ap"])
    again = ["--model", str(tmp_path / "first"), "--output", str(tmp_path / "second")]
    assert main([*common, *data[:2], *again, "--recipe", "ytvis-2019-r50", "--queries", "20"]) == 0
    assert "held out are 1 of 3 videos" in capsys.readouterr().out
    model = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path / "second")
    assert list(model.config.id2label.values()) == ["disc", "box", "triangle"] and model.config.task == "instance"
    assert Mask2FormerVideoProcessor.from_pretrained(tmp_path / "second").size["shortest_edge"] == 360, "the recipe's"


def test_frames_that_do_not_fit_are_listed_before_the_first_step(tmp_path):
    annotations = write_youtube_vis(MovingScenes(2, 3, size=48), tmp_path)
    given = {f"{split}_{name}": path for split in ("train", "val") for name, path in annotations.items()}
    given |= {"data": "youtube-vis", "train_limit": None}
    for number in (1, 2):
        Image.new("RGB", (48, 40)).save(tmp_path / "frames" / "1" / f"{number}.png")
    with pytest.raises(
        ValueError, match=r"^train: 1 of 2 videos .*\n- 2 of 3 files of video 1 .*\n.*1\.png.*\n.*2\.png"
    ):
        VideoRun(run_settings(tmp_path / "run", **given), show=False)
    VideoRun(run_settings(tmp_path / "run", **given, no_check=True))
