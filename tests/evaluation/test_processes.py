"""Processes of a launcher: the group that begins in a run ends with it, also when one of them fails."""

import os
import subprocess
import sys

import pytest
import torch

import mask2former_hf
from mask2former_hf.evaluation.processes import process_group, process_rank

BEGIN = {"inside": "process_group('gloo')", "by what runs in it": "process_group()"}


def launch(tmp_path, begin, block):
    """Two processes that run `block` in a group, and at their end say in a file of their own whether it is open."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import atexit, os, pathlib, sys
import torch
from mask2former_hf.evaluation.processes import process_group
rank, folder = os.environ["RANK"], pathlib.Path({str(tmp_path)!r})
atexit.register(lambda: (folder / rank).write_text("open" if torch.distributed.is_initialized() else "ended"))
with {begin}:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    torch.distributed.all_reduce(torch.ones(3))
    {block}
""")
    source = os.path.dirname(os.path.dirname(mask2former_hf.__file__))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("begin", BEGIN.values(), ids=BEGIN)
def test_a_group_that_begins_in_a_run_ends_with_it(begin, tmp_path):
    done = launch(tmp_path, begin, "pass")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["ended", "ended"]


def test_a_process_that_fails_waits_for_nobody(tmp_path):
    """The other one is in a barrier, and would be for half an hour."""
    done = launch(tmp_path, BEGIN["inside"], "1 / int(rank)")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert (tmp_path / "0").read_text() == "ended"


def test_a_group_that_was_there_before_stays(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with process_group("gloo"):
            pass
        assert torch.distributed.is_initialized() and process_rank() == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_without_a_launcher_has_no_group():
    with process_group("gloo"):
        assert not torch.distributed.is_initialized()
