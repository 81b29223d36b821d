"""A few seconds of each fuzzing target; minutes: `python tests/fuzz/run.py --minutes 10`.

What fuzzing found, made small, stands with the tests of the module that it was found in: of checkpoints in
tests/conversion/test_restricted_pickle.py, of the kernel in tests/kernels/test_problem.py, of run lengths below, of
annotations in tests/data/test_hostile_files.py.
"""

import shutil
from pathlib import Path

import pytest
from processes import python

from mask2former_hf.data.rle import read_counts

FOLDER = Path(__file__).parent


def fuzz(target: str, count: int, folder: Path) -> str:
    """In a process of its own, because a finding may be a crash."""
    done = python(FOLDER / "run.py", "--target", target, "--count", count, "--seed", 0, "--folder", folder)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-5000:]}"
    return done.stdout.strip()


def test_2000_mutated_checkpoints_load_or_are_refused_and_do_nothing_else(tmp_path):
    assert fuzz("checkpoints", 2000, tmp_path).startswith("checkpoints: 2000 mutated files, ")


def test_mutated_run_lengths_are_refused_or_equal_the_coco_package(tmp_path):
    assert fuzz("run_lengths", 2000, tmp_path).startswith("run_lengths: 2000 mutated, ")


def test_damaged_annotation_files_are_read_or_refused_in_one_line_that_names_them(tmp_path):
    assert fuzz("annotations", 1000, tmp_path).startswith("annotations: 1000 damaged files, ")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_kernel_touches_no_byte_outside_the_tensors_and_computes_nothing_undefined(tmp_path):
    said = fuzz("kernel", 80, tmp_path)
    if said.startswith("kernel: no g++"):
        pytest.skip("the compiler has no sanitizers")
    assert said.startswith("kernel: 80 problems under the sanitizers; in Python ")


@pytest.mark.parametrize("text", ["045V", "62_", "2g", b"011000\x95!", "o"])
def test_run_lengths_that_stop_inside_a_number_are_refused(text):
    """Found by fuzzing: the runs before the last one fill the mask."""
    sizes = {"045V": [9, 1], "62_": [4, 2], "2g": [1, 2], b"011000\x95!": [1, 5], "o": [0, 3]}
    with pytest.raises(ValueError, match="stops inside a number"):
        read_counts({"size": sizes[text], "counts": text}, "fuzz")
