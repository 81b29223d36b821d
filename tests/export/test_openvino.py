"""An export for OpenVINO runs in it; where it is installed, which it is not among what the tests install."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from exports import photo, run_without_torch
from PIL import Image

from mask2former_hf import Segmenter
from mask2former_hf.inference.exported import LOGITS, ExportedModel


def test_what_openvino_cannot_load_or_do_is_one_line(for_openvino, tmp_path):
    shutil.copytree(for_openvino / "logits", tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="device='cuda': an export runs in OpenVINO on the CPU"):
        ExportedModel(tmp_path, "cuda", runtime="openvino")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model.xml: openvino cannot load it \(Incorrect weights in bin file!\)"):
        Segmenter(tmp_path)
    (tmp_path / "model.xml").write_text("nodes")
    with pytest.raises(ValueError, match="model.xml: openvino cannot load it"):
        Segmenter(tmp_path)


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0"])
def test_openvino_runs_on_the_cpu_by_each_of_its_names(device, for_openvino):
    assert ExportedModel(for_openvino / "logits", device).runtime == "openvino"


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 4, 64, 64), (3, 64, 64)])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_pixels_that_no_graph_takes_are_refused(shape, runtime, for_openvino):
    exported = ExportedModel(for_openvino / "logits", runtime=runtime)
    with pytest.raises(ValueError, match=rf"pixel_values of {'x'.join(map(str, shape))}: must be \(B, 3, H, W\)"):
        exported.logits(np.zeros(shape, np.float32))


def test_openvino_keeps_the_networks_of_the_latest_shapes(for_openvino):
    graph = ExportedModel(for_openvino / "logits").graph
    graph.kept = 2
    shapes = [(1, 3, 32, 32), (1, 3, 32, 64), (1, 3, 64, 32)]
    for shape in (shapes[0], shapes[1], shapes[0], shapes[2]):
        graph.run(LOGITS, {"pixel_values": np.zeros(shape, np.float32)})
    assert list(graph._compiled) == [shapes[0], shapes[2]]


def test_openvino_gives_each_thread_its_own_results(for_openvino):
    exported = ExportedModel(for_openvino / "logits")
    pixels = [np.full((1, 3, 64, 64), value, np.float32) for value in (-1, 0, 1, 2)]
    expected = [exported.logits(x) for x in pixels]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(exported.logits, pixels * 4))
    for ours, theirs in zip(found, expected * 4, strict=True):
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


RUN = """
Blocked.names.add("onnxruntime")
import json
from mask2former_hf import Segmenter
found = [Segmenter(folder)(sys.argv[1], threshold=0.1) for folder in sys.argv[2:]]
print(json.dumps([[result.map.tolist(), result.to_coco()] for result in found]))
"""


def test_segmenter_runs_it_where_neither_torch_nor_onnxruntime_can_be_imported(for_openvino, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    folders = [for_openvino / "logits", for_openvino / "panoptic"]
    done = run_without_torch(RUN, tmp_path / "photo.png", *folders)
    for (ids, entries), folder in zip(json.loads(done.stdout), folders, strict=True):
        expected = Segmenter(folder)(photo(), threshold=0.1)
        assert (np.array(ids) == expected.map).all()
        assert entries == json.loads(json.dumps(expected.to_coco())) and entries
