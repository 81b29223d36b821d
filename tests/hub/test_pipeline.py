"""pipeline("image-segmentation") after register(): results are those of post_process_*, however it is called."""

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_model
from PIL import Image
from torch.utils.data import Dataset
from transformers import pipeline

from mask2former_hf import Mask2FormerConfig, Mask2FormerImageProcessor
from mask2former_hf.hub.registration import register, unregister
from mask2former_hf.inference.known_labels import stuff_of, task_of

STUFF = [3, 4]
SIZES = [(60, 90), (100, 70), (64, 64), (90, 60)]


@pytest.fixture(autouse=True)
def registered():
    register()
    yield
    unregister()


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


def sure_model(**fields):
    """A random network that is sure of a different class per query."""
    model = tiny_model("resnet", **fields)
    model.class_predictor.weight.data *= 6
    model.class_predictor.bias.data[-1] -= 6
    return model


@pytest.fixture(scope="module")
def model():
    return sure_model(task="panoptic", stuff_label_ids=STUFF, num_queries=30)


@pytest.fixture(scope="module")
def processor():
    return Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture
def pipe(model, processor):
    return pipeline("image-segmentation", model=model, image_processor=processor)


def outputs_of(model, processor, image):
    with torch.inference_mode():
        return model(**processor(image, return_tensors="pt"))


def same(result, expected):
    """Equal up to the rounding of scores, and of mask pixels on the threshold, that a batch brings."""
    assert [segment["label"] for segment in result] == [segment["label"] for segment in expected]
    for ours, theirs in zip(result, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["mask"].mode == "L" and ours["mask"].size == theirs["mask"].size
        assert (np.asarray(ours["mask"]) != np.asarray(theirs["mask"])).mean() < 1e-3


def test_panoptic_equals_post_processing_with_stuff_fused(pipe, model, processor, images):
    for image in images:
        expected = processor.post_process_panoptic_segmentation(
            outputs_of(model, processor, image), label_ids_to_fuse=set(STUFF), target_sizes=[image.size[::-1]]
        )[0]
        result = pipe(image)
        assert len(result) == len(expected["segments_info"])
        for segment, info in zip(result, expected["segments_info"], strict=True):
            assert segment["label"] == f"LABEL_{info['label_id']}" and segment["score"] == info["score"]
            mask = np.asarray(segment["mask"])
            assert set(np.unique(mask)) <= {0, 255}
            assert ((mask == 255) == (expected["segmentation"].numpy() == info["id"])).all()


def test_there_is_one_segment_per_stuff_class(pipe, images):
    found = [segment["label"] for segment in pipe(images[0], threshold=0.0, overlap_mask_area_threshold=0.0)]
    assert len(found) > len(set(found)), "the test needs several segments of a class"
    assert all(found.count(f"LABEL_{label}") <= 1 for label in STUFF)


def test_instances_overlap_and_are_never_stuff(pipe, model, processor, images):
    result = pipe(images[0], subtask="instance", threshold=0.0)
    covered = sum(np.asarray(segment["mask"], dtype=int) // 255 for segment in result)
    assert covered.max() > 1
    assert not {segment["label"] for segment in result} & {f"LABEL_{label}" for label in STUFF}
    scores = [segment["score"] for segment in result]
    assert scores == sorted(scores, reverse=True)
    raw = processor.post_process_instance_segmentation(
        outputs_of(model, processor, images[0]), threshold=0.0, target_sizes=[SIZES[0]]
    )[0]
    things = [n for n, label in enumerate(raw["labels"].tolist()) if label not in STUFF]
    assert scores == raw["scores"][things].tolist()
    masks = np.stack([np.asarray(segment["mask"]) == 255 for segment in result])
    assert (masks == raw["masks"][things].numpy()).all()


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_the_task_of_the_checkpoint_is_the_default(task, processor, images):
    pipe = pipeline("image-segmentation", model=sure_model(task=task), image_processor=processor)
    same(pipe(images[0]), pipe(images[0], subtask=task))
    if task == "semantic":
        labels = processor.post_process_semantic_segmentation(
            outputs_of(pipe.model, processor, images[0]), target_sizes=[SIZES[0]], resize_masks_first=False
        )[0].numpy()
        for segment in pipe(images[0]):
            label = int(segment["label"].removeprefix("LABEL_"))
            assert ((np.asarray(segment["mask"]) == 255) == (labels == label)).all() and segment["score"] is None


def test_thresholds_reach_the_post_processing(pipe, model, processor, images):
    options = {"threshold": 0.3, "mask_threshold": 0.7, "overlap_mask_area_threshold": 0.1}
    expected = processor.post_process_panoptic_segmentation(
        outputs_of(model, processor, images[1]), label_ids_to_fuse=set(STUFF), target_sizes=[SIZES[1]], **options
    )[0]["segments_info"]
    assert [segment["score"] for segment in pipe(images[1], **options)] == [info["score"] for info in expected]


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_batch_of_mixed_sizes_gives_what_single_images_give(pipe, images, subtask, batch_size):
    single = [pipe(image, subtask=subtask) for image in images]
    for ours, theirs in zip(pipe(images, subtask=subtask, batch_size=batch_size), single, strict=True):
        same(ours, theirs)


def test_a_batch_of_mixed_sizes_with_mask_features_at_stride_8(processor, images):
    model = sure_model(task="panoptic", common_stride=8)
    pipe = pipeline("image-segmentation", model=model, image_processor=processor)
    wide = [images[0].resize((200, 64)), images[2].resize((64, 64))]
    for ours, image in zip(pipe(wide, batch_size=2), wide, strict=True):
        same(ours, pipe(image))


def test_paths_generators_and_datasets(pipe, images, tmp_path):
    expected = [pipe(image) for image in images]
    paths = [tmp_path / f"{n}.png" for n in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)

    class Images(Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            return images[index]

    results = {
        "one path": [pipe(str(path)) for path in paths],
        "paths": pipe([str(path) for path in paths]),
        "pathlib": pipe(paths, batch_size=3),
        "generator": list(pipe(image for image in images)),
        "batched generator": list(pipe((image for image in images), batch_size=2)),
        "dataset": list(pipe(Images(), batch_size=3)),
        "workers": list(pipe(Images(), batch_size=2, num_workers=1)),
    }
    for name, result in results.items():
        assert len(result) == len(images), name
        for ours, theirs in zip(result, expected, strict=True):
            same(ours, theirs)


def test_sixteen_bit_images_and_rotated_photos(pipe, images, tmp_path):
    grey = np.asarray(images[0].convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    same(pipe(str(tmp_path / "16.png")), pipe(str(tmp_path / "8.png")))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    images[0].save(tmp_path / "turned.png", exif=exif)
    same(pipe(str(tmp_path / "turned.png")), pipe(images[0].transpose(Image.Transpose.ROTATE_270)))


def test_nothing_found_is_an_empty_list(pipe, images):
    assert pipe(images[0], threshold=1.0) == []


def test_an_unknown_subtask_is_named(pipe, images):
    with pytest.raises(ValueError, match="subtask='depth': must be one of semantic, instance, panoptic"):
        pipe(images[0], subtask="depth")


def test_a_stock_processor_is_replaced(model, images, processor, pipe):
    stock = transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    other = pipeline("image-segmentation", model=model, image_processor=stock)
    same(other(images[0]), pipe(images[0]))


@pytest.mark.parametrize(
    "name, task, num_stuff",
    [
        ("coco-panoptic", "panoptic", 53),
        ("coco-instance", "instance", 0),
        ("ade20k-semantic", "panoptic", 50),
        ("cityscapes-semantic", "panoptic", 11),
        ("cityscapes-instance", "instance", 0),
        ("mapillary-semantic", "panoptic", 28),
    ],
)
def test_published_label_sets_are_recognised(name, task, num_stuff):
    from mask2former_hf.data.classes import ClassTable

    table = ClassTable.load(name)
    config = Mask2FormerConfig(id2label=table.id2label)
    assert stuff_of(config) == table.stuff_label_ids and len(stuff_of(config)) == num_stuff
    assert task_of(config) == task


def test_spelling_of_published_names_does_not_matter():
    from mask2former_hf.data.classes import ClassTable

    names = {n: label.split(",")[0].title() + " " for n, label in ClassTable.load("ade20k-panoptic").id2label.items()}
    names[8] = "windowpane"
    assert len(stuff_of(Mask2FormerConfig(id2label=names))) == 50
    assert stuff_of(Mask2FormerConfig(num_labels=150)) is None


def test_published_repositories_name_their_task():
    config = Mask2FormerConfig(num_labels=19)
    assert task_of(config) == "panoptic"
    for task in ("semantic", "instance", "panoptic"):
        config._name_or_path = f"facebook/mask2former-swin-large-cityscapes-{task}"
        assert task_of(config) == task
    config.task = "instance"
    assert task_of(config) == "instance"
