"""README's picture: a generated scene, its panoptic result, and the same as instances.

`python docs/site/first_screen.py demo_output` after `make demo`. The results lie on the scene without its colours: all
colour there is the model's answer.
"""

import argparse
from pathlib import Path

from PIL import Image

from mask2former_hf import ScenesDataset, Segmenter
from mask2former_hf.inference.drawing import draw_tracks, side_by_side

SCENE = 89  # one in which the model of 2026-11-26 misses nothing, as in few others
SIZE = 384  # the model sees 128 pixels a side


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scene", type=int, default=SCENE)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "first_screen.png")
    arguments = parser.parse_args()
    scenes = ScenesDataset(arguments.scene + 1, size=SIZE, seed=77, num_things=(4, 6), noise=3)
    image = Image.fromarray(scenes[arguments.scene].image)
    grey = image.convert("L")
    panoptic = Segmenter(arguments.checkpoint)(image)
    instances = Segmenter(arguments.checkpoint, task="instance")(image, threshold=0.8)
    sheet = side_by_side(
        [image, panoptic.plot(grey), draw_tracks(grey, instances)], ["image", "panoptic", "instances"]
    )
    sheet.quantize(255, dither=Image.Dither.NONE).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
