"""Training of models of clips: batches, a start from images, and what is learnt."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from PIL import Image

from mask2former_hf import (
    ClipDataset,
    ClipRecipe,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoProcessor,
    MovingScenes,
)
from mask2former_hf.cli.main import main
from mask2former_hf.data.clips import NO_LABEL, Clip
from mask2former_hf.model.run_lengths import mask_to_rle
from mask2former_hf.training.clips import ClipCollator, train_clips, video_model
from mask2former_hf.training.optimization import FROM_RANDOM

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


def test_training_repeats_itself_and_the_loss_falls():
    def trained(steps):
        torch.manual_seed(0)
        model, losses = Mask2FormerForVideoSegmentation(tiny_config("resnet", num_labels=3)), []
        data = ClipDataset(MovingScenes(6, 4, size=48), ClipRecipe(short_sides=[48]))
        done = train_clips(
            model,
            data,
            PROCESSOR,
            steps=steps,
            batch_size=2,
            on_step=lambda n, loss: losses.append(loss),
            **FROM_RANDOM,
        )
        assert done == steps and not any(p.isnan().any() for p in model.parameters())
        return losses

    losses = trained(12)
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert trained(2)[0] == pytest.approx(losses[0])


def test_more_clips_than_videos_are_refused():
    data = ClipDataset(MovingScenes(2, 4, size=48), ClipRecipe(short_sides=[48]))
    with pytest.raises(ValueError, match="no larger than the 2 videos"):
        train_clips(Mask2FormerForVideoSegmentation(tiny_config("resnet")), data, PROCESSOR, steps=1, batch_size=3)


def test_the_command_trains_on_youtube_vis_and_measures(tmp_path, capsys):
    videos = MovingScenes(3, 4, size=48)
    annotations = write_youtube_vis(videos, tmp_path)
    data = [f"--{split}-{name}={path}" for split in ("train", "val") for name, path in annotations.items()]
    common = ["train", "--data", "youtube-vis", "--cpu", "--steps", "2", "--batch-size", "2", "--short-sides", "48"]
    assert main([*common, *data, "--backbone", "tiny", "--output", str(tmp_path / "first")]) == 0
    assert "switches" in capsys.readouterr().out
    figures = json.loads((tmp_path / "first" / "results.json").read_text())
    assert figures["steps"] == 2 and 0 <= figures["AP"] <= 1
    again = ["--model", str(tmp_path / "first"), "--output", str(tmp_path / "second")]
    assert main([*common, *data[:2], *again, "--recipe", "ytvis-2019-r50"]) == 0
    model = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path / "second")
    assert list(model.config.id2label.values()) == ["disc", "box", "triangle"] and model.config.task == "instance"
    assert Mask2FormerVideoProcessor.from_pretrained(tmp_path / "second").size["shortest_edge"] == 360, "the recipe's"
    for flags, message in (
        (["--crop", "64", *again], "--crop 64: is for images"),
        (["--recipe", "coco-instance-r50", *again], "those for videos begin with ytvis-"),
        (["--output", "x"], "give one of --model and --backbone"),
    ):
        assert main([*common, *data, *flags]) == 2
        assert message in capsys.readouterr().err


def write_youtube_vis(videos, folder):
    """A folder of frames and a json; as flags' ends."""
    content = {
        "videos": [],
        "annotations": [],
        "categories": [{"id": n + 1, "name": name} for n, name in videos.classes.id2label.items()],
    }
    for video in videos:
        (folder / "frames" / str(video.id)).mkdir(parents=True)
        names = [f"{video.id}/{frame}.png" for frame in range(video.length)]
        for frame, name in enumerate(names):
            Image.fromarray(video.frame(frame)).save(folder / "frames" / name)
        height, width = video.size
        content["videos"].append({"id": video.id, "file_names": names, "height": height, "width": width})
        for thing in video.objects:
            masks = [None if mask is None else mask_to_rle(mask) for mask in thing.segmentations]
            entry = {"video_id": video.id, "category_id": thing.label + 1, "segmentations": masks}
            content["annotations"].append(entry | {"id": len(content["annotations"])})
    (folder / "instances.json").write_text(json.dumps(content))
    return {"images": folder / "frames", "annotations": folder / "instances.json"}
