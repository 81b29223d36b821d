"""ONNX graphs are the checkpoint at every size, made of standard operators, and written whole or not at all."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exports import FAMILIES, SMALL, family_model
from helpers import tiny_fields, tiny_model
from tiny_backbones import backbone_config

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, export_model
from mask2former_hf.export import exporting, parity, tracing
from mask2former_hf.export.errors import ExportError
from mask2former_hf.export.folders import complete_or_nothing
from mask2former_hf.export.modules import Network
from mask2former_hf.inference.exported import LOGITS, ExportedModel
from mask2former_hf.inference.rules import rules_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")

UNSEEN = [(1, 64, 64), (3, 128, 224), (2, 256, 96)]


def session(graph, path):
    tracing.save(graph, path)
    return onnxruntime.InferenceSession(str(path))


def largest_difference(model, run, B, H, W):
    pixels = torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(pixels)
    pairs = zip(LOGITS, run(list(LOGITS), {"pixel_values": pixels.numpy()}), strict=True)
    return max((torch.from_numpy(ours) - theirs[name]).abs().max() / theirs[name].abs().max() for name, ours in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_is_the_checkpoint_at_sizes_that_were_not_traced(family, tmp_path):
    model = family_model(family)
    graph = tracing.trace_network(Network(model), None, 17)
    run = session(graph, tmp_path / "model.onnx").run
    for size in UNSEEN:
        assert largest_difference(model, run, *size) < 1e-4, size


def test_an_operator_that_onnx_has_not_is_one_line(capfd):
    backbone = backbone_config("dinov2_with_registers")  # it resizes positions with an antialiasing filter
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **tiny_fields(**SMALL)))
    with pytest.raises(ExportError, match="an operator that is not written as ONNX: .*bicubic2d_aa"):
        tracing.trace_network(Network(model), None, 17)
    assert "graph" not in capfd.readouterr().out


def test_timm_backbones_export(tmp_path):
    pytest.importorskip("timm")
    from transformers import TimmBackboneConfig

    backbone = TimmBackboneConfig(backbone="resnet10t", out_indices=[1, 2, 3, 4], use_pretrained_backbone=False)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **SMALL)).eval()
    run = session(tracing.trace_network(Network(model), None, 17), tmp_path / "model.onnx").run
    assert largest_difference(model, run, 1, 64, 96) < 1e-4


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_newer_opsets_give_the_same(opset, tmp_path):
    model = family_model("resnet")
    graph = tracing.trace_network(Network(model), None, opset)
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [opset]
    assert largest_difference(model, session(graph, tmp_path / "model.onnx").run, 1, 64, 128) < 1e-4


def test_operators_are_standard_without_control_flow_and_grid_sample_has_rank_4(end_to_end):
    for task in ("panoptic", "instance", "semantic"):
        graph = onnx.shape_inference.infer_shapes(onnx.load(end_to_end / task / "model.onnx")).graph
        assert {node.domain for node in graph.node} == {""}
        names = {node.op_type for node in graph.node}
        assert not names & {"If", "Loop", "Scan", "SequenceAt", "SplitToSequence", "Optional"}
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
        samples = [node for node in graph.node if node.op_type == "GridSample"]
        assert len(samples) == 3 and {ranks[node.input[0]] for node in samples} == {4}


def test_a_fixed_size_is_the_only_one(decided, processor, tmp_path):
    report = export_model(decided, processor, tmp_path / "out", size=(96, 128))
    assert [row["input"] for row in report["differences"]] == [[1, 3, 96, 128], [2, 3, 96, 128]]
    fields = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert fields["pad_size"] == {"height": 96, "width": 128}
    model = ExportedModel(tmp_path / "out")
    assert model.graph.inputs == {"pixel_values": ["batch", 3, 96, 128]}
    processor.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="pad_size=None, but the graph takes 96x128 alone"):
        ExportedModel(tmp_path / "out")


def test_half_precision_halves_the_file_and_takes_float32_pixels(exported, processor, tmp_path):
    report = export_model(family_model("resnet"), processor, tmp_path / "out", dtype="float16")
    sizes = [(folder / "model.onnx").stat().st_size for folder in (tmp_path / "out", exported)]
    assert sizes[0] < 0.75 * sizes[1]  # of so small a model the nodes are the half
    assert 1e-6 < max(row[name] for row in report["differences"] for name in LOGITS) < 0.05  # float16 has 11 bits


def test_a_folder_says_what_was_checked(exported):
    report = json.loads((exported / "export.json").read_text())
    assert {tuple(row["input"]) for row in report["differences"]} == {(B, 3, H, W) for B, H, W in parity.SIZES}
    assert all(row[name] < 1e-4 for row in report["differences"] for name in LOGITS)
    card = (exported / "README.md").read_text()
    assert "| Opset | 17 |" in card and "2 x 3 x 160 x 128" in card and torch.__version__ in card


def test_the_model_stays_as_it_was(exported, decided, checkpoint):
    fresh = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint)
    assert decided.config._attn_implementation == fresh.config._attn_implementation
    assert {name: type(module) for name, module in decided.named_modules()} == {
        name: type(module) for name, module in fresh.named_modules()
    }
    assert all(parameter.requires_grad for parameter in decided.class_predictor.parameters())


def test_a_graph_that_is_not_the_checkpoint_is_refused_and_leaves_nothing(decided, processor, tmp_path, monkeypatch):
    class Spoiled(Network):
        def forward(self, pixel_values):
            classes, masks = super().forward(pixel_values)
            return classes, masks * 1.01

    monkeypatch.setattr(exporting, "Network", Spoiled)
    with pytest.raises(ExportError, match="masks_queries_logits of the graph differ .* 1x3x96x160"):
        export_model(decided, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_wins_pixels_of_a_tie_is_no_other_result(decided):
    first, other = np.zeros((61, 83), np.int32), np.zeros((61, 83), np.int32)
    other[0, :5] = 1  # of 5063 pixels
    logits = [np.zeros((1, 2, 6), np.float32), np.zeros((1, 2, 24, 40), np.float32)]
    exported = SimpleNamespace(channels=3, logits=lambda pixels: logits, segmentation=ExportedModel.segmentation)
    rules = rules_of(decided.config, "semantic")
    for found in (first, other):
        exported.results = lambda *given, found=found: {"segmentation": found}
        parity.compare_results(exported, rules, None)
    other[1] = 1
    with pytest.raises(ExportError, match="semantic results of the graph have 2 segments, the checkpoint's 1"):
        parity.compare_results(exported, rules, None)


def test_a_failed_export_leaves_what_was_there(decided, processor, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text("mine")
    monkeypatch.setattr(exporting, "compare_logits", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(decided, processor, out, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "export.json"]


def test_a_failed_export_takes_the_folders_away_that_it_made(decided, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "trace_network", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(decided, processor, tmp_path / "a" / "b" / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_an_export_and_nothing_else(tmp_path):
    out, leftovers = tmp_path / "out", [tmp_path / ".out.old", tmp_path / ".out.part"]  # of whoever
    for folder in (out, *leftovers):
        folder.mkdir()
        (folder / "mine").write_text("")
    with pytest.raises(ExportError, match="is no export that could be replaced"), complete_or_nothing(out, True):
        pass
    (out / "export.json").write_text("")
    with pytest.raises(ExportError, match="exists already; name another place, or overwrite it"):
        with complete_or_nothing(out, False):
            pass
    with complete_or_nothing(out, True) as staging:
        (staging / "new").write_text("")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert sorted(tmp_path.iterdir()) == [*leftovers, out] and all((path / "mine").exists() for path in leftovers)


def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tracing, "LARGEST_FILE", 1000)
    model = tiny_model("resnet", **SMALL)
    network = tracing.trace_network(Network(model), None, 17)
    whole = tracing.joined(network, tracing.trace_results("semantic", model.config, 1, True, 17), {})
    run = session(whole, tmp_path / "model.onnx").run
    assert (tmp_path / "model.onnx.data").stat().st_size > (tmp_path / "model.onnx").stat().st_size
    sizes = {"image_size": np.array([64, 64]), "target_size": np.array([64, 64])}
    assert largest_difference(model, lambda names, feed: run(names, feed | sizes), 1, 64, 64) < 1e-4


def test_settings_that_do_not_fit_are_named(decided, processor, tmp_path):
    for change, words in (
        ({"size": (100, 128)}, r"size=\(100, 128\): height and width must be multiples of 32, such as 96 128"),
        ({"dtype": "int4"}, "dtype='int4': must be one of float32, float16, int8"),
        ({"opset": 16}, "opset=16: must be from 17 to 20"),
        ({"task": "depth"}, "task='depth': must be one of"),
        ({"dtype": "int8"}, "dtype='int8' needs calibration"),
    ):
        with pytest.raises(ExportError, match=words):
            export_model(decided, processor, tmp_path / "out", **change)
    other = type(processor)(size_divisor=20)
    with pytest.raises(ExportError, match="size_divisor=20 of the processor: the graph takes multiples of 32"):
        export_model(decided, other, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
