"""Other forms of an export: 8 bits, OpenVINO, PyTorch programs; and the command line."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from exports import SMALL, family_model, photo
from helpers import SUPPORT, tiny_model
from PIL import Image

from mask2former_hf import Segmenter, export_model, use_kernel
from mask2former_hf.cli import verify
from mask2former_hf.cli.main import main
from mask2former_hf.export import errors, programs
from mask2former_hf.inference.exported import LOGITS, ExportedModel

pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")


def test_8_bits_stay_close_to_the_checkpoint(processor, tmp_path):
    photos, model = tmp_path / "photos", family_model("resnet")
    photos.mkdir()
    for n in range(4):
        Image.fromarray(photo(seed=n)).save(photos / f"{n}.png")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    command = ["export", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "out"), "--dtype", "int8"]
    assert main([*command, "--images", str(photos)]) == 0
    nodes = pytest.importorskip("onnx").load(tmp_path / "out" / "model.onnx").graph.node
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in nodes}
    exported = ExportedModel(tmp_path / "out")
    pixels, _ = exported.processor(photo())
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels))
    for name, ours in zip(LOGITS, exported.logits(pixels), strict=True):
        assert np.corrcoef(ours.ravel(), expected[name].numpy().ravel())[0, 1] > 0.9, name
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert 1e-4 < max(row[name] for row in report["differences"] for name in LOGITS)


def test_openvino_gives_the_checkpoints_logits_at_every_size(processor, tmp_path):
    pytest.importorskip("openvino", reason="its extra, [openvino], is not among what the tests install")
    report = export_model(family_model("swin"), processor, tmp_path / "out", openvino=True)
    assert len(report["openvino"]) == 3 and all(row[name] < 1e-4 for row in report["openvino"] for name in LOGITS)
    assert {"model.xml", "model.bin"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "README.md").read_text().count("| OpenVINO |") == 3
    operators = [node.get_type_name() for node in ExportedModel(tmp_path / "out").graph.network.get_ops()]
    assert operators.count("EmbeddingBagPackedSum") == SMALL["encoder_layers"] and "GridSample" not in operators


def test_openvino_multiplies_in_8_bits_where_the_graph_does(processor, tmp_path):
    pytest.importorskip("openvino", reason="its extra, [openvino], is not among what the tests install")
    calibration = [photo(seed=n) for n in range(4)]
    export_model(
        family_model("resnet"), processor, tmp_path / "out", dtype="int8", calibration=calibration, openvino=True
    )
    exported, there = (ExportedModel(tmp_path / "out", runtime=name) for name in ("openvino", "onnxruntime"))
    pixels, _ = exported.processor(photo())
    runs = [exported.logits(pixels) for _ in range(3)]
    for ours, again, theirs in zip(runs[0], runs[-1], there.logits(pixels), strict=True):
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9
        assert (ours == again).all()  # which a network compiled for one shape does not give
    operators = [op.get_rt_info() for op in exported.graph.network_for().get_runtime_model().get_ops()]
    kernels = [op["primitiveType"].astype(str) for op in operators if op["layerType"].astype(str) == "Convolution"]
    assert kernels and all(kernel.endswith("I8") for kernel in kernels)  # else it had unpacked them to float32


def test_the_exporter_of_transformers_takes_the_model_at_any_size():
    pytest.importorskip("onnxscript")
    exporting = pytest.importorskip("transformers.exporters.exporter_onnx")
    model = tiny_model("resnet", encoder_layers=1, decoder_layers=2, num_queries=4)
    inputs, config = {"pixel_values": torch.randn(2, 3, 64, 96)}, exporting.OnnxConfig(dynamic=True)
    with use_kernel("reference"):  # ONNX has no operator of our kernels
        exported = exporting.OnnxExporter().export(model, inputs, config=config)
    for size in ((2, 3, 64, 96), (1, 3, 128, 64)):
        pixels = torch.randn(size)
        outputs = exported(pixel_values=pixels)
        with torch.no_grad():
            expected = model(pixels)
        for name in LOGITS:
            torch.testing.assert_close(torch.as_tensor(outputs[name]), expected[name], rtol=1e-4, atol=1e-4)


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch):
    def fails(program, package_path):
        raise RuntimeError("C++ compile error\ncommand: ...")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(errors.ExportError, match=r"ahead of time \(C\+\+ compile error\); name a C\+\+ compiler"):
        programs._compile(None, tmp_path / "model_compiled.pt2")


def test_a_program_runs_from_its_file(checkpoint, decided, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    command = ["export", str(checkpoint), "--output", str(tmp_path / "out"), "--to", "torch"]
    assert main([*command, "--size", "64", "96"]) == 0
    assert not (tmp_path / "out" / "model_compiled.pt2").exists()
    pixels, program = torch.randn(1, 3, 64, 96), torch.export.load(tmp_path / "out" / "model.pt2")
    assert not any("mask2former" in str(node.target) for node in program.graph.nodes)  # it runs without this package
    fields = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert fields["pad_size"] == {"height": 64, "width": 96}
    outputs = program.module()(pixels)
    with torch.no_grad():
        expected = decided(pixels)
    for name, ours in zip(LOGITS, outputs, strict=True):
        torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "tensorflow"], "--to tensorflow: must be one of onnx, openvino, torch"),
        (["--size", "100", "128"], "--size (100, 128): height and width must be multiples of 32, such as 96 128"),
        (["--opset", "11"], "--opset 11: must be from 17 to 20"),
        (["--task", "depth"], "--task depth: must be one of"),
        (["--dtype", "int8"], "--dtype int8 needs --images"),
        (["--images", "photo.png"], "--images are for --dtype int8"),
        (["--to", "torch"], "--size 640 640"),
        (["--to", "torch", "--size", "64", "64", "--task", "panoptic"], "--task panoptic: a program of --to torch"),
        (["--to", "torch", "--size", "64", "64", "--opset", "17"], "--opset 17: is of ONNX; leave it out"),
    ],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, capsys, arguments, message):
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_install_line(checkpoint, tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(errors, "import_module", missing)
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "out")]) == 2
    assert "pip install onnx onnxruntime" in capsys.readouterr().err


def test_folders_that_cannot_be_written_are_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "file" / "out")]) == 2
    assert "file" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    command = ["export", str(checkpoint), "--output", str(tmp_path / "full")]
    assert main([*command, "--overwrite"]) == 2
    assert "is no export that could be replaced; name another place" in capsys.readouterr().err
    (tmp_path / "full" / "export.json").write_text("")
    assert main(command) == 2
    assert "exists already; name another place, or add --overwrite" in capsys.readouterr().err


def test_verify_measures_an_export_beside_its_checkpoint(checkpoint, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "default_device", lambda: "cuda")  # which the runtime has not: both run on the CPU
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    path = tmp_path / "report.json"
    command = ["verify", str(checkpoint), "--runtime", str(exported), "--repeats", "1"]
    assert main([*command, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["equal"] and report["mask_logits_difference"] < 1e-4 and report["seconds_stock"] > 0
    assert report["device"] == "cpu" and "onnxruntime 1." in report["versions"]
    assert "s in the export (onnxruntime)" in capsys.readouterr().out
    assert main([*command[:2], "--runtime", str(tmp_path)]) == 2
    assert "no folder of an export; mask2former-hf export writes one" in capsys.readouterr().err
    assert main([*command, "--data-limit", "3"]) == 2
    assert "--data-limit 3: is of a data set; name its kind with --data" in capsys.readouterr().err


def test_the_example_for_other_languages_gives_the_map_of_segmenter(decided, end_to_end, tmp_path, capsys):
    path = SUPPORT.parents[1] / "examples" / "onnx_runtime.py"
    spec = importlib.util.spec_from_file_location("onnx_runtime_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    ids = example.main(end_to_end / "panoptic", tmp_path / "photo.png")
    expected = Segmenter(end_to_end / "panoptic")(photo())
    assert (ids == expected.map).mean() > 0.999
    assert len(capsys.readouterr().out.splitlines()) == len(expected.segments) == ids.max()
