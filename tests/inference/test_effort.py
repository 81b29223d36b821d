"""Fewer decoder layers: what they give, what they leave alone, and what has none to leave out."""

import pickle

import numpy as np
import pytest
import torch
from helpers import tiny_model

from mask2former_hf import Mask2FormerImageProcessor, Segmenter
from mask2former_hf.cli.main import main
from mask2former_hf.inference import effort
from mask2former_hf.inference.effort import at_effort
from mask2former_hf.inference.export_files import REPORT
from mask2former_hf.model.transformer_decoder import Bystanders


@pytest.fixture(scope="module")
def model():
    return tiny_model("resnet", task="panoptic", stuff_label_ids=[3, 4])  # with 3 layers


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("share", "layers"), [(0, 0), (0.01, 1), (1 / 3, 1), (0.34, 2), (2 / 3, 2), (0.7, 3)])
def test_an_effort_gives_the_prediction_of_its_last_layer(model, pixels, share, layers):
    with torch.no_grad():
        whole = model(pixels, output_auxiliary_logits=True)
        reduced = at_effort(model, share)(pixels)
    predictions = [*whole.auxiliary_logits, whole]
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.equal(reduced[name], predictions[layers][name])


@torch.no_grad()
def test_queries_that_are_probably_nothing_stay_what_they_are_after_the_early_layers(model, monkeypatch):
    """The others see the image, each other and those as they are then, and no image sees another."""
    assert at_effort(model, 0.99).model.transformer_module.decoder.early == 2  # half of three, rounded up
    monkeypatch.setattr(effort, "EARLY", 1 / 3)
    batch = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    reduced = at_effort(model, 0.99)
    whole = model(batch, output_auxiliary_logits=True, output_hidden_states=True)
    early = whole.auxiliary_logits[1]
    objects = 1 - early["class_queries_logits"].softmax(-1)[..., -1]
    bound = objects.flatten().sort().values[9:11].mean().item()  # between two of them
    monkeypatch.setattr(effort, "HOPELESS", bound)
    kept = objects >= bound
    assert kept[0].any() and kept[1].any() and kept[0].sum() != kept[1].sum()
    found = reduced(batch, output_attentions=True, output_hidden_states=True)
    for name in ("class_queries_logits", "masks_queries_logits"):
        close(found[name][~kept], early[name][~kept])
    for image, rows in enumerate(kept):
        last = found.transformer_decoder_last_hidden_state[image, rows]
        close(last, by_hand(model.model.transformer_module, whole, image, rows, layers=(1, 2)))
        weights = found.attentions[-1][image]
        assert (weights[:, ~rows] == 0).all() and (weights[:, rows] > 0).all()
        close(reduced(batch[image : image + 1]).class_queries_logits[0], found.class_queries_logits[image])
    for bound, layer in ((0.0, 3), (1.1, 1)):
        monkeypatch.setattr(effort, "HOPELESS", bound)
        close(reduced(batch).class_queries_logits, [*whole.auxiliary_logits, whole][layer]["class_queries_logits"])


def by_hand(module, whole, image, rows, layers):
    """States of some queries of an image after some layers, from the hidden states before them; the others stay."""
    positions, seen = module.queries_embedder.weight, whole.transformer_decoder_hidden_states[layers[0]][image].clone()
    maps = whole.pixel_decoder_hidden_states
    memories, features = module.levels(maps, whole.pixel_decoder_last_hidden_state)
    x = whole.transformer_decoder_hidden_states[layers[0]][image, rows][None]
    for layer in layers:
        allowed = module.decoder.mask_predictor(module.decoder.layernorm(x)) @ features[layer][image] >= 0
        allowed = allowed | ~allowed.any(-1, keepdim=True)
        part, inputs = module.decoder.layers[layer], (memories[layer][image][None], module.positions(maps[layer]))
        x = part.cross_attn_layer_norm(x + part.cross_attn(x, positions[rows], *inputs, allowed, True)[0])
        seen[rows] = x[0]
        x = part.self_attn_layer_norm(x + attended(part.self_attn, x[0], positions[rows], seen, positions))
        x = part.final_layer_norm(x + part.fc2(part.activation(part.fc1(x))))
        seen[rows] = x[0]
    return x[0]


def attended(attention, x, own_positions, seen, positions):
    query, key = attention.q_proj(x + own_positions), attention.k_proj(seen + positions)
    query, key, value = (
        t.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1) for t in (query, key, attention.v_proj(seen))
    )
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return attention.out_proj((weights @ value).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_queries_that_stay_are_seen_as_if_they_were_in_the_layer(pre_norm):
    """If a layer begins with self-attention, it does not matter what would become of them."""
    model = tiny_model("resnet", self_attention_first=True, pre_norm=pre_norm)
    layer, states, positions = (
        model.model.transformer_module.decoder.layers[0],
        torch.randn(2, 10, 32),
        torch.randn(10, 32),
    )
    others = Bystanders(states[:, 4:], positions[4:].expand(2, -1, -1))
    inputs = torch.randn(2, 12, 32), torch.randn(12, 32), None, False
    close(layer(states[:, :4], positions[:4], *inputs, others)[0], layer(states, positions, *inputs)[0][:, :4])


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "encoder", "decoder"), [(0, 1, 0), (1 / 3, 1, 1), (0.5, 2, 2), (0.7, 3, 3)])
@torch.no_grad()
def test_with_exits_an_effort_is_a_share_of_the_encoders_layers_too(pixels, share, encoder, decoder):
    """What a network of so few layers predicts with the same weights."""
    whole = tiny_model("resnet", encoder_layers=3, encoder_exits=True)
    small = tiny_model("resnet", encoder_layers=encoder, decoder_layers=decoder + 1)
    small.load_state_dict(whole.state_dict(), strict=False)
    reduced, expected = at_effort(whole, share)(pixels), small(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        close(reduced[name], expected[name])
    assert len(whole.model.pixel_level_module.decoder.encoder.layers) == 3


def test_a_model_of_less_effort_compiles_as_one_graph(model, pixels):
    graphs = []
    smaller = at_effort(model, 0.8).eval()
    with torch.no_grad():
        torch.compile(smaller, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(pixels)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_the_whole_model_stays_and_shares_its_weights(model, pixels):
    with torch.no_grad():
        before = model(pixels).class_queries_logits
        reduced = at_effort(model, 0.5)
        assert reduced is not model and at_effort(model, 1) is model
        assert torch.equal(model(pixels).class_queries_logits, before)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    own = [parameter.data_ptr() for parameter in reduced.parameters()]
    assert addresses > {*own} and len(model.model.transformer_module.decoder.layers) == 3


def test_a_segmenter_keeps_its_effort_when_it_travels(model, tmp_path):
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    segmenter = Segmenter(tmp_path, task="semantic", device="cpu", effort=0.5)
    photo = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    travelled = pickle.loads(pickle.dumps(segmenter))
    assert len(travelled.model.model.transformer_module.decoder.layers) == 2
    assert (travelled(photo).map == segmenter(photo).map).all()
    assert (segmenter(photo).map != Segmenter(tmp_path, task="semantic", device="cpu")(photo).map).any()


@pytest.mark.parametrize(
    "fields",
    [
        {"use_auxiliary_loss": False},
        {"decoder_type": "standard", "transformer_in_feature": "res5"},
        {"head_type": "per_pixel", "num_queries": 5},
    ],
)
def test_a_model_without_a_prediction_at_every_layer_is_refused(fields):
    other = tiny_model("resnet", **fields)
    with pytest.raises(ValueError, match=f"effort=0.5: the checkpoint has {next(iter(fields))}="):
        at_effort(other, 0.5)
    assert at_effort(other, 1) is other


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "0.5"])
def test_an_effort_is_a_share(model, share):
    with pytest.raises(
        ValueError, match="effort=.*: must be a share of the decoder's layers, from 0 to 1, such as 0.5"
    ):
        at_effort(model, share)


def test_the_command_line_names_its_flag(model, tmp_path, capsys):
    from PIL import Image

    model.save_pretrained(tmp_path / "model")
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path / "model")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    command = ["predict", str(tmp_path / "photo.png"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out"), "--effort", "2"]) == 2
    assert "--effort 2" in capsys.readouterr().err
    assert main([*command, "--output", str(tmp_path / "out"), "--effort", "0"]) == 0
    assert '"effort": 0.0' in next((tmp_path / "out").rglob("run.json")).read_text()


def test_exports_and_videos_know_no_effort(tmp_path, capsys):
    (tmp_path / REPORT).write_text("{}")
    with pytest.raises(ValueError, match="effort=0.5: .* is an export; use its checkpoint"):
        Segmenter(tmp_path, effort=0.5)
    assert main(["evaluate", "--data", "davis", "--model", "x", "--effort", "0"]) == 2
    assert "--effort: is for images" in capsys.readouterr().err
