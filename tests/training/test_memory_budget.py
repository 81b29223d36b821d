"""A step within a budget of memory, checked by torch's own account of what is kept for the backward pass."""

import copy
import pickle

import pytest
import torch
from helpers import random_targets, tiny_model

from mask2former_hf import TrainingRun, TrainingSettings
from mask2former_hf.training.activations import BudgetTooSmall, blocks_of, choose, compute_again, measure
from mask2former_hf.training.memory_budget import GB


class Kept:
    """Bytes of the tensors that autograd has in its keeping, and the most of a time; parameters do not count."""

    def __init__(self, model):
        self.owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.counts, self.now, self.peak = {}, 0, 0

    def change(self, storage, by: int):
        pointer = storage.data_ptr()
        if pointer in self.owned:
            return
        count = self.counts[pointer] = self.counts.get(pointer, 0) + by
        if (count, by) == (1, 1) or count == 0:
            self.now += by * storage.nbytes()
        self.peak = max(self.peak, self.now)

    def __enter__(self):
        kept = self

        class Packed:
            def __init__(self, tensor):
                self.tensor = tensor
                kept.change(tensor.untyped_storage(), 1)

            def __del__(self):
                kept.change(self.tensor.untyped_storage(), -1)

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def gradients_and_peak(model, batch):
    torch.manual_seed(3)
    with Kept(model) as kept:
        model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients, kept.peak


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    masks, labels = random_targets((3, 2), (96, 128))
    return {"pixel_values": torch.randn(2, 3, 96, 128), "mask_labels": masks, "class_labels": labels}


@pytest.mark.parametrize("backbone", ["swin", "resnet", "convnext"])
def test_what_is_kept_stays_within_the_budget_and_gradients_stay(backbone, batch):
    model = tiny_model(backbone).train()
    measured = measure(model, batch)
    blocks = frozenset(block.name for block in measured.blocks)
    most, least = measured.peak(frozenset()), measured.peak(blocks)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    usual, peak = gradients_and_peak(model, batch)
    statistics = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert peak == pytest.approx(most, rel=1e-3)
    chosen = []
    for share in (0.7, 0.0):
        budget = least + share * (most - least)
        choice = choose(measured, budget)
        compute_again(model, choice.again)
        model.load_state_dict(state)
        gradients, peak = gradients_and_peak(model, batch)
        assert peak <= 1.001 * choice.peak <= 1.002 * budget
        assert gradients.keys() == usual.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, usual[name], rtol=1e-5, atol=1e-6, msg=name)
        assert all(torch.equal(tensor, statistics[name]) for name, tensor in model.state_dict().items())
        chosen.append(len(choice.again))
    assert 0 < chosen[0] < chosen[1]
    assert choose(measured, most).again == []
    with pytest.raises(BudgetTooSmall, match=f"at least {least} bytes"):
        choose(measured, least - 1)


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_are(batch):
    model = tiny_model("resnet").eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure(model, batch)
    assert not model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in blocks_of(model).values())


def test_a_frozen_backbone_has_nothing_to_compute_again(batch):
    model = tiny_model("swin").train()
    model.model.pixel_level_module.encoder.requires_grad_(False)
    measured = measure(model, batch)
    assert not any(block.saved for block in measured.blocks if ".encoder.swin." in block.name)
    everything = choose(measured, measured.peak(frozenset(block.name for block in measured.blocks))).again
    assert everything and not any(".encoder.swin." in name for name in everything)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_a_model_whose_blocks_are_computed_again_can_be_pickled_and_copied(backbone, batch):
    model = tiny_model(backbone).train()
    state = copy.deepcopy(model.state_dict())
    compute_again(model, blocks_of(model))
    results = []
    for same in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        same.load_state_dict(state)
        results.append(gradients_and_peak(same, batch))
    for gradients, peak in results[1:]:
        assert peak == results[0][1]
        for name, gradient in results[0][0].items():
            torch.testing.assert_close(gradients[name], gradient, msg=name)


def settings(output, **changes):
    given = {"data": "scenes", "train_limit": 4, "val_limit": 2, "backbone": "tiny", "crop": 64, "steps": 1}
    return TrainingSettings(**given | {"batch_size": 2, "cpu": True, "output": output} | changes)


def test_a_run_says_what_it_chose_or_the_least_that_will_do(tmp_path):
    with pytest.raises(ValueError, match=r"memory_budget=0.001: .*64 x 64 pixels takes at least 0\.\d+ GB") as error:
        TrainingRun(settings(tmp_path, memory_budget=0.001), show=False)
    least = float(str(error.value).split("memory_budget=")[-1].split(",")[0])
    run = TrainingRun(settings(tmp_path, memory_budget=least), show=False)
    assert run.memory_line.startswith(f"memory budget {least:g} GB")
    assert "computed again in the backward pass" in run.memory_line
    assert any(getattr(block, "gradient_checkpointing", False) for block in blocks_of(run.model).values())
    plenty = TrainingRun(settings(tmp_path, memory_budget=8), show=False).memory_line
    assert plenty.endswith("nothing has to be computed again")
    whole_run = TrainingRun(settings(tmp_path, augmentation="none", test_size=[80, 133]), show=False)
    assert whole_run.memory_line == "" and whole_run._largest() == (160, 160)  # an upright image beside a lying one
    assert least * GB < 2**26


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing=: choose one"),
        ({"teacher": "teacher"}, "teacher=: choose one"),
        ({"memory_budget": -1.0}, "memory_budget=-1.0: must be at least 0"),
        ({"memory_budget": 0.0}, "memory_budget=0: must be above 0"),
        ({"memory_budget": float("nan")}, "memory_budget=nan: must be a number"),
        ({"memory_budget": float("inf")}, "memory_budget=inf: must be finite"),
    ],
)
def test_what_does_not_go_with_a_budget_is_refused(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        TrainingRun(settings(tmp_path, **{"memory_budget": 1.0} | changes), show=False)
