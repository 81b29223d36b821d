"""Tiny models of every family of backbones, and a photo, for tests of exports."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from helpers import BACKBONES, randomise, tiny_fields, tiny_model
from PIL import Image
from tiny_backbones import backbone_config

import mask2former_hf
from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

SMALL = {"encoder_layers": 1, "decoder_layers": 3, "num_queries": 12}


# Plain ViTs by their neck: patches of 16 fit every size, those of 14 none
PLAIN_VITS = {
    "dinov3 with pyramid": ("dinov3_vit", "pyramid"),
    "dinov3 with adapter": ("dinov3_vit", "adapter"),
    "dinov2 with pyramid": ("dinov2", "pyramid"),
}
FAMILIES = ("resnet", "swin", "swin-absolute", "convnext", *PLAIN_VITS)


def family_model(family):
    """A tiny model of a family of backbones; Swin's windows of 4 fit no map of 96 x 160 pixels."""
    if family in PLAIN_VITS:
        name, neck = PLAIN_VITS[family]
        config = Mask2FormerConfig(backbone_config=backbone_config(name), vit_neck=neck, **tiny_fields(**SMALL))
        return randomise(Mask2FormerForUniversalSegmentation(config)).eval()
    if family != "swin-absolute":
        return tiny_model(family, **SMALL)
    backbone = BACKBONES["swin"]()
    backbone.use_absolute_embeddings, backbone.image_size = True, 64
    config = Mask2FormerConfig(backbone_config=backbone, **tiny_fields(**SMALL))
    return randomise(Mask2FormerForUniversalSegmentation(config)).eval()


def photo(size=(60, 90), seed=0):
    """Broad patches, so that different queries win in different places."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


WITHOUT_TORCH = """
class Blocked:
    names = {"torch", "transformers", "scipy", "huggingface_hub", "safetensors", "onnx", "yaml", "tqdm"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocked())
"""


def run_without_torch(code, *arguments):
    """A process in which torch and its friends cannot be imported; the code may change `Blocked.names`."""
    source = str(Path(mask2former_hf.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {source!r})\n{WITHOUT_TORCH}{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
