"""Pictures: every segment is drawn in its class' colour, at every size."""

import numpy as np
import pytest
from PIL import Image

from mask2former_hf.data.scenes import ID2LABEL, ScenesDataset
from mask2former_hf.data.windows import ImageWindows
from mask2former_hf.inference import segmentation
from mask2former_hf.inference.drawing import (
    class_colour,
    draw_instances,
    draw_panoptic,
    draw_semantic,
    side_by_side,
)


def test_colours_of_classes_are_stable_and_distinct():
    colours = [class_colour(label) for label in range(133)]
    assert colours == [class_colour(label) for label in range(133)] and len(set(colours)) == 133
    near = [np.abs(np.subtract(colours[i], colours[i + 1])).max() for i in range(132)]
    assert min(near) > 40


@pytest.mark.parametrize("size", [(64, 64), (48, 200), (480, 640), (1200, 900)])
def test_segments_are_tinted_and_void_is_not(size):
    image = np.full((*size, 3), 128, dtype=np.uint8)
    ids = np.zeros(size, dtype=np.int32)
    ids[: size[0] // 2] = 1
    drawn = draw_panoptic(image, ids, [{"id": 1, "label_id": 0, "score": 0.9}], {0: ""})
    scale = drawn.height // size[0]
    assert drawn.size == (size[1] * scale, size[0] * scale) and max(drawn.size) >= 384
    pixels = np.asarray(drawn).astype(int)
    tinted = pixels[drawn.height // 8, drawn.width // 8]
    expected = 128 * 0.45 + 0.55 * np.array(class_colour(0))
    assert np.abs(tinted - expected).max() <= 3
    void = pixels[drawn.height * 7 // 8]
    assert (void.max(1) - void.min(1)).max() <= 2  # grey


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_every_kind_of_image_is_drawn_in_rgb(mode):
    image = Image.new(mode, (100, 80))
    masks = np.zeros((2, 80, 100), dtype=bool)
    masks[0, 10:40, 10:60] = masks[1, 20:70, 30:90] = True
    drawn = draw_instances(image, masks, [0, 2], [0.9, 0.6], ID2LABEL)
    assert drawn.mode == "RGB" and len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 3


def test_the_best_instance_is_on_top():
    masks = np.ones((2, 400, 400), dtype=bool)
    pixels = np.asarray(draw_instances(np.zeros((400, 400, 3), np.uint8), masks, [0, 1], None, {0: "", 1: ""}))
    expected = 0.55 * np.array(class_colour(0)) + 0.45 * 0.55 * np.array(class_colour(1))
    assert np.abs(pixels[100, 100] - expected).max() <= 3


def test_names_are_written_on_plates_and_empty_names_are_not():
    image, masks = np.full((400, 400, 3), 205, np.uint8), np.ones((1, 400, 400), dtype=bool)
    nameless, named = (np.asarray(draw_instances(image, masks, [0], None, {0: name})) for name in ("", "disc"))
    assert len(np.unique(nameless.reshape(-1, 3), axis=0)) == 1  # the tint, up to the picture's edge
    assert (named != nameless).any()


def test_semantic_maps_and_titles():
    scene = ScenesDataset(1)[0]
    labels = np.zeros((128, 128), dtype=np.uint8)
    labels[:, 64:] = 255
    drawn = draw_semantic(scene.image, labels, ID2LABEL)
    sheet = side_by_side([drawn, drawn], ["image", "prediction"])
    assert sheet.width > 2 * drawn.width and sheet.height > drawn.height


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="mask is 10x10 but the image is 20x20.*target_sizes"):
        draw_panoptic(np.zeros((20, 20, 3), np.uint8), np.ones((10, 10), int), [{"id": 1, "label_id": 0}], ID2LABEL)
    with pytest.raises(ValueError, match="2 images and 1 titles"):
        side_by_side([Image.new("RGB", (9, 9))] * 2, ["a"])
    with pytest.raises(ValueError, match="image is float64"):
        draw_semantic(np.zeros((9, 9)), np.zeros((9, 9), int), ID2LABEL)


def test_a_large_result_is_drawn_smaller(monkeypatch):
    monkeypatch.setattr(segmentation, "LARGEST_PICTURE", 100)
    image = np.random.default_rng(0).integers(0, 255, (150, 290, 3), dtype=np.uint8)
    labels = np.zeros((150, 290), dtype=np.int32)
    labels[60:120, 100:200] = 1
    result = segmentation.semantic_result(labels, {0: "", 1: ""})
    picture = np.asarray(result.plot(image))
    assert (picture == np.asarray(result.plot(ImageWindows(image)))).all()
    expected = segmentation.semantic_result(labels[::3, ::3], {0: "", 1: ""}).plot(image[::3, ::3])
    assert (picture == np.asarray(expected)).all()
