"""Weights begin as the original's, and those of files go where they belong."""

import json

import pytest
import torch
from helpers import (
    GOLDEN,
    needs_golden,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation


def test_files_without_the_unused_norm_load_without_a_report(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "swin.layernorm" not in name}
    assert len(kept) == len(state) - 2
    from safetensors.torch import save_file

    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_initialisation_follows_the_original():
    """Standard deviations by formula from a.3-a.5 of the reference: Xavier and Kaiming bounds, N(0, 1) queries."""
    torch.manual_seed(0)
    changes = {"feature_size": 64, "hidden_dim": 64, "mask_feature_size": 64, "encoder_feedforward_dim": 1024}
    model = Mask2FormerForUniversalSegmentation(tiny_config("swin", num_labels=150, **changes))
    pixels, queries = model.model.pixel_level_module.decoder, model.model.transformer_module
    layer, encoder_layer = queries.decoder.layers[0], pixels.encoder.layers[0]

    def xavier(fan_in, fan_out):
        return (2 / (fan_in + fan_out)) ** 0.5

    def caffe2(fan_in):  # uniform with bound sqrt(3 / fan_in)
        return (1 / fan_in) ** 0.5

    def default(fan_in):  # uniform with bound 1 / sqrt(fan_in)
        return (1 / (3 * fan_in)) ** 0.5

    expected = [
        (layer.self_attn.q_proj.weight, xavier(64, 192)),  # the joint matrix: .088 as measured in the original
        (layer.cross_attn.in_proj_weight, xavier(64, 192)),
        (layer.self_attn.out_proj.weight, xavier(64, 64)),
        (layer.fc1.weight, xavier(64, 48)),
        (encoder_layer.fc1.weight, xavier(64, 1024)),
        (encoder_layer.self_attn.value_proj.weight, xavier(64, 64)),
        (encoder_layer.fc1.bias, default(64)),
        (pixels.layer_1[0].weight, caffe2(64 * 9)),
        (pixels.mask_projection.weight, caffe2(64)),
        (model.class_predictor.weight, default(64)),
        (model.class_predictor.bias, default(64)),
        (queries.decoder.mask_predictor.mask_embedder[0][0].weight, default(64)),
        (queries.queries_features.weight, 1.0),
        (queries.level_embed.weight, 1.0),
        (pixels.level_embed, 1.0),
        (model.model.pixel_level_module.encoder.state_dict()[_swin_fc1(model)], default(64)),
    ]
    for tensor, std in expected:
        tolerance = 4 / tensor.numel() ** 0.5
        assert abs(tensor.std().item() / std - 1) <= tolerance, (tuple(tensor.shape), tensor.std().item(), std)
    for bias in (layer.cross_attn.in_proj_bias, layer.self_attn.q_proj.bias, pixels.mask_projection.bias):
        assert (bias == 0).all()


def _swin_fc1(model):
    names = model.model.pixel_level_module.encoder.state_dict()
    return next(n for n in names if "layers.2" in n and n.endswith(("mlp.fc1.weight", "intermediate.dense.weight")))


@needs_golden
def test_golden_deformable_attention_initialisation():
    golden = load_file(GOLDEN / "msda_op" / "module.safetensors")
    from mask2former_hf.model.deformable_attention import MultiScaleDeformableAttention
    from mask2former_hf.model.initialization import init_deformable_attention

    C = golden["init.value_proj.weight"].shape[0]
    h, L, P = 4, 3, 4
    assert golden["init.attention_weights.bias"].numel() == h * L * P
    module = MultiScaleDeformableAttention(C, h, L, P)
    init_deformable_attention(module)
    for name in ("sampling_offsets.weight", "sampling_offsets.bias", "attention_weights.weight"):
        torch.testing.assert_close(module.state_dict()[name], golden[f"init.{name}"], atol=1e-6, rtol=0)


def test_a_new_class_head_on_a_trained_checkpoint_is_initialised(tmp_path):
    tiny_model("resnet").save_pretrained(tmp_path)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model.class_predictor.weight.shape == (8, 32)
    assert 0.05 < model.class_predictor.weight.std() < 0.2
    assert model.criterion.empty_weight.tolist() == pytest.approx([1.0] * 7 + [0.1])


def test_published_style_config_with_legacy_backbone_fields_loads(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"backbone": None, "use_pretrained_backbone": False, "use_timm_backbone": False, "backbone_kwargs": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert isinstance(Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).config, Mask2FormerConfig)


def test_load_state_dict_takes_the_names_in_files(tmp_path):
    """What transformers' Trainer does on resume; with stock's class the Swin backbone stays as it was."""
    trained, fresh = tiny_model("swin"), Mask2FormerForUniversalSegmentation(tiny_config("swin"))
    trained.save_pretrained(tmp_path)
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    for (name, expected), (_, loaded) in zip(trained.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert torch.equal(expected, loaded), name
    with pytest.raises(RuntimeError, match="Unexpected key.*no.such.tensor"):
        fresh.load_state_dict({"no.such.tensor": torch.zeros(1)})
