import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import SHARED

from mask2former_hf.training.memory import bytes_per_pixel


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def layers_are_counted_once(monkeypatch):
    """What `memory.bytes_per_pixel` counts takes a third of a tiny run, and is the same for models of one kind."""
    monkeypatch.setattr("mask2former_hf.training.memory.bytes_per_pixel", _bytes_per_pixel)


KNOWN = {}


def _bytes_per_pixel(model):
    kind = type(model), model.config.to_json_string(), tuple(p.requires_grad for p in model.parameters())
    if kind not in KNOWN:
        KNOWN[kind] = bytes_per_pixel(model)
    return KNOWN[kind]


@pytest.fixture(autouse=True)
def runs_draw_nothing(monkeypatch):
    """Reports take a second of each run; those of runs that a fixture makes for a module, before this, are drawn."""
    monkeypatch.setattr("mask2former_hf.training.run_report.has_matplotlib", lambda: False)


def pytest_collection_finish():
    """What is imported and collected stays: the many collections that Accelerate asks for need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or Triton's bindings report at exit what was not let go


def pytest_report_header():
    found = "found" if SHARED.is_dir() else "missing: tests against the original's tensors are skipped"
    return f"reference data {SHARED.name}/ beside the project: {found}"
