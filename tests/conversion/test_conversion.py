"""Checkpoints of the original and of mmdetection, converted and converted back."""

import json
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from commands import convert
from helpers import GOLDEN, GoldenCase, needs_golden, relative_difference
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.conversion.architecture import Settings, infer_architecture, make_config
from mask2former_hf.conversion.checkpoint_files import Checkpoint, read_checkpoint, write_original
from mask2former_hf.conversion.converting import build_model, recognise_source
from mask2former_hf.conversion.mmdetection import merge_order, to_original
from mask2former_hf.conversion.names import CheckpointError
from mask2former_hf.conversion.original import (
    convert_state_dict,
    current_name,
    relative_position_index,
    restore_state_dict,
)
from mask2former_hf.training.recipes import load_recipe

CASES = ["swin_coco_panoptic", "r50_coco_panoptic", "swin_ade_semantic_prenorm"]


def golden_state(case):
    return load_file(GOLDEN / case / "model.safetensors")


def write_zoo(path, state, **more):
    """A `.pkl` of detectron2's model zoo: NumPy arrays in a pickled dict."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third_party"} | more))
    return path


def assert_equal_states(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_zoo_file_gives_the_original_s_outputs(case, tmp_path):
    golden = GoldenCase(case)
    source = write_zoo(tmp_path / "model_final.pkl", golden_state(case), matching_heuristics=True)
    assert convert(source, "--config", GOLDEN / case / "config.json", "--output", tmp_path / "out") == 0
    model, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        outputs = model.eval()(golden.pixel_values)
    assert relative_difference(outputs.class_queries_logits, golden.outputs["pred_logits"]) < 1e-5
    assert relative_difference(outputs.masks_queries_logits, golden.outputs["pred_masks"]) < 1e-5
    processor = Mask2FormerImageProcessor.from_pretrained(tmp_path / "out")
    expected = {"shortest_edge": 512, "longest_edge": 2048} if "ade" in case else None
    assert dict(processor.size) == (expected or {"shortest_edge": 800, "longest_edge": 1333})
    assert model.config.task == ("semantic" if "ade" in case else "panoptic")
    assert model.config.id2label[0] == ("wall" if "ade" in case else "person")
    if "coco" in case:
        assert model.config.stuff_label_ids == processor.label_ids_to_fuse == list(range(80, 133))
    assert model.config.freeze_batch_norm == (case == "r50_coco_panoptic")


@needs_golden
@pytest.mark.parametrize("case", CASES[:2])
def test_names_and_tensors_are_those_that_stock_transformers_saved(case):
    """`hf/` was written by stock `save_pretrained` after loading the original's weights."""
    theirs = load_file(GOLDEN / case / "hf" / "model.safetensors")
    theirs = {name: tensor for name, tensor in theirs.items() if "encoder.swin.layernorm" not in name}
    assert_equal_states(convert_state_dict(golden_state(case)), theirs)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_exact(case, tmp_path, capsys):
    state = golden_state(case)
    source = tmp_path / "model_final.pth"
    torch.save({"model": state, "iteration": 7, "optimizer": {"state": {}, "param_groups": []}}, source)
    arguments = ("--config", GOLDEN / case / "config.json", "--output", tmp_path / "out")
    assert convert(source, *arguments) == 0
    for suffix in ("pth", "pkl"):
        assert convert(tmp_path / "out", "--to", "original", "--output", tmp_path / f"back.{suffix}") == 0
        assert_equal_states(read_checkpoint(tmp_path / f"back.{suffix}").tensors, state)


@needs_golden
def test_the_file_for_detectron2_carries_the_versions_that_keep_its_names(tmp_path):
    """Without them the original's head takes the names for an early version's and prefixes `pixel_decoder.` again."""
    write_original(tmp_path / "a.pth", golden_state(CASES[0]))
    write_original(tmp_path / "a.pkl", golden_state(CASES[0]))
    for content in (torch.load(tmp_path / "a.pth"), pickle.loads((tmp_path / "a.pkl").read_bytes())):
        assert type(content["model"]) is OrderedDict and "__author__" in content
        for module in ("sem_seg_head", "sem_seg_head.predictor"):
            assert content["model"]._metadata[module]["version"] == 2
    assert all(type(value) is np.ndarray for value in content["model"].values())


@needs_golden
def test_early_names_are_understood():
    state = golden_state(CASES[0])
    early = {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): tensor
        for name, tensor in state.items()
    }
    assert set(early) & set(state) != set(state)
    assert_equal_states(convert_state_dict(early), convert_state_dict(state))
    assert infer_architecture(early) == infer_architecture(state)
    assert current_name("sem_seg_head.adapter_1.weight") == "sem_seg_head.pixel_decoder.adapter_1.weight"


@needs_golden
def test_synchronised_batch_norm_keeps_its_counters():
    state = golden_state("r50_coco_panoptic")
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(n)
        for n, name in enumerate(state)
        if name.endswith("running_var")
    }
    assert len(counters) == 53
    source = recognise_source(Checkpoint(state | counters, {}))
    model = build_model(source)
    assert model.config.freeze_batch_norm is False
    assert model.model.pixel_level_module.encoder.embedder.embedder.normalization.num_batches_tracked > 0
    assert_equal_states(restore_state_dict(convert_state_dict(source.state), False), state | counters)
    assert_equal_states(restore_state_dict(convert_state_dict(source.state), True), state)


@needs_golden
def test_without_settings_the_architecture_is_read_off_the_tensors(tmp_path, capsys):
    source = write_zoo(tmp_path / "model.pkl", golden_state("swin_coco_panoptic"))
    assert convert(source, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "pre_norm = False" in said and "LABEL_0" in said
    config = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out").config
    known = json.loads((GOLDEN / "swin_coco_panoptic" / "hf" / "config.json").read_text())
    for field in ("feature_size", "mask_feature_size", "hidden_dim", "encoder_layers", "encoder_feedforward_dim",
                  "decoder_layers", "num_attention_heads", "dim_feedforward", "num_queries", "common_stride",
                  "enforce_input_projection", "no_object_weight"):  # fmt: skip
        assert getattr(config, field) == known[field], field
    for field in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "patch_size"):
        assert getattr(config.backbone_config, field) == known["backbone_config"][field], field


# Trainable parameters of the original, measured on its code (COCO panoptic)
PARAMETERS = {
    "coco-panoptic-r50": 43_983_878,
    "coco-panoptic-r101": 62_923_782,
    "coco-panoptic-swin-t": 47_435_264,
    "coco-panoptic-swin-s": 68_753_168,
    "coco-panoptic-swin-b-in21k": 106_917_822,
    "coco-panoptic-swin-l-in21k": 215_535_610,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_recipes_have_the_original_s_parameters_and_are_recognised(name):
    """On the meta device: shapes without data."""
    recipe = load_recipe(name)
    settings = Settings(name, recipe.config_fields(), recipe.backbone_fields())
    defaults = {"num_labels": recipe.num_labels}
    with torch.device("meta"):
        architecture = infer_architecture_of(recipe)
        config = make_config(architecture, settings)
        model = Mask2FormerForUniversalSegmentation(config)
    assert architecture.config["num_labels"] == defaults["num_labels"]
    frozen = [p for n, p in model.named_parameters() if "normalization" in n or "swin.layernorm" in n]
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in frozen)
    assert count == PARAMETERS[name]


def infer_architecture_of(recipe):
    """The architecture read off the original's names of a model with the recipe's configuration."""
    from mask2former_hf import Mask2FormerConfig
    from mask2former_hf.conversion.converting import file_state_dict

    backbone = recipe.backbone_fields() | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **recipe.config_fields()))
    state = restore_state_dict(file_state_dict(model), recipe.backbone.get("norm") == "FrozenBN")
    return infer_architecture({name: t for name, t in state.items() if name != "criterion.empty_weight"})


@pytest.mark.parametrize("kind", ["coco-panoptic-r50", "coco-panoptic-swin-t"])
def test_a_recipe_that_does_not_fit_is_refused_with_all_differences(kind):
    with torch.device("meta"):
        architecture = infer_architecture_of(load_recipe(kind))
    recipe = load_recipe("ade20k-panoptic-swin-l-in21k")
    settings = Settings("another", recipe.config_fields(), recipe.backbone_fields())
    with pytest.raises(CheckpointError, match="num_labels is 150 there and 133 in the tensors.*num_queries is 200"):
        make_config(architecture, settings)


def test_position_index_is_the_row_of_the_relative_step():
    index = relative_position_index(3)
    for query in range(9):
        for key in range(9):
            row, column = query // 3 - key // 3, query % 3 - key % 3
            assert index[query, key] == (row + 2) * 5 + column + 2


# --- mmdetection


def mmdetection_rules(version):
    attention = {2: ("attentions.0", "attentions.1"), 3: ("cross_attn", "self_attn")}[version]
    encoder_attention, ffn = {2: ("attentions.0", "ffns.0"), 3: ("self_attn", "ffn")}[version]
    return [
        (r"backbone\.patch_embed\.proj\.", "backbone.patch_embed.projection."),
        (r"backbone\.layers\.(\d)\.blocks\.(\d+)\.attn\.", r"backbone.stages.\1.blocks.\2.attn.w_msa."),
        (r"backbone\.layers\.(\d)\.blocks\.(\d+)\.mlp\.fc1", r"backbone.stages.\1.blocks.\2.ffn.layers.0.0"),
        (r"backbone\.layers\.(\d)\.blocks\.(\d+)\.mlp\.fc2", r"backbone.stages.\1.blocks.\2.ffn.layers.1"),
        (r"backbone\.layers\.", "backbone.stages."),
        (r"backbone\.stem\.conv1\.norm", "backbone.bn1"),
        (r"backbone\.stem\.", "backbone."),
        (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}"),
        (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm",
         lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1"),
        (r"backbone\.res(\d)\.(\d+)\.shortcut", lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0"),
        (r"backbone\.res(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 1}."),
        (r"sem_seg_head\.pixel_decoder\.input_proj\.(\d)\.0", r"panoptic_head.pixel_decoder.input_convs.\1.conv"),
        (r"sem_seg_head\.pixel_decoder\.input_proj\.(\d)\.1", r"panoptic_head.pixel_decoder.input_convs.\1.gn"),
        (r"sem_seg_head\.pixel_decoder\.transformer\.level_embed",
         "panoptic_head.pixel_decoder.level_encoding.weight"),
        (r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers", "panoptic_head.pixel_decoder.encoder.layers"),
        (r"(encoder\.layers\.\d+)\.self_attn", rf"\1.{encoder_attention}"),
        (r"(encoder\.layers\.\d+)\.linear1", rf"\1.{ffn}.layers.0.0"),
        (r"(encoder\.layers\.\d+)\.linear2", rf"\1.{ffn}.layers.1"),
        (r"(encoder\.layers\.\d+)\.norm1", r"\1.norms.0"),
        (r"(encoder\.layers\.\d+)\.norm2", r"\1.norms.1"),
        (r"sem_seg_head\.pixel_decoder\.adapter_1\.norm", "panoptic_head.pixel_decoder.lateral_convs.0.gn"),
        (r"sem_seg_head\.pixel_decoder\.adapter_1", "panoptic_head.pixel_decoder.lateral_convs.0.conv"),
        (r"sem_seg_head\.pixel_decoder\.layer_1\.norm", "panoptic_head.pixel_decoder.output_convs.0.gn"),
        (r"sem_seg_head\.pixel_decoder\.layer_1", "panoptic_head.pixel_decoder.output_convs.0.conv"),
        (r"sem_seg_head\.pixel_decoder\.mask_features", "panoptic_head.pixel_decoder.mask_feature"),
        (r"sem_seg_head\.predictor\.", "panoptic_head."),
        (r"head\.transformer_cross_attention_layers\.(\d)\.multihead_attn",
         rf"head.transformer_decoder.layers.\1.{attention[0]}.attn"),
        (r"head\.transformer_cross_attention_layers\.(\d)\.norm", r"head.transformer_decoder.layers.\1.norms.0"),
        (r"head\.transformer_self_attention_layers\.(\d)\.self_attn",
         rf"head.transformer_decoder.layers.\1.{attention[1]}.attn"),
        (r"head\.transformer_self_attention_layers\.(\d)\.norm", r"head.transformer_decoder.layers.\1.norms.1"),
        (r"head\.transformer_ffn_layers\.(\d)\.linear1", rf"head.transformer_decoder.layers.\1.{ffn}.layers.0.0"),
        (r"head\.transformer_ffn_layers\.(\d)\.linear2", rf"head.transformer_decoder.layers.\1.{ffn}.layers.1"),
        (r"head\.transformer_ffn_layers\.(\d)\.norm", r"head.transformer_decoder.layers.\1.norms.2"),
        (r"head\.decoder_norm", "head.transformer_decoder.post_norm"),
        (r"head\.mask_embed\.layers\.(\d)", lambda m: f"head.mask_embed.{2 * int(m[1])}"),
        (r"head\.class_embed", "head.cls_embed"),
        (r"head\.input_proj\.", "head.decoder_input_projs."),
    ]  # fmt: skip


def as_mmdetection(state, version):
    """The original's tensors under mmdetection's names, by its source; written apart from the table under test."""
    rules = mmdetection_rules(version)
    renamed = {}
    for name, tensor in state.items():
        if name == "criterion.empty_weight":
            continue
        if ".downsample." in name and "layers" in name:
            C = tensor.shape[-1] // 4
            places = torch.arange(4 * C).reshape(1, 4 * C, 1)  # what Unfold calls 0 .. 4 C - 1
            maps = torch.nn.functional.fold(places.float(), (2, 2), (2, 2))[0].long()  # (C, 2, 2)
            # the original's four maps, in its order: (row, column) = 00, 10, 01, 11
            places = torch.cat([maps[:, 0, 0], maps[:, 1, 0], maps[:, 0, 1], maps[:, 1, 1]])
            shuffled = torch.empty_like(tensor)
            shuffled[..., places] = tensor
            tensor = shuffled
        if name == "backbone.absolute_pos_embed":
            tensor = tensor.flatten(2).transpose(1, 2)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


@needs_golden
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_mmdetection_s_names_lead_to_the_same_tensors(case, version):
    state = golden_state(case)
    theirs = as_mmdetection(state, version)
    assert not [name for name in theirs if name.startswith("sem_seg_head")]
    index = [name for name in state if name.endswith("relative_position_index")]  # a constant, dropped on purpose
    assert_equal_states(to_original(theirs), {name: t for name, t in state.items() if name not in index})


def test_mmdetection_s_names_are_those_of_its_source():
    """A few names of each module, as its constructors give them."""
    names = {
        "panoptic_head.pixel_decoder.input_convs.2.gn.bias": "sem_seg_head.pixel_decoder.input_proj.2.1.bias",
        "panoptic_head.pixel_decoder.encoder.layers.5.self_attn.sampling_offsets.weight":
            "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.self_attn.sampling_offsets.weight",
        "panoptic_head.transformer_decoder.layers.8.cross_attn.attn.in_proj_bias":
            "sem_seg_head.predictor.transformer_cross_attention_layers.8.multihead_attn.in_proj_bias",
        "panoptic_head.transformer_decoder.layers.0.attentions.1.attn.out_proj.weight":
            "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.out_proj.weight",
        "panoptic_head.mask_embed.4.weight": "sem_seg_head.predictor.mask_embed.layers.2.weight",
        "backbone.layer3.22.bn2.num_batches_tracked": "backbone.res4.22.conv2.norm.num_batches_tracked",
        "backbone.stages.2.blocks.17.ffn.layers.0.0.weight": "backbone.layers.2.blocks.17.mlp.fc1.weight",
    }  # fmt: skip
    for theirs, original in names.items():
        assert list(to_original({theirs: torch.zeros(2)})) == [original]


def test_patch_merging_gives_the_same_map_in_both_orders():
    """mmdetection's Unfold and linear layer against the original's concatenated maps with the reordered weight."""
    features, weight = torch.randn(1, 3, 6, 8), torch.randn(5, 12)
    theirs = torch.nn.functional.unfold(features, 2, stride=2).transpose(1, 2) @ weight.T  # (1, 12, 5)
    x = features.permute(0, 2, 3, 1)
    maps = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    ours = torch.cat(maps, dim=-1).flatten(1, 2) @ merge_order(weight).T
    torch.testing.assert_close(ours, theirs)


@needs_golden
def test_an_mmdetection_file_runs_and_keeps_its_class_names(tmp_path, capsys):
    golden = GoldenCase("swin_coco_panoptic")
    names = tuple(f"thing {n}" for n in range(80)) + tuple(f"stuff {n}" for n in range(53))
    meta = {"epoch": 1, "dataset_meta": {"classes": names, "stuff_classes": names[80:]}}
    torch.save({"meta": meta, "state_dict": as_mmdetection(golden_state("swin_coco_panoptic"), 3)}, tmp_path / "m.pth")
    assert convert(tmp_path / "m.pth", "--output", tmp_path / "out") == 0
    assert "mmdetection" in capsys.readouterr().out
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        outputs = model(golden.pixel_values)
    assert relative_difference(outputs.class_queries_logits, golden.outputs["pred_logits"]) < 1e-5
    assert model.config.id2label[132] == "stuff 52" and model.config.stuff_label_ids == list(range(80, 133))
