"""What makes the host wait for a GPU, seen without one: operations whose result the host must look at to go on.

`tests/model/test_on_gpu.py` counts the waits themselves; copies to the host by name (`.cpu()`) are seen only there.
"""

import pytest
import torch
from helpers import padded_batch, random_targets, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former_hf.model import criterion
from mask2former_hf.model.swin_speed import GatheredSwinLayer


class HostReads(TorchDispatchMode):
    """Names of the operations that read values of tensors on the host or give outputs whose size depends on them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_watch_sees_what_it_is_for():
    x = torch.randn(4)
    with HostReads() as reads:
        bool(x.sum() > 0), x[x > 0], x.nonzero(), float(x[0])
    assert reads.found == ["_local_scalar_dense", "index", "nonzero", "_local_scalar_dense"]


@pytest.fixture(autouse=True)
def blocks_as_on_devices(monkeypatch):
    """Swin's blocks for CPUs keep an index for each size of image, which they work out on the CPU."""
    monkeypatch.setattr(GatheredSwinLayer, "_gathers", lambda self, x: False)


@pytest.mark.parametrize("backbone", ["swin", "resnet", "convnext"])
def test_inference_reads_nothing_from_the_device(backbone):
    model, (pixels, _) = tiny_model(backbone), padded_batch([(50, 80)])
    with torch.inference_mode(), HostReads() as reads:
        model(pixels)
    assert reads.found == []


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_a_training_step_reads_the_matching_costs_alone(backbone, monkeypatch):
    monkeypatch.setattr(criterion, "check_labels", lambda *arguments: None)  # looks at values on the host alone
    model = tiny_model(backbone).train()
    masks, labels = random_targets((3, 2), (64, 96))
    pixels, copies = torch.randn(2, 3, 64, 96), []
    assign = criterion.assign
    monkeypatch.setattr(criterion, "assign", lambda *arguments: copies.append(1) or assign(*arguments))
    with HostReads() as reads:
        model(pixels, mask_labels=masks, class_labels=labels).loss.backward()
    assert reads.found == [] and copies == [1]
