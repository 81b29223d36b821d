import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes of two threads each would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from helpers import SHARED


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def runs_draw_nothing(monkeypatch):
    """Reports take a second of each run; those of runs that a fixture makes for a module, before this, are drawn."""
    monkeypatch.setattr("mask2former_hf.training.run_report.has_matplotlib", lambda: False)


def pytest_report_header():
    found = "found" if SHARED.is_dir() else "missing: tests against the original's tensors are skipped"
    return f"reference data {SHARED.name}/ beside the project: {found}"
