"""A signal that ends a command leaves nothing half-written, as Ctrl-C does."""

import os
import signal

import numpy as np
import pytest
from helpers import sure_checkpoint
from PIL import Image

from mask2former_hf.cli.main import main
from mask2former_hf.cli.signals import unwound_by_signals
from mask2former_hf.inference import many_images
from mask2former_hf.inference.run_folder import RECORD


def ends(*arguments):
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return sure_checkpoint(tmp_path_factory, task="panoptic", stuff_label_ids=[3, 4], num_queries=20)


def test_an_export_that_is_ended_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    from mask2former_hf.export import exporting

    monkeypatch.setattr(exporting, "trace_network", ends)
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "made" / "out")]) == 143
    assert "mask2former-hf export: ended by SIGTERM" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_prediction_that_is_ended_leaves_no_half_written_results(checkpoint, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.setattr(many_images, "write_result", ends)
    command = ["predict", str(tmp_path / "photo.png"), "--model", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main(command) == 143
    assert "0 of 1 shards are complete; the same command does the others" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [RECORD]


def test_a_second_signal_is_the_systems_and_an_ignored_one_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended, unwound_by_signals():
            signal.raise_signal(signal.SIGHUP)
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
                assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended.value.code == 143


def test_a_forked_worker_is_ended_by_the_signal_itself():
    with unwound_by_signals():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
