"""Other channels for a trained model: what it knew stays, whatever its first convolution is."""

import pytest
import torch
from helpers import padded_batch, relative_difference, tiny_fields, tiny_model
from tiny_backbones import backbone_config

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.training.inflation import INFLATIONS, inflated, with_channels

LOGITS = ("class_queries_logits", "masks_queries_logits")


def vit_model():
    config = Mask2FormerConfig(backbone_config=backbone_config("dinov3_vit"), vit_neck="adapter", **tiny_fields())
    return Mask2FormerForUniversalSegmentation(config).eval()


@pytest.fixture(scope="module", params=["resnet", "swin", "convnext", "vit"])
def model(request):
    return vit_model() if request.param == "vit" else tiny_model(request.param)


def differences(model, pixels, other, others_pixels, mask):
    with torch.no_grad():
        ours, theirs = model(pixels, pixel_mask=mask), other(others_pixels, pixel_mask=mask)
    return max(relative_difference(ours[name], theirs[name]) for name in LOGITS)


@pytest.mark.parametrize("inflate", INFLATIONS)
def test_bands_that_are_zero_change_no_logit(model, inflate):
    pixels, mask = padded_batch([(64, 64), (60, 90)])
    more = torch.cat([pixels, torch.zeros_like(pixels[:, :2])], 1)
    grown = with_channels(model, 5, inflate)
    assert grown.config.backbone_config.num_channels == 5 and model.config.backbone_config.num_channels == 3
    assert differences(grown, more, model, pixels, mask) < 1e-5
    more[:, 3:] = 2 * mask[:, None]
    changed = differences(grown, more, model, pixels, mask)
    assert changed < 1e-5 if inflate == "zero" else changed > 1e-3


def test_grey_in_one_channel_is_grey_in_all_three(model):
    pixels, mask = padded_batch([(64, 64), (60, 90)])
    grey = pixels[:, :1]
    assert differences(with_channels(model, 1), grey, model, grey.repeat(1, 3, 1, 1), mask) < 1e-5
    assert differences(with_channels(model, 2), grey.repeat(1, 2, 1, 1), model, grey.repeat(1, 3, 1, 1), mask) < 1e-5


def test_further_weights_are_the_mean_zero_or_the_old_ones_over_again():
    weight = torch.arange(1.0, 7.0).view(2, 3, 1, 1)
    rows = {how: inflated(weight, 7, how)[0].flatten().tolist() for how in INFLATIONS}
    assert rows == {
        "mean": [1, 2, 3, 2, 2, 2, 2],
        "zero": [1, 2, 3, 0, 0, 0, 0],
        "repeat": [1, 2, 3, 1, 2, 3, 1],
    }


def test_a_grown_model_is_saved_and_loaded_as_it_is_and_keeps_what_was_frozen(tmp_path):
    model = tiny_model("swin")
    model.model.pixel_level_module.encoder.requires_grad_(False)
    state = torch.get_rng_state()
    grown = with_channels(model, 4, "repeat")
    assert torch.equal(torch.get_rng_state(), state) and not grown.training
    frozen = [name for name, parameter in grown.named_parameters() if not parameter.requires_grad]
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    grown.save_pretrained(tmp_path)
    loaded, report = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    pixels = torch.randn(1, 4, 64, 64)
    assert differences(loaded.eval(), pixels, grown, pixels, None) == 0


@pytest.mark.parametrize(
    "name, message", [("bit", "standardises its weights"), ("textnet", "textnet takes images of 3 alone")]
)
def test_a_backbone_that_cannot_grow_says_so(name, message):
    config = Mask2FormerConfig(backbone_config=backbone_config(name), **tiny_fields())
    with pytest.raises(ValueError, match=f"channels=5: .*{message}"):
        with_channels(Mask2FormerForUniversalSegmentation(config), 5)


def test_an_unknown_way_to_grow_is_refused():
    with pytest.raises(ValueError, match="inflate='random': must be one of mean, zero, repeat"):
        with_channels(tiny_model("resnet"), 5, "random")
