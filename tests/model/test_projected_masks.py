"""The projection of mask features in the embeddings: the same logits, and features for those who read them."""

import copy
import pickle

import pytest
import torch
from helpers import relative_difference, tiny_model

PIXELS = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))
READS = {
    "attribute": lambda output: output.pixel_decoder_last_hidden_state,
    "key": lambda output: output["pixel_decoder_last_hidden_state"],
    "get": lambda output: output.get("pixel_decoder_last_hidden_state"),
    "values": lambda output: dict(zip(output, output.values(), strict=True))["pixel_decoder_last_hidden_state"],
    "mapping": lambda output: {**output}["pixel_decoder_last_hidden_state"],
    "place": lambda output: output.to_tuple()[list(output).index("pixel_decoder_last_hidden_state")],
    "copy": lambda output: copy.copy(output).pixel_decoder_last_hidden_state,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)).pixel_decoder_last_hidden_state,
    "tree": lambda output: torch.utils._pytree.tree_map(lambda x: x, output).pixel_decoder_last_hidden_state,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("resnet")


@pytest.fixture(scope="module")
def projected(model):
    return model(PIXELS, output_auxiliary_logits=True)  # with gradients every pixel is projected


@pytest.fixture
def projections(model, monkeypatch):
    """The mask features made so far."""
    made, projection = [], model.model.pixel_level_module.decoder.mask_projection
    forward = type(projection).forward

    def counted(self, x):
        output = forward(self, x)
        if self is projection:
            made.append(output)
        return output

    monkeypatch.setattr(type(projection), "forward", counted)
    return made


@pytest.mark.parametrize("read", READS)
def test_mask_features_are_made_when_somebody_reads_them(model, projected, projections, read):
    with torch.inference_mode():
        output = model(PIXELS, output_auxiliary_logits=True)
    layers = zip([*output.auxiliary_logits, output], [*projected.auxiliary_logits, projected], strict=True)
    for ours, theirs in layers:
        assert relative_difference(ours["masks_queries_logits"], theirs["masks_queries_logits"].detach()) < 1e-5
    assert not projections and list(output) == list(projected)
    found = READS[read](output)  # where gradients are recorded again
    assert relative_difference(found, projected.pixel_decoder_last_hidden_state.detach()) < 1e-5
    assert output.pixel_decoder_last_hidden_state is projections[0] and len(projections) == 1


def test_images_of_two_canvases_and_the_model_alone_have_their_mask_features(model, projected):
    mask = torch.ones(2, 96, 64)
    mask[1, 40:] = 0
    with torch.no_grad():
        output, alone = model(PIXELS, pixel_mask=mask), model.model(PIXELS)
    expected = projected.pixel_decoder_last_hidden_state.detach()
    assert relative_difference(alone.pixel_decoder_last_hidden_state, expected) < 1e-5
    assert relative_difference(output.pixel_decoder_last_hidden_state[0], expected[0]) < 1e-5
    assert not output.pixel_decoder_last_hidden_state[1, :, 16:].any()  # beyond its canvas


def test_every_pixel_is_projected_where_a_hook_wants_it_and_under_autocast(model, projections):
    pixels, decoder = model.model.pixel_level_module.decoder, model.model.transformer_module.decoder
    with torch.no_grad():
        for count, part in enumerate((pixels, pixels.mask_projection, decoder.mask_predictor), 1):
            handle = part.register_forward_hook(lambda *args: None)
            model(PIXELS)
            handle.remove()
            assert len(projections) == count
        with torch.autocast("cpu", torch.bfloat16):
            model(PIXELS)
        assert len(projections) == 4
