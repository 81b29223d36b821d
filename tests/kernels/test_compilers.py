"""Compilers and systems that lack something get the kernels without it: setup.py tries one after the other."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mask2former_hf.kernels import cpu

FOLDER = Path(cpu.__file__).parent


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("without", ["AMX", "BF16"])
def test_products_are_complete_without(without):
    words = ["c++", "-std=c++17", "-fsyntax-only", "-w", f"-DMSDA_NO_{without}", FOLDER / "products_cpu.cpp"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
