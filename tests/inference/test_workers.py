"""Batches and worker processes of a run over many images."""

import os

import pytest

from mask2former_hf.inference.photos import WAITING, in_batches
from mask2former_hf.inference.workers import WorkerDied, Workers


def test_images_of_one_canvas_come_together_and_none_waits_for_long():
    items = [("wide", 0), ("high", 1), ("wide", 2), ("wide", 3), ("high", 4), ("square", 5)]
    batches = list(in_batches(items, 2, lambda item: item[0]))
    assert batches == [[("wide", 0), ("wide", 2)], [("high", 1), ("high", 4)], [("wide", 3)], [("square", 5)]]
    drawn = []
    source = ((drawn.append(k), ("first" if k == 0 else f"{k}", k))[1] for k in range(100))
    assert next(in_batches(source, 3, lambda item: item[0])) == [("first", 0)] and len(drawn) == WAITING * 3


def test_a_worker_that_is_ended_from_outside_is_said_and_not_waited_for():
    workers = Workers(1)
    with pytest.raises(WorkerDied, match="a worker process was ended from outside"):
        workers.result(workers.submit(os._exit, 9))
    workers.stop()
