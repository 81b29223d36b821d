"""The table of kinds of data: each is read from the options that it needs, and refuses those that it does not take."""

from types import SimpleNamespace

import pytest

from mask2former_hf.data.kinds import KINDS, OF_A_SPLIT, SHARED, load_split
from mask2former_hf.data.scenes import Scenes

EVERY = (*OF_A_SPLIT, *SHARED)


def settings(kind, split="", **given):
    names = {**{f"{split}{name}": None for name in OF_A_SPLIT}, **dict.fromkeys(SHARED)}
    return SimpleNamespace(data=kind, **names | given)


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_that_a_kind_does_not_take_is_refused_by_name(kind):
    own = KINDS[kind]
    needed = {f"train_{name}" if name in OF_A_SPLIT else name: "given" for name in own.needs}
    useless = [name for name in EVERY if name not in (*own.needs, *own.takes, "limit")]
    assert useless
    for name in useless:
        called = f"train_{name}" if name in OF_A_SPLIT else name
        with pytest.raises(ValueError, match=f"data={kind} does not take {called}=: it takes .*train_limit="):
            load_split(settings(kind, "train_", **needed, **{called: 1}), "train")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].needs])
def test_what_a_kind_needs_is_named_all_at_once(kind):
    names = [f"val_{name}=" if name in OF_A_SPLIT else f"{name}=" for name in KINDS[kind].needs]
    with pytest.raises(ValueError) as error:
        load_split(settings(kind, "val_"), "val")
    assert str(error.value) == f"data={kind} needs {', '.join(names)}"


def test_every_kind_names_options_that_exist_and_the_task_of_its_examples():
    for own in KINDS.values():
        assert {*own.needs, *own.takes} <= set(EVERY)
    assert KINDS["scenes"].task == Scenes.task == load_split(settings("scenes", limit=1)).task
