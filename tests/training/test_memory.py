"""What cannot work on a machine is refused before anything is written; what can is not."""

from types import SimpleNamespace

import pytest
import torch

import mask2former_hf.training.memory as memory
from mask2former_hf import TrainingRun, TrainingSettings
from mask2former_hf.data.scenes import Scenes
from mask2former_hf.training.backbones import new_model

GIGABYTE = 2**30


@pytest.fixture(autouse=True)
def layers_are_counted_once():
    """Not here."""


@pytest.fixture(scope="module")
def tiny():
    return new_model("tiny", Scenes("val").classes, "panoptic", True)


def settings(output="run", **changes):
    given = {"data": "scenes", "train_limit": 5, "val_limit": 2, "backbone": "tiny", "crop": 64, "steps": 1}
    return TrainingSettings(**given | {"batch_size": 2, "cpu": True, "output": output} | changes)


def step_bytes(model, side, batch):
    """What a step keeps for its backward pass, by torch's own account."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    masks = [torch.ones(3, side, side, dtype=torch.uint8)] * batch
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(
            pixel_values=torch.randn(batch, 3, side, side),
            mask_labels=masks,
            class_labels=[torch.arange(3)] * batch,
        )
    return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize("side, batch", [(128, 2), (256, 2), (384, 1)])
def test_the_estimate_is_right_within_a_factor_of_two(tiny, side, batch):
    estimate = memory.bytes_per_pixel(tiny.train()) * batch * side**2
    assert estimate / 2 < step_bytes(tiny, side, batch) < 2 * estimate


def test_counting_leaves_the_model_as_it_is(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    memory.bytes_per_pixel(tiny)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert not any(part._forward_hooks for part in tiny.modules())


def test_the_largest_batch_and_the_largest_image_that_fit_are_named(tiny, monkeypatch):
    pixel, fixed = memory.bytes_per_pixel(tiny), 16 * sum(p.numel() for p in tiny.parameters())
    monkeypatch.setattr(memory, "machine_memory", lambda device: int(fixed + 6.5 * 64**2 * pixel))
    device = torch.device("cpu")
    memory.check_memory(settings(batch_size=8), tiny, 64, device)  # unlikely, but not clearly impossible
    memory.check_memory(settings(batch_size=100, gradient_checkpointing=True, bf16=True), tiny, 64, device)
    with pytest.raises(ValueError, match="the largest batch that fits is batch_size=6"):
        memory.check_memory(settings(batch_size=100), tiny, 64, device)
    with pytest.raises(ValueError, match="the largest that does is about crop=160"):
        memory.check_memory(settings(), tiny, 640, device)
    monkeypatch.setattr(memory, "machine_memory", lambda device: 2**20)
    with pytest.raises(ValueError, match="the model alone does not fit"):
        memory.check_memory(settings(), tiny, 64, device)
    monkeypatch.setattr(memory, "machine_memory", lambda device: None)
    memory.check_memory(settings(), tiny, 10**7, device)


def test_a_container_has_the_memory_that_it_is_given(tmp_path, monkeypatch):
    limits = [tmp_path / "memory.max", tmp_path / "missing"]
    monkeypatch.setattr(memory, "CGROUPS", limits)
    limits[0].write_text("max\n")
    whole = memory.machine_memory(torch.device("cpu"))
    assert GIGABYTE < whole < 2**50
    limits[0].write_text(f"{GIGABYTE}\n")
    assert memory.machine_memory(torch.device("cpu")) == GIGABYTE
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=7))
    assert memory.machine_memory(torch.device("cuda")) == 7


def test_an_image_that_no_machine_holds_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=2 with images of 30000 x .* GiB on cpu; .* about crop=\d+"):
        TrainingRun(settings(tmp_path / "run", crop=30_000), show=False)
    with pytest.raises(ValueError, match="crop=10000000: must be at most 32768"):
        TrainingRun(settings(tmp_path / "run", crop=10**7), show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 4}], ids=str)
def test_a_batch_norm_with_one_value_is_refused_also_in_the_last_batch(changes, tmp_path):
    with pytest.raises(ValueError, match="batch norm needs more than one value"):
        TrainingRun(settings(tmp_path / "run", crop=32, **changes), show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"batch_size": 5}, {"freeze_batch_norm": True}, {"crop": 33}], ids=str)
def test_what_is_advised_instead_trains(changes, tmp_path):
    given = {"crop": 32, "batch_size": 1, "epochs": 1, "steps": None} | changes
    TrainingRun(settings(tmp_path / "run", **given), show=False).train()
