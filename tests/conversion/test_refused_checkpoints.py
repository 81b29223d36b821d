"""A conversion is silent about nothing, runs nothing, and leaves nothing behind."""

import errno
import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from commands import convert
from helpers import tiny_model
from safetensors.torch import save_file

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.conversion.checkpoint_files import Checkpoint, read_checkpoint, write_original
from mask2former_hf.conversion.converting import build_model, recognise_source
from mask2former_hf.conversion.names import CheckpointError


@pytest.fixture
def small():
    """A small model and the same weights as a checkpoint of the original."""
    model = tiny_model("swin")
    from mask2former_hf.conversion.converting import to_original as names_of_original

    return model, names_of_original(model)


def test_a_model_of_ours_survives_both_ways(small, tmp_path):
    model, state = small
    write_original(tmp_path / "model.pkl", state)
    assert convert(tmp_path / "model.pkl", "--output", tmp_path / "out") == 0
    back = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "out")
    unused = "encoder.swin.layernorm"  # not in the original
    for (name, expected), (_, loaded) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert unused in name or torch.equal(expected, loaded), name


def test_missing_unknown_and_misshapen_tensors_are_listed(small, tmp_path, capsys):
    _, state = small
    state["sem_seg_head.predictor.new_part.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "unknown.safetensors")
    assert convert(tmp_path / "unknown.safetensors", "--output", tmp_path / "out") == 2
    assert "sem_seg_head.predictor.new_part.weight" in capsys.readouterr().err
    del state["sem_seg_head.predictor.new_part.weight"]
    del state["sem_seg_head.predictor.decoder_norm.bias"]
    state["backbone.norm0.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "broken.safetensors")
    assert convert(tmp_path / "broken.safetensors", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "decoder.layernorm.bias" in said and "hidden_states_norms.stage1.weight (3,), not (16,)" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.safetensors", "unknown.safetensors"]


DECIDING = [
    "sem_seg_head.predictor.query_feat.weight",
    "sem_seg_head.predictor.class_embed.weight",
    "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight",
    "sem_seg_head.pixel_decoder.input_proj.0.0.weight",
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.attention_weights.weight",
    "backbone.patch_embed.proj.weight",
    "backbone.layers.0.blocks.0.attn.qkv.bias",
    "backbone.layers.0.blocks.0.attn.relative_position_bias_table",
    "backbone.layers.0.downsample.reduction.weight",
    "criterion.empty_weight",
]


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1, 7, 3, 5)])
def test_a_tensor_of_a_senseless_shape_is_an_error_that_names_it(small, name, shape):
    state = small[1]
    assert name in state
    with pytest.raises(CheckpointError) as caught:
        build_model(recognise_source(Checkpoint(state | {name: torch.zeros(shape)}, {})))
    assert (
        name.rsplit(".", 1)[0] in str(caught.value)
        or "tensors do not fill" in str(caught.value)
        or ("no model has the configuration" in str(caught.value))
    )


def test_weights_that_are_not_finite_are_refused(small):
    state = small[1]
    state["sem_seg_head.predictor.decoder_norm.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"1 not finite: .*decoder.layernorm.bias"):
        build_model(recognise_source(Checkpoint(state, {})))


def test_names_that_are_numbers_are_refused(tmp_path):
    torch.save({"model": {3: torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="not tensors with a name: 3"):
        read_checkpoint(tmp_path / "x.pth")


def test_the_folder_that_one_is_in_is_not_replaced(small, tmp_path, capsys, monkeypatch):
    write_original(tmp_path / "model.pth", small[1])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", ".."):
        assert convert(tmp_path / "model.pth", "--output", output, "--overwrite") == 2
        assert "would replace the folder that you are in" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "model.pth"]


def test_a_full_disk_is_told_of_the_output(small, tmp_path, capsys, monkeypatch):
    write_original(tmp_path / "model.pth", small[1])

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Mask2FormerForUniversalSegmentation, "save_pretrained", full)
    assert convert(tmp_path / "model.pth", "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'out'}: No space left on device" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth"]


def test_another_backbone_cannot_go_back(tmp_path, capsys):
    tiny_model("convnext").save_pretrained(tmp_path / "folder")
    assert convert(tmp_path / "folder", "--to", "original", "--output", tmp_path / "m.pth") == 2
    assert "Its backbones are Swin and ResNet" in capsys.readouterr().err
    assert not (tmp_path / "m.pth").exists()


@pytest.mark.parametrize(
    "state, message",
    [
        ({"backbone.patch_embed.proj.weight": torch.zeros(1)}, "neither facebookresearch/Mask2Former"),
        ({"model.pixel_level_module.x": torch.zeros(1)}, "from_pretrained"),
        ({"sem_seg_head.predictor.x": torch.zeros(1)}, "neither the original's Swin nor its ResNet"),
    ],
)
def test_other_checkpoints_are_named(state, message):
    with pytest.raises(CheckpointError, match=message):
        recognise_source(Checkpoint(state, {}))


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "nested.pkl"])
def test_a_malicious_file_is_refused_by_name_and_runs_nothing(name, tmp_path, capsys):
    victim, source = tmp_path / "victim", tmp_path / name
    content = {"model": {"sem_seg_head.predictor.query_feat.weight": Payload(victim)}}
    if name == "evil.pkl":
        source.write_bytes(pickle.dumps(content))
    elif name == "evil.pth":
        torch.save(content, source)
    else:  # a pickle that hands bytes to torch's own unrestricted torch.load

        class Nested:
            def __reduce__(self):
                torch.save(content, tmp_path / "inner")
                return torch.storage._load_from_bytes, ((tmp_path / "inner").read_bytes(),)

        source.write_bytes(pickle.dumps({"model": {"x": Nested()}}))
    assert convert(source, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert re.search(r"\b(_?io|builtins)\.open\b", said), said
    assert not victim.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_tensors_of_every_pickle_protocol_are_read(protocol, tmp_path):
    state = {
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(3),
        "tensor": torch.randn(4, 4)[1:, ::2],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "empty": torch.empty(0, 2),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": OrderedDict(state), "__author__": "x"}, protocol=protocol))
    tensors, rest = read_checkpoint(path)
    assert rest == {"__author__": "x"}
    for name, value in state.items():
        assert torch.equal(tensors[name], torch.as_tensor(value)), name


@pytest.mark.parametrize("name", ["text.pkl", "text.pth", "text.safetensors", "list.pkl", "absent.pth"])
def test_a_file_that_is_no_checkpoint_gives_one_line(name, tmp_path, capsys):
    if name == "list.pkl":
        (tmp_path / name).write_bytes(pickle.dumps([1, 2]))
    elif name != "absent.pth":
        (tmp_path / name).write_bytes(b"not a checkpoint")
    assert convert(tmp_path / name, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert name in said and len(said.splitlines()) == 1


def test_a_filled_folder_is_kept_unless_told(small, tmp_path, capsys):
    write_original(tmp_path / "model.pth", small[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    arguments = (tmp_path / "model.pth", "--output", tmp_path / "out")
    assert convert(*arguments) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "out" / "mine.txt").exists()
    assert convert(*arguments, "--overwrite") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "out"}


def test_an_error_while_saving_leaves_everything_as_it_was(small, tmp_path, capsys, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    write_original(tmp_path / "model.pth", small[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    monkeypatch.setattr(Mask2FormerImageProcessor, "save_pretrained", full)
    assert convert(tmp_path / "model.pth", "--output", tmp_path / "out", "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert convert(tmp_path / "model.pth", "--output", tmp_path / "other") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "out"}
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
