"""Test-time augmentation: the original's recorded class scores, and behaviour that any average must have."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import GOLDEN, GoldenCase, needs_golden, relative_difference, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.image_processing_utils import BatchFeature

from mask2former_hf import Mask2FormerConfig, Mask2FormerImageProcessor
from mask2former_hf.inference.tta import augmented_outputs, augmented_semantic_scores, augmented_sizes
from mask2former_hf.model.postprocessing import semantic_scores


@needs_golden
def test_golden_semantic_scores(tmp_path):
    """The original's SemanticSegmentorWithTTA: three sizes and mirror images, with absolute positions in Swin."""
    case = GoldenCase("swin_ade_semantic_prenorm")
    info = json.loads((GOLDEN / "tta_semantic" / "info.json").read_text())
    golden = load_file(GOLDEN / "tta_semantic" / "tensors.safetensors")
    processor = Mask2FormerImageProcessor(
        image_mean=[0.48500001, 0.45599998, 0.40600002], image_std=[0.229, 0.224, 0.225]
    )
    sizes = [{"shortest_edge": side, "longest_edge": info["max_size"]} for side in info["min_sizes"]]
    seen = []
    model = case.model(tmp_path)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_mask"].sum((1, 2)).tolist()), with_kwargs=True
    )
    scores = augmented_semantic_scores(
        model, processor, golden["image"].numpy(), tuple(info["output"]), sizes, resize_masks_first=False
    )
    assert [area for (area,) in seen] == [height * width for height, width in info["augmented_sizes"]]
    assert relative_difference(scores[:, ::8, ::8], golden["sem_seg_stride8"]) < 1e-4
    assert (scores.argmax(0) == golden["sem_argmax"]).float().mean() > 0.999


def test_sizes_are_the_test_size_times_the_factors():
    assert augmented_sizes({"shortest_edge": 800, "longest_edge": 1333}, (1.0, 0.5)) == [
        {"shortest_edge": 800, "longest_edge": 1333},
        {"shortest_edge": 400, "longest_edge": 666},
    ]
    processor = Mask2FormerImageProcessor(size={"height": 64, "width": 96})
    assert augmented_sizes(processor.size)[3] == {"height": 80, "width": 120}


@pytest.fixture(scope="module")
def small():
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    return tiny_model("resnet"), processor, image


def test_one_view_is_the_plain_result(small):
    model, processor, image = small
    sizes = [processor.size]
    with torch.no_grad():
        plain = model(**processor(image, return_tensors="pt"))
    outputs = augmented_outputs(model, processor, image, sizes, flip=False)
    torch.testing.assert_close(outputs.class_queries_logits.softmax(-1), plain.class_queries_logits.softmax(-1))
    torch.testing.assert_close(outputs.masks_queries_logits.sigmoid(), plain.masks_queries_logits.sigmoid())
    assert outputs.canvas_sizes.tolist() == plain.canvas_sizes.tolist()
    scores = augmented_semantic_scores(model, processor, image, (50, 70), sizes, flip=False)
    logits = (plain.class_queries_logits[0], plain.masks_queries_logits[0])
    canvas, size = plain.canvas_sizes[0].tolist(), plain.image_sizes[0].tolist()
    torch.testing.assert_close(scores, semantic_scores(*logits, canvas, size, (50, 70)))


def test_scores_of_a_mirrored_image_are_mirrored(small):
    model, processor, image = small
    sizes = augmented_sizes(processor.size, (1.0, 1.5))
    scores = augmented_semantic_scores(model, processor, image, (50, 70), sizes)
    mirrored = augmented_semantic_scores(model, processor, np.ascontiguousarray(image[:, ::-1]), (50, 70), sizes)
    torch.testing.assert_close(mirrored.flip(-1), scores, rtol=1e-3, atol=1e-4)


class BrightnessModel:
    """Finds bright and dark regions: query q's mask is where the image is above or below a level; sees no context.

    Queries change places from call to call, and `missing` ones see nothing, so that matching has work to do.
    """

    device = torch.device("cpu")
    config = Mask2FormerConfig()

    def __init__(self, shuffled=True):
        self.calls, self.shuffled, self.areas = 0, shuffled, []

    def __call__(self, pixel_values, pixel_mask):
        H, W = pixel_values.shape[-2:]
        grey = F.interpolate(pixel_values.mean(1, keepdim=True), size=(H // 4, W // 4), mode="area")[:, 0]
        masks = torch.stack([20 * grey, -20 * grey], 1)  # (1, 2, h, w): bright, dark
        classes = torch.tensor([[[5.0, 0, 0], [0, 4.0, 0]]])
        order = [1, 0] if self.shuffled and self.calls % 2 else [0, 1]
        self.calls += 1
        self.areas.append(int(pixel_mask.sum()))
        height, width = (int(pixel_mask[0].amax(axis).sum()) for axis in (1, 0))
        return SimpleNamespace(
            class_queries_logits=classes[:, order],
            masks_queries_logits=masks[:, order],
            image_sizes=torch.tensor([[height, width]]),
            canvas_sizes=torch.tensor([[H, W]]),
        )


@pytest.mark.parametrize("width", [96, 70])  # without and with padding beside the image
def test_queries_find_their_partners_in_views_of_other_size_and_direction(width):
    image = np.zeros((64, width, 3), dtype=np.uint8)
    image[8:40, 5:37] = 255  # not symmetric
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})
    single = BrightnessModel()
    plain = single(**processor(image, return_tensors="pt"))
    model = BrightnessModel()
    outputs = augmented_outputs(model, processor, image, augmented_sizes(processor.size, (1.0, 2.0, 0.5)))
    assert model.calls == 6 and model.areas[0] == model.areas[1] == 64 * width
    torch.testing.assert_close(outputs.class_queries_logits.softmax(-1), plain.class_queries_logits.softmax(-1))
    used = (slice(None), slice(16), slice(width // 4))
    ours, expected = (found.masks_queries_logits[0][used].sigmoid() for found in (outputs, plain))
    assert ((ours > 0.5) == (expected > 0.5)).float().mean() > 0.98
    found = processor.post_process_instance_segmentation(
        outputs, threshold=0.1, target_sizes=[(64, width)], return_binary_maps=True
    )[0]
    bright = found["masks"][found["labels"].tolist().index(0)]
    truth = torch.from_numpy(image[..., 0] > 0)
    assert (bright & truth).sum() / (bright | truth).sum() > 0.9


def test_a_view_that_sees_something_else_does_not_count():
    """Half of the views find the opposite regions under the same names: first view's masks and classes stay."""
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    image[8:40, 5:25] = 255
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})

    class Contrary(BrightnessModel):
        def __call__(self, pixel_values, pixel_mask):
            if self.calls:
                pixel_values = torch.roll(pixel_values, 40, -1) * 0 - 0.01  # nothing bright anywhere
            return super().__call__(pixel_values, pixel_mask)

    outputs = augmented_outputs(Contrary(shuffled=False), processor, image, [processor.size])
    plain = BrightnessModel()(**processor(image, return_tensors="pt"))
    torch.testing.assert_close(
        outputs.masks_queries_logits[0, 0].sigmoid(), plain.masks_queries_logits[0, 0].sigmoid(), atol=1e-4, rtol=0
    )


def test_mistakes_are_explained(small):
    model, processor, image = small
    with pytest.raises(ValueError, match="sizes is empty"):
        augmented_outputs(model, processor, image, [])
    with pytest.raises(ValueError, match="2 images: pass one at a time"):
        augmented_outputs(model, processor, [image, image])


def test_inputs_are_not_changed(small):
    """The mirrored view is made in place, in tensors of its own."""
    model, processor, image = small
    before = image.copy()
    pixels = processor(image, return_tensors="pt")
    kept = pixels["pixel_values"].clone()

    class Fixed:
        size = processor.size

        def __call__(self, *args, **kwargs):
            return BatchFeature({name: value.clone() for name, value in pixels.items()})

    augmented_outputs(model, Fixed(), image, [processor.size])
    assert (image == before).all() and torch.equal(pixels["pixel_values"], kept)
