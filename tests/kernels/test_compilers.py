"""Compilers and systems that lack something get the kernels without it: setup.py tries one after the other."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mask2former_hf.kernels import cpu

FOLDER = Path(cpu.__file__).parent


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("without", ["AMX", "BF16"])
def test_kernels_of_bfloat16_are_complete_without(without):
    sources = [path for path in FOLDER.glob("*_cpu.cpp") if "BF16_TARGET" in path.read_text(encoding="utf-8")]
    words = ["c++", "-std=c++17", "-fsyntax-only", "-w", f"-DMSDA_NO_{without}", *sources]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
