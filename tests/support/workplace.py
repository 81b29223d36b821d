"""What pages name: photos, annotated images, videos, checkpoints and backbones of the Hub, all small and made here."""

import json
from pathlib import Path

import numpy as np
from helpers import tiny_config
from PIL import Image
from tiny_backbones import backbone_config
from transformers import AutoBackbone
from youtube_vis import write_youtube_vis

from mask2former_hf import (
    ClassTable,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerVideoProcessor,
    MovingScenes,
    ScenesDataset,
)
from mask2former_hf.data.formats.convert import convert
from mask2former_hf.data.scenes import ID2LABEL, STUFF_LABEL_IDS
from mask2former_hf.inference.video_files import VideoWriter

PUBLISHED = {  # end of the id -> class set; nothing else tells what a published checkpoint is for
    "coco-panoptic": "coco-panoptic",
    "coco-instance": "coco-instance",
    "ade-semantic": "ade20k-semantic",
}
PUBLISHED_BACKBONES = {  # id -> short name, and one of its family
    "microsoft/resnet-50": ("r50", "resnet"),
    "microsoft/swin-tiny-patch4-window7-224": ("swin-t", "swin"),
    "facebook/dinov2-base": ("dinov2-b", "dinov2"),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": ("dinov3-b", "dinov3_vit"),
}
FORMATS = {
    "my_data": "coco-instances",
    "my_panoptic": "coco-panoptic",
    "my_maps": "label-maps",
    "my_colours": "colour-maps",
    **{f"my_{name}": name for name in ("labelme", "yolo", "geojson", "parquet")},
    "my_label_studio": "label-studio",
}
SIZE = {"shortest_edge": 64, "longest_edge": 128}
THINGS = dict(list(ID2LABEL.items())[: min(STUFF_LABEL_IDS)])


def make_workplace(folder: Path):
    """Everything, in a new folder."""
    scenes = ScenesDataset(4, size=64)
    make_checkpoints(folder)
    for place, name in FORMATS.items():
        convert(scenes, folder / place, name)
    save(folder / "photo.jpg", scenes[0].image)
    save(folder / "slide.tif", np.tile(scenes[0].image, (1, 18, 1)))  # longer than a tile of 1024
    for number, example in enumerate(scenes):
        save(folder / f"photos/{number}.jpg", example.image)
        things = np.isin(example.segmentation, [s["id"] for s in example.segments if s["isthing"]])
        for place, values in (("my_cells", example.segmentation * things), ("my_roads", ~things * 255)):
            save(folder / place / f"images/train/{number}.png", example.image)
            save(folder / place / f"maps/train/{number}.png", values)
    (folder / "my_roads/classes.json").write_text('{"0": "background", "255": "road"}')
    make_bands(folder)
    make_videos(folder)


def make_checkpoints(folder: Path):
    def save_model(place, ids, **fields):
        config = tiny_config("resnet", num_labels=len(ids), id2label=ids, decoder_layers=2, **fields)
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / place)
        Mask2FormerImageProcessor(size=SIZE).save_pretrained(folder / place)

    for end, classes in PUBLISHED.items():
        save_model(f"facebook/mask2former-swin-tiny-{end}", ClassTable.load(classes).id2label)
    save_model("CHECKPOINT", ID2LABEL, task="panoptic", stuff_label_ids=list(STUFF_LABEL_IDS))
    save_model("TEACHER", ID2LABEL, task="instance")
    clips = tiny_config("resnet", num_labels=len(THINGS), id2label=THINGS, decoder_layers=2, task="instance")
    Mask2FormerForVideoSegmentation(clips).save_pretrained(folder / "CLIP_CHECKPOINT")
    Mask2FormerVideoProcessor(size=SIZE).save_pretrained(folder / "CLIP_CHECKPOINT")
    for name, (_, family) in PUBLISHED_BACKBONES.items():
        AutoBackbone.from_config(backbone_config(family)).save_pretrained(folder / name)
        Mask2FormerImageProcessor(size=SIZE).save_pretrained(folder / name)


def make_bands(folder: Path):
    """Images of five bands: one alone, some in a folder, and some with maps of labels."""
    scenes = ScenesDataset(2, size=64)
    scenes.channels = 5
    for place in ("fields", "my_bands/images/train"):
        (folder / place).mkdir(parents=True)
    for number, example in enumerate(scenes):
        for place in ("fields", "my_bands/images/train"):
            np.save(folder / place / f"{number}.npy", example.image)
        labels = np.zeros(example.size)
        for segment, mask in zip(example.segments, example.masks(), strict=True):
            labels[mask] = segment["category_id"]
        save(folder / f"my_bands/labels/train/{number}.png", labels)
    np.save(folder / "field.npy", scenes[0].image)
    (folder / "my_bands/classes.json").write_text(json.dumps(ID2LABEL))


def make_videos(folder: Path):
    """A file, a folder of frames, and some videos in the form of YouTube-VIS."""
    videos = MovingScenes(2, 3, size=48)
    with VideoWriter(folder / "clip.mp4", 5) as writer:
        for number in range(3):
            writer.add(videos[0].frame(number))
            save(folder / f"frames/{number}.png", videos[0].frame(number))
    written = write_youtube_vis(videos, folder / "youtube_vis")
    written["images"].rename(folder / "JPEGImages")
    for name in ("train.json", "valid.json"):
        (folder / name).write_bytes(written["annotations"].read_bytes())


def save(path: Path, pixels: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
