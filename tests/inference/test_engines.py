"""The examples of engines for many machines, run by the engines themselves on this one.

Ray and Spark are no dependencies: their tests are skipped where they are not installed (`pip install ray pyspark`, and
Java 17 for Spark). They take half a minute each: `pytest tests/inference/test_engines.py`.
"""

import sys

import example_worker
import numpy as np
import pytest
from helpers import sure_checkpoint
from PIL import Image

from mask2former_hf import Segmenter

AT = {"threshold": 0.1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = sure_checkpoint(tmp_path_factory, task="instance", num_queries=20)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six images; the third is damaged."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """What the engines' processes find."""
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def check(output, checkpoint, photos):
    """The table has the rows of every image alone, and one for the image that cannot be read."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(output).to_pylist()
    found = {}
    for row in rows:
        found.setdefault(row["image_id"].rsplit("/", 1)[-1], []).append(row)
    assert [row["problem"] is None for row in found.pop("2.png")] == [False]
    segmenter = Segmenter(checkpoint, device="cpu")
    assert set(found) == {f"{number}.png" for number in range(6)} - {"2.png"}
    for name, own in found.items():
        expected = segmenter(photos / name, **AT).to_rows("", "")
        assert len(own) == len(expected) > 0
        for ours, theirs in zip(own, expected, strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert all(ours[key] == theirs[key] for key in ("label", "height", "width"))
            assert np.abs(np.subtract(ours["box"], theirs["box"])).max() <= 1


def test_datasets_with_two_processes(checkpoint, photos, tmp_path):
    pytest.importorskip("datasets")
    example = example_worker.load("segment_with_datasets")
    example.main(checkpoint, f"{photos}/*.png", str(tmp_path / "segments.parquet"), num_proc=2, **AT)
    check(tmp_path / "segments.parquet", checkpoint, photos)


def test_ray_data(checkpoint, photos, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    example = example_worker.load("segment_with_ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        example.main(checkpoint, str(photos), str(tmp_path / "segments"), **AT)
    finally:
        ray.shutdown()
    check(tmp_path / "segments", checkpoint, photos)


def test_spark(checkpoint, photos, tmp_path):
    sql = pytest.importorskip("pyspark.sql")
    session = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", False).getOrCreate()
    example = example_worker.load("segment_with_spark")
    try:
        example.main(checkpoint, f"{photos}/*.png", str(tmp_path / "segments"), **AT)
    finally:
        session.stop()
    check(tmp_path / "segments", checkpoint, photos)
