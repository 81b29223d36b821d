"""Small steps get one of torch's threads, large ones all, and what the user or a launcher says is kept."""

import pytest
import torch

from mask2former_hf import Mask2FormerForUniversalSegmentation, new_model
from mask2former_hf.data.scenes import Scenes
from mask2former_hf.training.threads import CHOSEN_BY, fewer_threads


@pytest.fixture(scope="module")
def model() -> Mask2FormerForUniversalSegmentation:
    return new_model("tiny", Scenes.classes, "panoptic")


@pytest.fixture(autouse=True)
def eight_threads(monkeypatch):
    """Nobody has said a number, and torch would take eight."""
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    usual = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize("side, batch_size, expected", [(128, 4, 1), (512, 4, 4), (512, 16, 8)])
def test_threads_follow_from_the_size_of_a_step_and_come_back(model, side, batch_size, expected):
    with fewer_threads(model, side, batch_size) as said:
        assert torch.get_num_threads() == expected
        assert said.startswith(f"{expected} of 8 threads: " if expected < 8 else "") and bool(said) == (expected < 8)
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize("name", CHOSEN_BY)
def test_a_number_that_was_said_is_kept(model, monkeypatch, name):
    monkeypatch.setenv(name, "8")
    with fewer_threads(model, 64, 1) as said:
        assert torch.get_num_threads() == 8 and said == ""


def test_the_number_comes_back_after_an_error(model):
    with pytest.raises(KeyboardInterrupt), fewer_threads(model, 64, 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 8
