"""The forms that parts have in a graph are those parts: compared in PyTorch; `test_onnx` has every backbone."""

import pytest
import torch
from exports import SMALL, family_model
from helpers import relative_difference, tiny_model
from torch import nn

from mask2former_hf.export.forms import FORMS
from mask2former_hf.export.modules import Network
from mask2former_hf.export.openvino_forms import OPENVINO_FORMS
from mask2former_hf.inference.exported import LOGITS

PIXELS = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))
PIXEL_EMBEDDING = {
    "pixel_decoder_type": "fpn",
    "decoder_type": "standard",
    "transformer_in_feature": "pixel_embedding",
}


@torch.no_grad()
def differences(model, forms=FORMS):
    outputs, network = model(PIXELS), Network(model, forms=forms)
    return [relative_difference(ours, outputs[name]) for name, ours in zip(LOGITS, network(PIXELS), strict=True)]


def has_projection(model):
    return type(Network(model).model.model.pixel_level_module.decoder.mask_projection) is not nn.Identity


@pytest.mark.parametrize("fields", [{"attended_stride": 16}, {"masked_attention": False}, PIXEL_EMBEDDING])
def test_the_network_of_a_graph_gives_the_logits_of_other_designs(fields):
    model = tiny_model("resnet", **SMALL, **fields)
    assert max(differences(model)) < 1e-5
    assert has_projection(model) == (fields is PIXEL_EMBEDDING)  # the decoder reads the mask features


def test_bags_of_corners_are_deformable_attention_also_of_an_adapters_offsets():
    class Adapted(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)  # further outside the maps, too

    model = tiny_model("resnet", **SMALL)
    attention = model.model.pixel_level_module.decoder.encoder.layers[0].self_attn
    assert max(differences(model, OPENVINO_FORMS)) < 1e-5
    before = model(PIXELS).masks_queries_logits
    attention.sampling_offsets.__class__ = Adapted
    assert max(differences(model, OPENVINO_FORMS)) < 1e-5
    assert relative_difference(model(PIXELS).masks_queries_logits, before) > 1e-4


def test_the_projection_of_mask_features_stays_where_a_part_is_not_what_it_was_built_as():
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_model("resnet", **SMALL)
    assert not has_projection(model)
    model.model.transformer_module.decoder.mask_predictor.mask_embedder[-1][0].__class__ = Adapted
    assert has_projection(model) and max(differences(model)) < 1e-5


def test_a_trace_of_whole_windows_crops_the_maps_of_other_sizes():
    model = family_model("swin")  # windows of 4, whole in every stage of 128 x 128
    with torch.no_grad():
        traced = torch.jit.trace(Network(model), torch.randn(1, 3, 128, 128), check_trace=False)
        expected = model(PIXELS)
        for name, ours in zip(LOGITS, traced(PIXELS), strict=True):
            assert relative_difference(ours, expected[name]) < 1e-5
