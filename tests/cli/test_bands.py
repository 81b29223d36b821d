"""Five bands through every command: train, go on, evaluate, predict, verify, export, and the Segmenter."""

import json
import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from mask2former_hf import Mask2FormerImageProcessor, Segmenter, register, unregister
from mask2former_hf.cli.main import main
from mask2former_hf.data.bands import read_pixels
from mask2former_hf.data.example import Example
from mask2former_hf.data.folders import LabelMaps
from mask2former_hf.data.scenes import ScenesDataset
from mask2former_hf.evaluation.evaluator import evaluate
from mask2former_hf.inference.loading import load_model, load_processor
from mask2former_hf.inference.video_segmenter import VideoSegmenter
from mask2former_hf.training.backbones import new_model
from mask2former_hf.training.channels import bands_of_run
from mask2former_hf.training.collation import processor_for
from mask2former_hf.training.settings import TrainingSettings

SIDE, NAMES = 64, ["disc", "box", "triangle", "sky", "ground"]
SMALL = ["--crop", SIDE, "--steps", 2, "--batch-size", 2, "--eval-every", 2, "--cpu"]


def command(*arguments):
    return main([str(argument) for argument in arguments])


def write_data(folder, count, seed):
    """Scenes as maps of labels and images of five bands of 16 bits: arrays, and TIFFs of pages or of samples."""
    for name in ("images", "maps"):
        (folder / name).mkdir(parents=True)
    scenes = ScenesDataset(count, SIDE, seed)
    scenes.channels = 5
    for index in range(count):
        example = scenes[index]
        image = example.image.astype(np.uint16) * 40
        if index == 3 and find_spec("rasterio"):
            import rasterio

            size = {"height": SIDE, "width": SIDE, "count": 5, "dtype": np.uint16}
            with rasterio.open(folder / "images" / f"{index}.tif", "w", driver="GTiff", **size) as file:
                file.write(image.transpose(2, 0, 1))
        elif index % 2:
            first, *others = (Image.fromarray(np.ascontiguousarray(band)) for band in image.transpose(2, 0, 1))
            first.save(folder / "images" / f"{index}.tif", save_all=True, append_images=others)
        else:
            np.save(folder / "images" / f"{index}.npy", image)
        labels = np.zeros((SIDE, SIDE), np.uint8)
        for segment, mask in zip(example.segments, example.masks(), strict=True):
            labels[mask] = segment["category_id"]
        Image.fromarray(labels).save(folder / "maps" / f"{index}.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with data, and what two steps on it leave."""
    folder = tmp_path_factory.mktemp("bands")
    write_data(folder / "train", 4, 0)
    write_data(folder / "val", 4, 1)
    paths = [f"--{split}-{kind}={folder / split / kind}" for split in ("train", "val") for kind in ("images", "maps")]
    data = ["--data", "label-maps", *paths, "--classes", ",".join(NAMES)]
    first = ["--backbone", "tiny", "--channels", 5, "--show-bands", 5, 4, 3]
    assert command("train", *data, *first, *SMALL, "--output", folder / "run") == 0
    return folder, data


def test_the_processor_scales_by_type_and_normalises_by_what_the_training_images_have(run):
    folder, _ = run
    processor = Mask2FormerImageProcessor.from_pretrained(folder / "run")
    assert processor.num_channels == 5 and processor.rescale_factor == 1 / 65535
    images = [read_pixels(path, 5) for path in sorted((folder / "train" / "images").iterdir())]
    normalised = processor(images, return_tensors="pt", do_resize=False)["pixel_values"]
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(5), atol=1e-3, rtol=0)
    assert Image.open(folder / "run" / "first_batch.png").mode == "RGB"


def test_every_door_gives_one_result(run, capsys, tmp_path):
    pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
    folder, _ = run
    checkpoint, images = folder / "run", folder / "val" / "images"
    assert command("predict", images, "--model", checkpoint, "--output", tmp_path / "p", "--device", "cpu") == 0
    assert command("export", checkpoint, "--task", "semantic", "--output", tmp_path / "onnx") == 0
    assert command("verify", checkpoint, "--images", images, "--device", "cpu", "--repeats", 1) == 0
    segmenters = Segmenter(checkpoint, device="cpu"), Segmenter(tmp_path / "onnx")
    register()
    try:
        pipe = pipeline("image-segmentation", model=str(checkpoint), device="cpu")
        piped = pipe(str(images / "0.npy"))
    finally:
        unregister()
    for path in sorted(images.iterdir()):
        predicted = np.asarray(Image.open(tmp_path / "p" / "semantic" / f"{path.stem}.png"))
        pixels = read_pixels(path, 5)
        forms = [path, pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
        results = [segmenter(form) for segmenter in segmenters for form in forms]
        results += list(segmenters[0](forms, batch_size=3))
        for result in results:
            assert np.mean(result.map == predicted) > 0.999
        assert Image.open(tmp_path / "p" / "overlays" / f"{path.stem}.png").mode == "RGB"
    assert {entry["label"] for entry in piped} == {s.label for s in segmenters[0](images / "0.npy").segments}
    with pytest.raises(ValueError, match="takes images of 5 bands, and videos are RGB"):
        VideoSegmenter(checkpoint, device="cpu")
    with pytest.raises(ValueError, match="refine='crf': compares the colours of photos, and these .* 5 bands"):
        Segmenter(checkpoint, refine="crf")
    assert "5 bands" in (checkpoint / "README.md").read_text()


def test_the_command_and_python_measure_the_same_as_the_run(run, tmp_path):
    folder, _ = run
    given = ["--data", "label-maps", "--images", folder / "val" / "images", "--maps", folder / "val" / "maps"]
    given += ["--classes", ",".join(NAMES), "--model", folder / "run", "--device", "cpu"]
    assert command("evaluate", *given, "--json", tmp_path / "figures.json") == 0
    measured = json.loads((tmp_path / "figures.json").read_text())["miou"]["mIoU"]
    assert measured == pytest.approx(json.loads((folder / "run" / "results.json").read_text())["metrics"]["miou"])
    reader = LabelMaps(folder / "val" / "images", folder / "val" / "maps", dict(enumerate(NAMES)))
    model, processor = load_model(folder / "run"), load_processor(folder / "run")
    summary = evaluate(model, processor, reader, progress=False)  # which tells the reader to read bands
    assert summary["miou"]["mIoU"] == pytest.approx(measured)


def test_a_run_goes_on_with_the_normalisation_that_it_had(run, capsys):
    folder, data = run
    before = (folder / "run" / "preprocessor_config.json").read_text()
    go_on = ["--backbone", "tiny", "--channels", 5, "--resume", "--output", folder / "run"]
    assert command("train", *data, *SMALL, *go_on, "--steps", 3) == 0
    assert json.loads((folder / "run" / "results.json").read_text())["steps"] == 3
    assert (folder / "run" / "preprocessor_config.json").read_text() == before
    assert "images of 5 bands, times 1.526e-05, mean" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, factor", [(np.uint8, 1 / 255), (np.uint16, 1 / 65535), (np.float32, 1.0)])
def test_what_is_not_given_is_measured_on_the_images_or_the_checkpoint_s(run, dtype, factor):
    image = (np.random.default_rng(0).random((8, 9, 5)) * 200).astype(dtype)
    images = [Example(image, np.ones((8, 9), np.int32), [])]
    found = bands_of_run(TrainingSettings(image_std=[2.0] * 5), 5, images).fields
    assert found["rescale_factor"] == factor and found["image_std"] == [2.0] * 5
    assert np.allclose(found["image_mean"], factor * image.mean((0, 1), dtype=np.float64), rtol=1e-5)
    checkpoint = str(run[0] / "run")
    own = Mask2FormerImageProcessor.from_pretrained(checkpoint)
    found = bands_of_run(TrainingSettings(model=checkpoint, image_mean=[0.25]), 5, images).fields
    assert found["image_mean"] == 0.25 and list(found["image_std"]) == list(own.image_std)


@pytest.fixture(scope="module")
def photo_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    classes = ScenesDataset.classes
    new_model("tiny", classes, "panoptic").save_pretrained(folder)
    processor_for(classes, SIDE, 2 * SIDE).save_pretrained(folder)
    return folder


def test_a_checkpoint_of_photos_grows_by_inflate(photo_checkpoint, tmp_path):
    given = ["--data", "scenes", "--train-limit", 4, "--val-limit", 2, "--model", photo_checkpoint, *SMALL]
    grow = ["--channels", 5, "--inflate", "repeat", "--learning-rate", 0]
    assert command("train", *given, *grow, "--output", tmp_path / "run") == 0
    old, new = (
        load_model(x).state_dict()["model.pixel_level_module.encoder.embedder.embedder.convolution.weight"]
        for x in (photo_checkpoint, tmp_path / "run")
    )
    torch.testing.assert_close(new, old[:, [0, 1, 2, 0, 1]], rtol=1e-3, atol=1e-4)  # weight decay
    with pytest.raises(ValueError, match="the model takes images of 5 channels .* and its processor makes 3"):
        Segmenter.of(load_model(tmp_path / "run"), load_processor(photo_checkpoint))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--channels", 17], "--channels 17: must be at most 16"),
        (["--inflate", "zero"], "--inflate zero: needs --channels"),
        (
            ["--channels", 3, "--inflate", "mean"],
            "--inflate mean: is about bands beyond the 3 .* has none",
        ),
        (
            ["--channels", 5, "--inflate", "zero", "--freeze-backbone"],
            "is frozen .* give --inflate mean",
        ),
        (["--show-bands", 1], r"--show-bands \[1\]: is for images of bands"),
        (["--channels", 5, "--show-bands", 1, 2], "must be three bands, for red, green and blue, or one"),
        (["--channels", 5, "--image-mean", 1, 2], "--image-mean .* has 2 numbers, but .* 5 channels"),
        (["--channels", 5, "--teacher", "MODEL"], "--teacher .*takes images of 3 channels, and the model of 5"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, photo_checkpoint, tmp_path, capsys):
    flags = [photo_checkpoint if flag == "MODEL" else flag for flag in flags]
    given = ["--data", "scenes", "--train-limit", 2, "--val-limit", 1, "--model", photo_checkpoint, *SMALL]
    assert command("train", *given, *flags, "--output", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_an_image_of_other_bands_is_one_line(run, photo_checkpoint, tmp_path, capsys):
    folder, _ = run
    np.save(tmp_path / "four.npy", np.zeros((SIDE, SIDE, 4), np.uint16))
    given = [tmp_path / "four.npy", "--output", tmp_path / "p", "--device", "cpu"]
    assert command("predict", *given, "--model", folder / "run") == 2
    assert "four.npy: has 4 bands (uint16 of shape (64, 64, 4)), but 5 are wanted" in capsys.readouterr().err
    assert command("predict", *given, "--model", photo_checkpoint, "--show-bands", 1, "--overwrite") == 2
    assert "--show-bands 1: the checkpoint is for photos" in capsys.readouterr().err
