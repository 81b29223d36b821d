"""Every backbone of transformers that can serve does, and timm's: forward, backward, save and load, whoever is in the
batch, ONNX."""

import pytest
import torch
from helpers import BACKBONES, padded_batch, random_targets, randomise, relative_difference, tiny_fields
from safetensors.torch import load_file
from tiny_backbones import HIERARCHICAL, ONE_MAP, PLAIN, TIMM, TIMM_PLAIN, backbone_config, needs_timm
from transformers import AutoBackbone

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.export.errors import ExportError
from mask2former_hf.export.modules import Network
from mask2former_hf.export.tracing import save, trace
from mask2former_hf.model.backbone import feature_maps

CASES = [
    *((name, None) for name in (*BACKBONES, *HIERARCHICAL)),
    *((name, "pyramid") for name in PLAIN),
    ("dinov3_vit", "adapter"),
    ("dinov2", "adapter"),  # patches of 14 pixels
    *((name, "pyramid") for name in ONE_MAP),
]
OF_TIMM = [*((name, None) for name in TIMM), *((name, "pyramid") for name in TIMM_PLAIN)]
PREFIX = "model.pixel_level_module.encoder."


def make_model(name, neck):
    config = Mask2FormerConfig(backbone_config=backbone_config(name), vit_neck=neck, **tiny_fields())
    return randomise(Mask2FormerForUniversalSegmentation(config))


@pytest.fixture(
    scope="module",
    params=[*CASES, *(pytest.param(case, marks=needs_timm) for case in OF_TIMM)],
    ids=lambda case: "-".join(filter(None, case)),
)
def case(request):
    return *request.param, make_model(*request.param)


def run(model, pixels, mask=None):
    with torch.no_grad():
        return model.eval().model(pixels, pixel_mask=mask, output_hidden_states=True)


def test_maps_of_any_size_are_at_strides_4_to_32(case):
    name, _, model = case
    output = run(model, *padded_batch([(70, 100)]))
    assert [tuple(x.shape[-2:]) for x in output.encoder_hidden_states] == [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert output.masks_queries_logits[-1].shape == (1, 10, 24, 32)
    if name in (
        *PLAIN,
        *ONE_MAP,
        *TIMM,
        *TIMM_PLAIN,
        "beit with add_fpn",
        "hiera",
    ):  # others have ways of their own with odd sizes
        output = run(model, torch.randn(1, 3, 70, 100))
        assert [tuple(x.shape[-2:]) for x in output.encoder_hidden_states] == [(18, 25), (9, 13), (5, 7), (3, 4)]


def test_every_trained_parameter_gets_a_gradient(case):
    """DistributedDataParallel would wait for one that does not."""
    _, _, model = case
    masks, labels = random_targets([3, 2], (64, 64))
    model.zero_grad()
    model.train()(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels).loss.backward()
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in parameters if parameter.grad is None] == []
    assert sum(parameter.grad.abs().sum() > 0 for _, parameter in parameters) > 0.9 * len(parameters)


def test_a_saved_model_has_the_backbone_s_own_names_and_is_loaded_as_it_was(case, tmp_path):
    name, _, model = case
    model.save_pretrained(tmp_path / "model")
    AutoBackbone.from_config(backbone_config(name)).save_pretrained(tmp_path / "backbone")
    stored = {key.removeprefix(PREFIX) for key in load_file(tmp_path / "model" / "model.safetensors") if PREFIX in key}
    assert stored == set(load_file(tmp_path / "backbone" / "model.safetensors"))
    loaded, report = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    pixels = torch.randn(1, 3, 64, 96)
    before, after = run(model, pixels), run(loaded, pixels)
    assert torch.equal(before.masks_queries_logits[-1], after.masks_queries_logits[-1])


def test_no_map_depends_on_batch_mates(case):
    """Of another canvas or the same one; logits would also have the attention masks' bits of rounded maps."""
    _, _, model = case
    pixels, mask = padded_batch([(50, 60), (90, 120), (64, 64)])
    together = run(model, pixels, mask)
    alone = run(model, pixels[:1, :, :64, :64], mask[:1, :64, :64])
    for ours, theirs in zip(together.encoder_hidden_states, alone.encoder_hidden_states, strict=True):
        h, w = theirs.shape[-2:]
        assert relative_difference(ours[:1, :, :h, :w], theirs) < 1e-4


class Maps(torch.nn.Module):
    """The four maps of a model that is prepared for an export; the rest of it is exported in tests/export."""

    def __init__(self, model):
        super().__init__()
        self.level = Network(model).model.model.pixel_level_module

    def forward(self, pixels):
        return feature_maps(self.level.encoder, self.level.neck, pixels)


# Their positions are resized with antialiasing, for which opset 17 has no operator.
ANTIALIASED = ("dinov2_with_registers", "tipsv2_vision_model", "timm vit", "timm eva02")


def test_one_onnx_graph_has_its_maps_at_every_size(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
    name, _, model = case
    maps = Maps(model).eval()
    given = (maps, (torch.randn(2, 3, 64, 96),), ["pixels"], list("abcd"))
    axes = {"pixels": {0: "batch", 2: "height", 3: "width"}}
    if name in ANTIALIASED:
        with pytest.raises(ExportError, match="_upsample_bi.*_aa"):
            trace(*given, axes, 17)
        return
    save(trace(*given, axes, 17), tmp_path / "maps.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "maps.onnx"))
    pixels = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        expected = maps(pixels)
    for ours, theirs in zip(session.run(None, {"pixels": pixels.numpy()}), expected, strict=True):
        assert relative_difference(torch.from_numpy(ours), theirs) < 5e-4  # of DINOv2's adapter 1.6e-4, else 2e-5
