"""Colours are those of OpenCV, and change nothing but the image."""

import colorsys

import numpy as np
import pytest
from helpers import generated_scene as scene

from mask2former_hf.data.augmentation import (
    SSDColour,
)
from mask2former_hf.data.colour import hsv_to_rgb, rgb_to_hsv, ssd_colour

# Constants computed with OpenCV 5.0 (cv2.cvtColor on a row of 32 pixels) and the original's steps
PIXELS = [
    [200, 30, 90],
    [12, 250, 7],
    [0, 0, 0],
    [128, 128, 128],
    [255] * 3,
    [3, 77, 201],
    [250, 249, 1],
    [90, 10, 140],
]
AS_HSV = [
    [169, 217, 200],
    [59, 248, 250],
    [0, 0, 0],
    [0, 0, 128],
    [0, 0, 255],
    [109, 251, 201],
    [30, 254, 250],
    [138, 237, 140],
]
ALL = {"brightness": 11.7, "contrast": 0.8, "saturation": 1.4, "hue": 9}
JITTERED = [
    (
        {"brightness": -20.5, "contrast": 1.3},
        [[232, 11, 89], [0, 255, 0], [0] * 3, [139] * 3, [255] * 3, [0, 72, 233], [255, 255, 0], [89, 0, 154]],
    ),
    (
        {"saturation": 0.6},
        [
            [200, 98, 135],
            [109, 250, 104],
            [0] * 3,
            [128] * 3,
            [255] * 3,
            [82, 126, 201],
            [250, 250, 100],
            [108, 62, 140],
        ],
    ),
    (
        {"hue": -17},
        [[200, 29, 188], [152, 250, 6], [0] * 3, [128] * 3, [255] * 3, [3, 187, 201], [250, 108, 0], [14, 9, 140]],
    ),
    (
        ALL | {"contrast_first": True},
        [[168, 0, 11], [0, 204, 54], [8] * 3, [111] * 3, [204] * 3, [0, 11, 169], [142, 204, 0], [112, 0, 120]],
    ),
    (
        ALL | {"contrast_first": False},
        [[168, 0, 11], [0, 204, 54], [8] * 3, [111] * 3, [204] * 3, [0, 11, 169], [142, 204, 0], [108, 0, 120]],
    ),
]


def test_hsv_is_that_of_opencv():
    assert rgb_to_hsv(np.array([PIXELS], np.uint8))[0].tolist() == AS_HSV


@pytest.mark.parametrize("steps, expected", JITTERED)
def test_colour_steps_give_the_values_of_opencv(steps, expected):
    assert ssd_colour(np.array([PIXELS], np.uint8), **steps)[0].tolist() == expected


def test_hsv_is_near_colorsys_everywhere():
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 3), dtype=np.uint8)
    exact = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels.astype(float)]) * (180, 255, 255)
    difference = abs(rgb_to_hsv(pixels) - exact)
    difference[:, 0] = np.minimum(difference[:, 0], 180 - difference[:, 0])
    assert difference.max() < 0.6
    hsv = np.stack([pixels[:, 0] % 180, pixels[:, 1], pixels[:, 2]], axis=1)
    exact = 255 * np.array([colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in hsv.astype(float)])
    back = exact - hsv_to_rgb(hsv)  # truncated
    assert back.min() > -0.01 and back.max() < 1.01


def test_colour_parameters_have_the_original_ranges_and_frequencies():
    rng = np.random.default_rng(0)
    drawn = [SSDColour().draw({}, rng) for _ in range(4000)]
    for name, low, high in (
        ("brightness", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 18),
    ):
        values = np.array([p[name] for p in drawn if p[name] is not None])
        assert 0.46 < len(values) / 4000 < 0.54
        margin = (high - low) / 100
        assert low <= values.min() < low + margin and high - margin < values.max() <= high
    assert 0.46 < np.mean([p["contrast_first"] for p in drawn]) < 0.54


def test_colour_leaves_the_map_and_its_areas_alone():
    example = scene()
    result = SSDColour.apply(example, ALL | {"contrast_first": True})
    assert result.segmentation is example.segmentation and result.segments == example.segments
    assert not np.array_equal(result.image, example.image)
