"""Exports of a tiny model, each made once."""

import shutil

import pytest
import torch
from exports import SMALL, photo
from helpers import tiny_model

from mask2former_hf import Mask2FormerImageProcessor, export_model
from mask2former_hf.export.openvino import convert


@pytest.fixture(scope="session")
def processor():
    return Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture(scope="session")
def decided(processor):
    """A panoptic model that is sure of several classes: the differences of its queries, stretched."""
    model = tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4], **SMALL)
    with torch.no_grad():
        head = model.class_predictor
        mean = model(**processor(photo(), return_tensors="pt")).class_queries_logits[0].mean(0)
        head.weight *= 40
        head.bias.copy_(40 * (head.bias - mean))
    return model


@pytest.fixture(scope="session")
def checkpoint(decided, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    decided.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(decided, processor, tmp_path_factory):
    """Logits, and the rules of every task beside them."""
    pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
    folder = tmp_path_factory.mktemp("exports") / "logits"
    export_model(decided, processor, folder)
    return folder


@pytest.fixture(scope="session")
def end_to_end(decided, processor, tmp_path_factory):
    """Per task a folder whose graph gives results."""
    pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")
    folder = tmp_path_factory.mktemp("end_to_end")
    for task in ("panoptic", "instance", "semantic"):
        export_model(decided, processor, folder / task, task=task)
    return folder


@pytest.fixture(scope="session")
def for_openvino(exported, end_to_end, tmp_path_factory):
    """Those folders as `export --to openvino` leaves them, but for float32's own forms: "logits", and one per task."""
    pytest.importorskip("openvino", reason="its extra, [openvino], is not among what the tests install")
    folder = tmp_path_factory.mktemp("for_openvino")
    shutil.copytree(end_to_end, folder, dirs_exist_ok=True)
    shutil.copytree(exported, folder / "logits")
    for own in folder.iterdir():
        convert(own)
    return folder
