"""Tiny checkpoints that find objects in videos, and video files."""

from helpers import randomise, tiny_config

from mask2former_hf import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerImageProcessor,
    Mask2FormerVideoProcessor,
)
from mask2former_hf.inference.video_files import VideoWriter

KINDS = {
    "clips": (Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor),
    "images": (Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor),
}
SIZE = {"shortest_edge": 48, "longest_edge": 96}


def save_checkpoints(folder):
    """A checkpoint of each kind in a folder of its name."""
    for name, (model_class, processor_class) in KINDS.items():
        model = randomise(model_class(tiny_config("resnet", task="instance", decoder_layers=2)))
        model.class_predictor.weight.data *= 6
        model.save_pretrained(folder / name)
        processor_class(size=SIZE).save_pretrained(folder / name)
    return folder


def write_video(path, frames, rate=5):
    with VideoWriter(path, rate) as writer:
        for frame in frames:
            writer.add(frame)
    return path
