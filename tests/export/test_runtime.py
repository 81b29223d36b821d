"""An exported folder gives the checkpoint's results by every door, also where torch cannot be imported."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exports import photo, run_without_torch
from helpers import SHARED
from PIL import Image

from mask2former_hf import Mask2FormerImageProcessor, Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.data.annotations import decode_mask
from mask2former_hf.export import tracing
from mask2former_hf.inference import runtimes
from mask2former_hf.inference.exported import LOGITS, ArrayProcessor, ExportedModel, _check_finite
from mask2former_hf.inference.run_folder import RECORD
from mask2former_hf.model.argument_checks import check_logits

pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
TASKS = ("panoptic", "instance", "semantic")
PANOPTIC = SHARED / "data" / "coco_panoptic"


def assert_same(ours, theirs):
    assert ours.size == theirs.size and ours.task == theirs.task
    assert [s.label_id for s in ours.segments] == [s.label_id for s in theirs.segments]
    assert (ours.map == theirs.map).mean() >= 0.999
    for one, other in zip(ours.segments, theirs.segments, strict=True):
        assert one.label == other.label and one.area == pytest.approx(other.area, rel=0.01, abs=2)
        assert one.score is None or one.score == pytest.approx(other.score, abs=1e-4)
        assert np.abs(np.subtract(one.box, other.box)).max() <= 2
    assert ours.masks.shape == theirs.masks.shape and (ours.masks != theirs.masks).sum() <= 0.001 * ours.masks.size


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
@pytest.mark.parametrize("task", TASKS)
def test_exports_give_the_results_of_the_checkpoint(task, runtime, checkpoint, request):
    if runtime == "openvino":
        folder = request.getfixturevalue("for_openvino")
        folders = folder / "logits", folder / task
    else:
        folders = request.getfixturevalue("exported"), request.getfixturevalue("end_to_end") / task
    expected = Segmenter(checkpoint, task=task, device="cpu")
    lenient, others = {"threshold": 0.0}, {"threshold": 0.3, "mask_threshold": 0.4, "stuff_label_ids": [0]}
    if task == "semantic":
        lenient, others = {}, {"stuff_label_ids": [0]}
    for folder in folders:
        segmenter = Segmenter(folder, task=task)
        assert segmenter.model.runtime == runtime
        segmenter.model.graph.often = (
            1  # in OpenVINO the first run is of the network for all shapes, others of its own
        )
        for image in (photo(), photo((90, 60), 1), photo((50, 51), 2)):
            for numbers in ({}, lenient, others):
                assert_same(segmenter(image, **numbers), expected(image, **numbers))
    assert len(expected(photo(), **lenient).segments) > 1


@pytest.mark.parametrize("task", [None, "panoptic"])
@pytest.mark.parametrize("number, value", [(0, np.nan), (0, np.inf), (1, np.nan), (1, np.inf), (1, -np.inf)])
def test_logits_that_are_not_finite_are_refused_as_those_of_the_checkpoint(
    task, number, value, exported, end_to_end, monkeypatch
):
    run, name = runtimes.OnnxGraph.run, LOGITS[number]

    def broken(graph, names, feed):
        found = run(graph, names, feed)
        if name in names:
            found[list(names).index(name)].flat[0] = value
        return found

    segmenter = Segmenter(exported if task is None else end_to_end / task)
    monkeypatch.setattr(runtimes.OnnxGraph, "run", broken)
    with pytest.raises(
        ValueError, match=f"{('class', 'mask')[number]}_logits has values that are not numbers, or are"
    ):
        segmenter(photo())


def test_logits_of_no_query_are_taken_as_those_of_the_checkpoint():
    shapes = (2, 0, 4), (2, 0, 8, 8)
    check_logits(*map(torch.zeros, shapes))
    _check_finite(*map(np.zeros, shapes))


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", "[]", "config.json: has no fields"),
        ("config.json", "null", "config.json: has no fields"),
        ("config.json", '{"id2label": 5}', "config.json: id2label must have a name for each label"),
        ("config.json", '{"id2label": {"0": "cat"}}', "config.json: has 1 classes, but model.onnx was made for 5"),
        ("export.json", "[]", "export.json: has no fields"),
        ("panoptic.onnx", "nodes", "panoptic.onnx: onnxruntime cannot load it"),
    ],
)
def test_files_that_do_not_fit_are_one_line(name, content, words, exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        Segmenter(folder)


def test_the_rules_of_another_export_are_refused(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    config = SimpleNamespace(num_queries=3, num_labels=2, common_stride=4)
    tracing.save(tracing.trace_results("semantic", config, 6, True, 17), folder / "semantic.onnx")
    with pytest.raises(ValueError, match=r"config.json: has 5 classes, but semantic.onnx was made for 2"):
        Segmenter(folder, task="semantic")


def test_many_images_come_from_an_export_as_from_a_checkpoint(checkpoint, exported, end_to_end, monkeypatch):
    images = [photo(), photo((90, 60), 1), photo(seed=2)]
    segmenter, shapes = Segmenter(exported), []
    logits = segmenter.model.logits
    monkeypatch.setattr(segmenter.model, "logits", lambda pixels: shapes.append(pixels.shape[0]) or logits(pixels))
    results = segmenter(images, batch_size=3)
    for ours, theirs in zip(results, Segmenter(checkpoint, device="cpu")(images), strict=True):
        assert_same(ours, theirs)
    assert shapes == [2, 1]  # images of one canvas go through the network together
    with pytest.raises(ValueError, match="batch_size=3: the graph gives panoptic results of one image at a time"):
        list(Segmenter(end_to_end / "panoptic")(images, batch_size=3))


def test_the_runtime_is_the_one_that_a_folder_is_for_and_that_is_there(exported, tmp_path, monkeypatch, caplog):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.xml").write_text("nodes")
    present = {"onnxruntime", "openvino"}

    def import_module(name):
        if name not in present:
            raise ImportError(f"No module named {name!r}")
        return sys.modules.get(name)

    monkeypatch.setattr(runtimes, "import_module", import_module)
    chosen = [runtimes.runtime_of(*own) for own in ((exported, None), (tmp_path, None), (tmp_path, "cuda:1"))]
    assert chosen == ["onnxruntime", "openvino", "onnxruntime"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert runtimes.runs_on_cuda(exported) and not runtimes.runs_on_cuda(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(runtimes, "import_module", import_module)
    present.remove("openvino")
    assert ExportedModel(tmp_path).runtime == ExportedModel(tmp_path).runtime == "onnxruntime"
    assert caplog.text.count("openvino is not installed; its model.onnx runs in onnxruntime") == 1
    present.clear()
    with pytest.raises(ImportError, match="an exported folder needs openvino: pip install openvino"):
        ExportedModel(tmp_path)


RUNS = """
import json
from mask2former_hf import Segmenter
segmenters = [Segmenter(folder) for folder in sys.argv[2:]]
found = [s(sys.argv[1], **({} if s.task == "semantic" else {"threshold": 0.1})) for s in segmenters]
found[0].plot(sys.argv[1]).save(sys.argv[1] + ".plot.png")
print(json.dumps([[result.map.tolist(), result.to_coco()] for result in found]))
Blocked.names.remove("tqdm")
from mask2former_hf.cli.main import main
command = ["predict", sys.argv[1], "--threshold", "0.1", "--output", sys.argv[1] + ".out", "--model"]
assert main([*command, sys.argv[2]]) == 0
assert main([*command, "a checkpoint", "--overwrite"]) == 2
assert main(["export", "a checkpoint", "--output", "b"]) == 2
"""


def test_segmenter_and_predict_run_where_torch_cannot_be_imported(exported, end_to_end, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    folders = [exported, *(end_to_end / task for task in TASKS)]
    done = run_without_torch(RUNS, tmp_path / "photo.png", *folders)
    for (ids, entries), folder in zip(json.loads(done.stdout.splitlines()[0]), folders, strict=True):
        segmenter = Segmenter(folder)
        expected = segmenter(photo(), **({} if segmenter.task == "semantic" else {"threshold": 0.1}))
        assert (np.array(ids) == expected.map).all()
        assert entries == json.loads(json.dumps(expected.to_coco())) and entries
    written = json.loads((tmp_path / "photo.png.out" / "panoptic.json").read_text())["annotations"][0]
    expected = Segmenter(exported)(photo(), threshold=0.1)
    assert [entry["category_id"] for entry in written["segments_info"]] == [s.label_id for s in expected.segments]
    assert "--model a checkpoint: is no export, and checkpoints need torch" in done.stderr
    assert "export: No module named 'torch'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 64, "width": 96}, "resample": 3},
        {"size": {"max_height": 64, "max_width": 64}, "pad_size": {"height": 64, "width": 64}},
        {"do_resize": False, "do_normalize": False},
        {"do_rescale": False, "image_mean": 0.5, "image_std": [3, 2, 1]},
    ],
)
def test_pixels_are_those_of_the_image_processor(settings, tmp_path):
    processor = Mask2FormerImageProcessor(**{"size": {"shortest_edge": 70, "longest_edge": 100}, **settings})
    processor.save_pretrained(tmp_path)
    ours = ArrayProcessor(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    for image in (noise, noise.transpose(1, 0, 2)):
        expected = processor(Image.fromarray(image), return_tensors="np")
        pixels, size = ours(image)
        np.testing.assert_allclose(pixels, expected["pixel_values"], rtol=0, atol=1e-6 * np.abs(pixels).max())
        assert expected["pixel_mask"][0, : size[0], : size[1]].all() and expected["pixel_mask"].sum() == np.prod(size)


def test_a_canvas_that_is_too_small_is_named_with_its_sides():
    fields = Mask2FormerImageProcessor(do_resize=False, pad_size={"height": 32, "width": 64}).to_dict()
    with pytest.raises(ValueError, match=r"pad_size={'height': 32, 'width': 64} must give .*hold the largest image"):
        ArrayProcessor(fields)(photo())


def test_what_an_export_cannot_do_is_refused(exported, end_to_end, tmp_path):
    with pytest.raises(ValueError, match="tta=True: .* is an export; use its checkpoint"):
        Segmenter(exported, tta=True)
    with pytest.raises(ValueError, match="task='instance': the graph gives panoptic results alone"):
        Segmenter(end_to_end / "panoptic", task="instance")
    with pytest.raises(ValueError, match="top_k=7: an exported graph looks at 100"):
        Segmenter(exported, task="instance")(photo(), top_k=7)
    with pytest.raises(ValueError, match="overlap_threshold=0.5: exported graphs drop no instance"):
        Segmenter(exported, task="instance")(photo(), overlap_threshold=0.5)
    with pytest.raises(ValueError, match="device='abacus': onnxruntime has"):
        Segmenter(exported, device="abacus")
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: .*; the exported folder is not complete"):
        Segmenter(tmp_path)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"size_divisor": 20}, "size_divisor=20, but the graph takes multiples of 32; set it to 32"),
        ({"pad_size": {"height": 100, "width": 128}}, "pad_size=[100, 128], but the graph takes multiples of 32"),
        ({"size": {}}, "preprocessor_config.json: size={}: must be lengths in pixels"),
        ({"image_std": None}, "preprocessor_config.json: image_std=None: must be a number, or 3 of them"),
        ({"image_std": [1, 0, 1]}, "none of them 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5]: must be a number, or 3 of them"),
        ({"do_resize": None}, "do_resize=None: must be true or false"),
        ({"resample": "bilinear"}, "resample='bilinear': must be a filter of Pillow, 0 to 5"),
        ({"rescale_factor": None}, "rescale_factor=None: must be a finite number"),
        (None, "No such file or directory; the exported folder is not complete"),
    ],
)
def test_a_processor_that_does_not_fit_the_graph_is_one_line(field, words, exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "copy")
    path = tmp_path / "copy" / "preprocessor_config.json"
    content = json.loads(path.read_text())
    path.unlink()
    if field is not None:
        path.write_text(json.dumps(content | field))
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    command = ["predict", str(tmp_path / "photo.png"), "--model", str(tmp_path / "copy")]
    assert main([*command, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_flags_that_nothing_would_read_are_refused(end_to_end, tmp_path, capsys):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    command = ["predict", str(tmp_path / "photo.png"), "--output", str(tmp_path / "out")]
    command += ["--model", str(end_to_end / "panoptic")]
    for flag, value, words in (
        ("--batch-size", "2", "--batch-size 2: the graph gives panoptic results of one image at a time"),
        ("--overlap", "0.3", "--overlap 0.3: only tiles overlap; add --tile"),
        ("--tile", "64", "is an export; use its checkpoint"),
    ):
        assert main([*command, flag, value]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", TASKS)
def test_predict_gives_the_same_with_the_export_as_with_the_checkpoint(task, checkpoint, exported, tmp_path):
    photos = [tmp_path / "patches.png"]
    Image.fromarray(photo()).save(photos[0])
    if PANOPTIC.is_dir():
        photos += sorted((PANOPTIC / "val").glob("*.jpg"))[: 3 if task == "panoptic" else 1]
    outputs = []
    for folder in (checkpoint, exported):
        outputs.append(tmp_path / folder.name)
        command = ["predict", *map(str, photos), "--model", str(folder), "--output", str(outputs[-1]), "--task", task]
        threshold = [] if task == "semantic" else ["--threshold", "0.1"]
        assert main([*command, *threshold, "--device", "cpu"]) == 0
    files = sorted(path.relative_to(outputs[0]) for path in outputs[0].rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(outputs[1]) for path in outputs[1].rglob("*") if path.is_file())
    for name in files:
        theirs, ours = (folder / name for folder in outputs)
        if name.name == RECORD:  # which names the model
            continue
        if name.suffix == ".json":
            assert_same_json(json.loads(ours.read_text()), json.loads(theirs.read_text()))
        elif name.parts[0] == task:
            maps = [np.asarray(Image.open(path)) for path in (ours, theirs)]
            assert (maps[0] == maps[1]).mean() > 0.999
            assert len(np.unique(maps[0])) > 1 or name.stem != "patches"


def assert_same_json(ours, theirs):
    """The same words and numbers; areas, scores and sides of boxes as close as 1 pixel in 1000 keeps them."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            if key == "segmentation":
                one, other = (decode_mask(value[key], tuple(value[key]["size"]), "masks") for value in (ours, theirs))
                assert (one != other).mean() < 0.001
            else:
                assert_same_json(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same_json(one, other)
    elif isinstance(ours, str):
        assert ours == theirs
    else:
        assert ours == pytest.approx(theirs, rel=0.01, abs=2)
