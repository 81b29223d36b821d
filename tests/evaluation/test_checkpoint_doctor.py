"""The doctor names what is wrong with a checkpoint, and is silent about a healthy one."""

import json
import re

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file

from mask2former_hf import Mask2FormerImageProcessor
from mask2former_hf.data.findings import ERROR, WARNING
from mask2former_hf.evaluation.doctor import examine_checkpoint, finds_nothing

NAMES = ["sky", "road", "car", "tree", "cat"]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    tiny_model(
        "resnet", decoder_layers=1, id2label=dict(enumerate(NAMES)), task="panoptic", stuff_label_ids=[0, 1]
    ).save_pretrained(folder)
    Mask2FormerImageProcessor(label_ids_to_fuse=[0, 1]).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(healthy, tmp_path):
    for path in healthy.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def in_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def in_json(file, **fields):
    def spoil(folder):
        content = json.loads((folder / file).read_text()) | fields
        content = {name: value for name, value in content.items() if value != "gone"}
        (folder / file).write_text(json.dumps(content))

    return spoil


def in_config(**fields):
    return in_json("config.json", **fields)


def in_processor(**fields):
    return in_json("preprocessor_config.json", **fields)


def labels(*names):
    return in_config(id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)})


CLASSIFIER = "class_predictor.weight"
SICK = {
    "missing tensor": (
        in_tensors(lambda t: t.pop(CLASSIFIER)),
        ERROR,
        "1 tensors of the model are miss",
        "complete",
    ),
    "foreign tensor": (in_tensors(lambda t: t.update(extra=torch.ones(2))), WARNING, "none of the model's", "convert"),
    "nan": (
        in_tensors(lambda t: t[CLASSIFIER].fill_(torch.nan)),
        ERROR,
        "nan or infinite, such as class_pred",
        "earlier",
    ),
    "number of labels": (labels("a", "b", "c"), ERROR, "classifier has 5 labels and config.json 3", "id2label"),
    "other shapes": (in_config(num_queries=7), ERROR, "another shape than config.json says", "belongs"),
    "no names": (labels(*(f"LABEL_{k}" for k in range(5))), WARNING, "which are no names", "id2label"),
    "a name twice": (labels("a", "b", "c", "b", "d"), WARNING, "'b'", "name of its own"),
    "no task": (in_config(task="gone"), WARNING, "says the task", '"task"'),
    "no stuff": (
        lambda folder: (in_config(stuff_label_ids="gone")(folder), in_processor(label_ids_to_fuse=None)(folder)),
        WARNING,
        "which labels are stuff",
        "stuff_label_ids",
    ),
    "stuff of other ids": (
        lambda at: (in_config(stuff_label_ids="gone")(at), in_processor(label_ids_to_fuse=[1, 5])(at)),
        ERROR,
        "stuff are the labels .1, 5., of 5",
        "0 to 4",
    ),
    "two kinds of stuff": (in_config(stuff_label_ids=[2]), WARNING, "says that the stuff is .2., the proc", "equal"),
    "stretches": (in_processor(size={"height": 64, "width": 64}), WARNING, "stretches every image", "shortest_edge"),
    "no resizing": (in_processor(do_resize=False), WARNING, "does not resize", "do_resize to true"),
    "no normalisation": (in_processor(do_normalize=False), ERROR, "do_normalize false", "set do_normalize"),
    "another scale": (
        in_processor(image_mean=[123.7, 116.3, 103.5]),
        ERROR,
        "on another scale",
        "rescale_factor is 1",
    ),
    "other statistics": (in_processor(image_mean=[0.5, 0.5, 0.5]), WARNING, "not with ImageNet's", "training's"),
    "divisor": (in_processor(size_divisor=16), WARNING, "pads to multiples of 16", "size_divisor to 32"),
    "no processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        WARNING,
        "there is no pre",
        "save",
    ),
    "half precision": (
        in_tensors(lambda t: t["model.transformer_module.decoder.layernorm.bias"].fill_(3e4)),
        WARNING,
        "numbers grow to",
        "bf16",
    ),
    "damaged": (lambda at: (at / "model.safetensors").write_bytes(b"\0" * 99), ERROR, "cannot be read", "complete"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_checkpoint_is_found_and_the_repair_is_named(checkpoint, name):
    spoil, severity, what, repair = SICK[name]
    spoil(checkpoint)
    found = examine_checkpoint(checkpoint)
    texts = [(one.severity, f"{one.what}\n{one.repair}") for one in found]
    assert [text for kind, text in texts if kind == severity and re.search(f"(?s){what}.*{repair}", text)], texts


def test_a_healthy_checkpoint_is_passed_in_silence(healthy):
    assert examine_checkpoint(healthy) == []


def test_a_model_whose_queries_all_say_no_object_finds_nothing(healthy):
    model = tiny_model("resnet", decoder_layers=1)
    processor, images = Mask2FormerImageProcessor(size=64), [torch.zeros(3, 64, 64, dtype=torch.uint8)]
    with torch.no_grad():
        model.class_predictor.bias[-1] = 100
    assert finds_nothing(model, processor, images)
    with torch.no_grad():
        model.class_predictor.bias[-1] = -100
    assert not finds_nothing(model, processor, images)
