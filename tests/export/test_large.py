"""Weights that one file cannot hold lie beside the graph, and go with it everywhere. The limit is lowered for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exports import photo
from hub_endpoint import HubEndpoint

import mask2former_hf
from mask2former_hf import Segmenter, export_model
from mask2former_hf.cli.main import main
from mask2former_hf.export import tracing
from mask2former_hf.inference.exported import LOGITS

pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")

PUSHED = """
import json, sys
import numpy as np
from huggingface_hub import HfApi, snapshot_download
from mask2former_hf import Segmenter
api = HfApi()
api.create_repo("tester/large")
api.upload_folder(repo_id="tester/large", folder_path=sys.argv[1])
folder = snapshot_download("tester/large")
print(json.dumps([folder, Segmenter(folder)(np.load(sys.argv[2]), threshold=0.1).map.tolist()]))
"""


@pytest.fixture(scope="module")
def large(decided, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "large"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "LARGEST_FILE", 100_000)
        report = export_model(decided, processor, folder)
    assert all(row[name] < 1e-4 for row in report["differences"] for name in LOGITS)
    return folder


def test_the_folder_has_the_weights_once_and_its_card_names_them(large, exported):
    data, graph, whole = large / "model.onnx.data", large / "model.onnx", exported / "model.onnx"
    sizes = [path.stat().st_size for path in (data, graph, whole)]
    assert sizes[0] > sizes[1] and sizes[0] + sizes[1] == pytest.approx(sizes[2], rel=0.1)
    assert "model.onnx.data" in (large / "README.md").read_text()
    assert "model.onnx.data" not in (exported / "README.md").read_text()
    assert not (large / "panoptic.onnx.data").exists()  # rules have no weights


def test_segmenter_and_verify_read_them(large, exported, checkpoint, capsys):
    assert (Segmenter(large)(photo(), threshold=0.1).map == Segmenter(exported)(photo(), threshold=0.1).map).all()
    command = ["verify", str(checkpoint), "--runtime", str(large), "--repeats", "1", "--device", "cpu"]
    assert main(command) == 0
    assert "equal within" in capsys.readouterr().out


def test_a_folder_without_them_is_one_line(large, tmp_path):
    shutil.copytree(large, tmp_path / "copy")
    (tmp_path / "copy" / "model.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"model.onnx: onnxruntime cannot load it .*model.onnx.data"):
        Segmenter(tmp_path / "copy")


def test_a_push_takes_them_and_the_hubs_cache_of_links_runs(large, tmp_path):
    np.save(tmp_path / "photo.npy", photo())
    with HubEndpoint() as hub:
        done = subprocess.run(
            [sys.executable, "-c", PUSHED, str(large), str(tmp_path / "photo.npy")],
            env=os.environ
            | hub.environment(tmp_path / "cache")
            | {"PYTHONPATH": str(Path(mask2former_hf.__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        published = hub.repositories["tester/large"].files()
    assert set(published) >= {path.name for path in large.iterdir()}
    folder, ids = json.loads(done.stdout.splitlines()[-1])
    assert (Path(folder) / "model.onnx.data").is_symlink()
    assert (np.array(ids) == Segmenter(large)(photo(), threshold=0.1).map).all()
