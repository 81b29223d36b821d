"""README's picture: a generated scene, its panoptic result, and the same as instances.

`python docs/site/first_screen.py demo_output` after `make demo`.
"""

import argparse
from pathlib import Path

from PIL import Image

from mask2former_hf import ScenesDataset, Segmenter
from mask2former_hf.inference.drawing import side_by_side

SCENE = 31  # one in which the model of 2026-11-26 misses nothing, as in few others


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    checkpoint = parser.parse_args().checkpoint
    image = ScenesDataset(SCENE + 1, size=128, seed=77, num_things=(4, 6), noise=3)[SCENE].image
    panoptic = Segmenter(checkpoint)(image).plot(image)
    instances = Segmenter(checkpoint, task="instance")(image, threshold=0.8).plot(image)
    plain = Image.fromarray(image).resize(panoptic.size, Image.Resampling.BICUBIC)
    sheet = side_by_side([plain, panoptic, instances], ["image", "panoptic", "instances"])
    sheet.quantize(255, dither=Image.Dither.NONE).save(Path(__file__).parents[1] / "first_screen.png", optimize=True)


if __name__ == "__main__":
    main()
