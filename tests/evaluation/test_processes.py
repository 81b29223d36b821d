"""Processes of a launcher: the group that begins in a run ends with it, also when one of them fails."""

import pytest
import torch
from processes import Python, group_of_two, two_pythons

from mask2former_hf.evaluation.processes import process_group, process_rank

BEGIN = {"inside": "process_group('gloo')", "by what runs in it": "process_group()"}


SCRIPT = """
import os, pathlib, sys
import torch
from mask2former_hf.evaluation.processes import process_group
rank = os.environ["RANK"]
try:
    with {begin}:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        torch.distributed.all_reduce(torch.ones(3))
        {block}
finally:
    group = "open" if torch.distributed.is_initialized() else "ended"
    (pathlib.Path(sys.argv[1]) / rank).write_text(group)
"""


@pytest.mark.parametrize("begin", BEGIN.values(), ids=BEGIN)
def test_a_group_that_begins_in_a_run_ends_with_it(begin, tmp_path):
    for done in two_pythons("-c", SCRIPT.format(begin=begin, block="pass"), tmp_path):
        assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["ended", "ended"]


def test_a_process_that_fails_waits_for_nobody(tmp_path):
    """The other one is in a barrier, and would be for half an hour."""
    with group_of_two() as group:
        script = SCRIPT.format(begin=BEGIN["inside"], block="1 / int(rank)")
        first, second = (Python("-c", script, tmp_path, **variables) for variables in group)
        done = first.wait()
        second.kill()
        second.wait()
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
