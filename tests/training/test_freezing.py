"""What is frozen stays as it was, and layers learn at the rates that the sources of layer-wise decay give them."""

import json
import re

import pytest
import torch
from helpers import (
    BACKBONES,
    GOLDEN,
    least_budget,
    make_small_heads,
    needs_golden,
    random_targets,
    tiny_fields,
    tiny_model,
)
from safetensors.torch import load_file, save_file
from tiny_backbones import HIERARCHICAL, ONE_MAP, PLAIN, TIMM, TIMM_PLAIN, backbone_config, needs_timm
from transformers import AutoBackbone, DINOv3ViTConfig, DINOv3ViTModel

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.cli.main import main
from mask2former_hf.training import kept_tensors
from mask2former_hf.training.feature_cache import FeatureCache
from mask2former_hf.training.freezing import depths_of, freeze_backbone
from mask2former_hf.training.optimization import parameter_groups, parts_table
from mask2former_hf.training.run import TrainingRun
from mask2former_hf.training.setting_checks import check
from mask2former_hf.training.settings import TrainingSettings, complete

VIT = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16, "num_register_tokens": 1}


def vit_model(layers, neck=None):
    config = DINOv3ViTConfig(num_hidden_layers=layers, **VIT)
    config.out_indices = [layers] if neck is None else [1, 2, 3, layers]
    fields = tiny_fields(decoder_layers=1, encoder_layers=1)
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config, vit_neck=neck, **fields))


OURS = {  # a parameter of ViTDet or ViT-Adapter -> what of ours has its learning rate
    r"backbone\.(net\.)?(patch_embed|pos_embed|cls_token).*": ".encoder.embeddings.",
    r"backbone\.(net\.)?blocks\.(?P<block>\d+)\..*": ".encoder.model.layer.{block}.",
    r"backbone\.(simfp_2|spm|interactions|norm1).*": ".neck.",
    r"decode_head\.(pixel_decoder|transformer_decoder).*": ".decoder.",
}


@needs_golden
@pytest.mark.parametrize("source", ["vitdet", "vit_adapter"])
def test_layer_decay_is_that_of_its_sources(source):
    """But for ViT-Adapter's queries and heads, which are slowed down by an accident of their names."""
    for case in json.loads((GOLDEN / "vit_adapter" / "schedules.json").read_text())["layer_decay"][source]:
        model = vit_model(case["layers"], "adapter" if source == "vit_adapter" else None)
        groups = parameter_groups(model, 1.0, backbone_multiplier=1.0, layer_decay=case["rate"])
        rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
        compared = 0
        for name, factor in case["factors"].items():
            for pattern, place in OURS.items():
                if match := re.fullmatch(pattern, name):
                    place = place.format(**match.groupdict())
                    found = {rates[p] for own, p in model.named_parameters() if place in own and p.requires_grad}
                    assert list(found) == [pytest.approx(factor)], name
                    compared += 1
        assert compared >= 9
        last_norm = model.model.pixel_level_module.encoder.norm.weight
        assert rates[last_norm] == 1 and rates[model.class_predictor.weight] == 1


OF_TIMM = [pytest.param(name, marks=needs_timm) for name in (*TIMM, *TIMM_PLAIN)]


@pytest.mark.parametrize("name", [*BACKBONES, *HIERARCHICAL, *PLAIN, *ONE_MAP, *OF_TIMM])
def test_every_backbone_has_stages_of_which_each_lies_deeper(name):
    depths, count = depths_of(AutoBackbone.from_config(backbone_config(name)))
    assert {depth for depth in depths.values() if 1 <= depth <= count} == set(range(1, count + 1))
    assert list(depths.values()) == sorted(depths.values())
    assert min(depths.values()) == (1 if name in ("dinov3_convnext", "pvt_v2") else 0)  # a stem in the first stage


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_the_first_stages_alone_are_frozen_and_rest(backbone):
    model = tiny_model(backbone)
    freeze_backbone(model, 2)
    encoder = model.model.pixel_level_module.encoder
    depths, _ = depths_of(encoder)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    masks, labels = random_targets([3, 2], (64, 64))
    model.train()(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels).loss.backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    trained = {name: parameter.grad is not None for name, parameter in encoder.named_parameters()}
    unused = {"swin.layernorm.weight", "swin.layernorm.bias"}
    assert trained == {name: depths[name] > 2 and name not in unused for name in trained}
    changed = {name for name, x in encoder.state_dict().items() if not torch.equal(x, before[name])}
    stages = [name for name in changed if re.search(r"(stages|layers)\.[01]\.(layers|blocks)", name)]
    assert changed and not stages and not any("embed" in name for name in changed)
    with pytest.raises(ValueError, match="freeze_backbone=5: the .* has 4 stages or blocks; give 1 to 4, or 'all'"):
        freeze_backbone(model, 5)


def test_the_table_says_what_is_trained_and_how():
    model = vit_model(4, "adapter")
    freeze_backbone(model)
    frozen = parts_table(model, parameter_groups(model, 1e-4))
    assert re.search(r"backbone +0\.\d\d M +frozen +- +-\n", frozen)
    assert re.search(r"neck of the ViT +(\d\.\d\d M) +\1 +0\.0001 +0 to 0\.05\n", frozen)
    model.model.pixel_level_module.encoder.requires_grad_(True)
    tuned = parts_table(model, parameter_groups(model, 1e-4, backbone_multiplier=1.0, layer_decay=0.5))
    assert re.search(r"backbone +(\d\.\d\d M) +\1 +3.1.e-06 to 0.0001 ", tuned)  # 0.5 ** 5, and the last norm


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is(tmp_path):
    (tmp_path / "file").write_text("")
    given = {"data": "scenes", "model": "x", "freeze_backbone": "all", "augmentation": "none", "steps": 1}
    with pytest.raises(ValueError, match=r"feature_cache=.*file: .* name a folder that can be written"):
        TrainingRun(TrainingSettings(output=tmp_path / "run", feature_cache=tmp_path / "file", **given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze_backbone": "some"}, "freeze_backbone=some: must be a number of stages, or 'all'"),
        ({"freeze_backbone": "all", "random_weights": True}, "would stay random"),
        ({"feature_cache": "maps", "freeze_backbone": 2}, "=maps: needs freeze_backbone= without a number"),
        (
            {"feature_cache": "maps", "freeze_backbone": "all"},
            r"feature_cache=maps: needs .* \('all'\) and augmentation=none",
        ),
        ({"layer_decay": 1.5}, "layer_decay=1.5: must be above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        check(complete(TrainingSettings(output="run", steps=1, backbone="dinov2-b", **settings))[0])


def test_with_layer_decay_the_backbone_has_no_other_factor_unless_it_is_given():
    base = {"output": "run", "steps": 1, "backbone": "swin-t", "layer_decay": 0.8}
    assert complete(TrainingSettings(**base))[0].backbone_multiplier == 1
    assert complete(TrainingSettings(**base, backbone_multiplier=0.5))[0].backbone_multiplier == 0.5


def test_a_run_over_a_frozen_vit_keeps_its_weights_and_goes_on(tmp_path, capsys, monkeypatch):
    make_small_heads(monkeypatch)
    DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=4, **VIT)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.4, 0.3]}')
    run = ["train", "--data", "scenes", "--train-limit", 4, "--val-limit", 2, "--crop", 64, "--batch-size", 2, "--cpu"]
    run += ["--backbone", tmp_path / "vit", "--vit-neck", "adapter", "--freeze-backbone", "--eval-every", 1]
    run += ["--augmentation", "none", "--feature-cache", tmp_path / "features", "--output", tmp_path / "run"]
    run += ["--memory-budget", least_budget(capsys, run)]
    for more in (["--steps", 1], ["--steps", 2, "--resume"]):
        assert main([str(word) for word in [*run, *more]]) == 0
        said = capsys.readouterr().out
        assert "blocks computed again in the backward pass are" in said and "of the backbone" not in said
    assert re.search(r"backbone +0\.\d\d M +frozen", said)
    assert len(list((tmp_path / "features").glob("*/*.safetensors"))) == 4  # the two steps saw the four images
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("vit", "run"))
    prefix = "model.pixel_level_module.encoder."
    kept = {name.removeprefix(prefix): x for name, x in after.items() if name.startswith(prefix)}
    assert set(kept) == set(before) and all(torch.equal(x, before[name]) for name, x in kept.items())
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2
    assert Mask2FormerImageProcessor.from_pretrained(tmp_path / "run").image_mean == (0.4, 0.4, 0.3)


@pytest.mark.parametrize("backbone", ["resnet", "vit with adapter"])
def test_kept_maps_give_the_loss_and_gradients_of_the_backbone_without_it(backbone, tmp_path, monkeypatch):
    model = tiny_model(backbone) if backbone == "resnet" else vit_model(4, "adapter")
    with pytest.raises(ValueError, match="the backbone trains .* freeze it as a whole"):
        FeatureCache(model, tmp_path)
    freeze_backbone(model)
    encoder, asked = model.model.pixel_level_module.encoder, []
    plain = encoder.forward
    encoder.forward = lambda pixels, **options: asked.append(len(pixels)) or plain(pixels, **options)
    pixels = torch.randn(3, 3, 64, 96)
    masks, labels = random_targets([3, 2, 1], (64, 96))

    def step(images):
        model.zero_grad()
        chosen = {"mask_labels": [masks[i] for i in images], "class_labels": [labels[i] for i in images]}
        torch.manual_seed(0)  # of the points
        loss = model.train()(pixels[images], **chosen).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected, own = step([2, 0]), encoder.forward
    with FeatureCache(model, tmp_path) as cache:
        step([0, 1])
        asked.clear()
        torch.testing.assert_close(step([2, 0]), expected, rtol=0, atol=0)  # one of the two is kept
        torch.testing.assert_close(step([2, 0]), expected, rtol=0, atol=0)
        assert asked == [2] and (cache.read, cache.made) == (2, 4)
        damaged = sorted(tmp_path.rglob("*.safetensors"))[0]
        whole = damaged.read_bytes()
        maps = {name: x.clone() for name, x in load_file(damaged).items()}  # not of the file that is written
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])  # one bit of a map
        said = []
        monkeypatch.setattr(kept_tensors.logger, "warning", said.append)
        for damage in (
            whole[:100], b"", flipped, {"0": maps["0"]}, {"x": maps["0"]}, {n: x[:1] for n, x in maps.items()}
        ):  # fmt: skip
            damaged.write_bytes(damage) if isinstance(damage, bytes) else save_file(damage, damaged)
            asked.clear(), said.clear()
            step([0, 1]), step([2, 0])
            assert asked in ([2], [2, 2])  # made again, whatever is wrong with it
            assert [line.startswith(f"{damaged} is damaged (") for line in said] == [True] * isinstance(damage, bytes)
            assert [len(x) for x in load_file(damaged).values()] == [len(x) for x in maps.values()]
        asked.clear()
        with torch.no_grad():
            model.eval()(pixels)
        assert asked == [3]  # what is measured is not kept
        monkeypatch.setattr(
            kept_tensors, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left"))
        )
        pixels += 1
        step([0, 1])  # a full disk costs time alone
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and not list(tmp_path.rglob("*.part"))
    assert encoder.forward is own  # what stood there, such as a hook of Accelerate
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    with FeatureCache(model, tmp_path) as cache:
        step([2, 0])
        assert cache.read == 0  # the maps of other weights are not taken for these
