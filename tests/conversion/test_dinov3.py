"""Meta's DINOv3 segmentor, its head and adapter in one file and its ViT in another, gives Meta's recorded outputs."""

import json

import pytest
import torch
from helpers import GOLDEN, needs_golden, relative_difference
from safetensors.torch import load_file, save_file

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.cli.main import main
from mask2former_hf.conversion import dinov3
from mask2former_hf.conversion.names import CheckpointError
from mask2former_hf.conversion.original import translate
from mask2former_hf.model import vit_adapter

pytestmark = needs_golden
GOLDEN_ADAPTER = GOLDEN / "vit_adapter"
VIT = "segmentation_model.0.backbone."


@pytest.fixture(scope="module")
def state():
    return load_file(GOLDEN_ADAPTER / "model.safetensors")


@pytest.fixture(scope="module")
def converted(state, tmp_path_factory):
    """The converted folder; the recorded model is narrower than the released one, and of 6 blocks."""
    folder = tmp_path_factory.mktemp("dinov3")
    torch.save({name: x for name, x in state.items() if VIT not in name}, folder / "head.pth")
    torch.save({name.removeprefix(VIT): x for name, x in state.items() if VIT in name}, folder / "vit.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit_adapter, "STEM_WIDTH", 8)
        patch.setattr(dinov3, "tapped_blocks", lambda layers: [1, 3, 4, 6])
        arguments = ["convert", folder / "head.pth", "--vit", folder / "vit.pth", "--output", folder / "out"]
        assert main([str(argument) for argument in arguments]) == 0
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(report.values()), report
    return folder, model.eval()


@pytest.mark.parametrize("case", ["a", "b"])
@torch.no_grad()
def test_the_converted_segmentor_gives_meta_s_outputs(converted, case):
    _, model = converted
    inputs, expected = (load_file(GOLDEN_ADAPTER / f"{name}.safetensors") for name in ("inputs", "outputs"))
    pixels = inputs["a.pixel_values" if case == "a" else "b.pixel_values_padded"]
    output = model(pixels, output_hidden_states=True)
    maps = output.encoder_hidden_states
    finest = "a.adapter.1" if case == "a" else "b.adapter.1.every_second"
    assert relative_difference(maps[0] if case == "a" else maps[0][..., ::2, ::2], expected[finest]) < 1e-5
    for level in (2, 3, 4):
        assert relative_difference(maps[level - 1], expected[f"{case}.adapter.{level}"]) < 1e-5
    assert relative_difference(output.class_queries_logits, expected[f"{case}.pred_logits"]) < 1e-5
    assert relative_difference(output.masks_queries_logits, expected[f"{case}.pred_masks"]) < 1e-5


def test_an_image_is_normalised_and_padded_as_meta_s_are(converted):
    folder, _ = converted
    processor = Mask2FormerImageProcessor.from_pretrained(folder / "out")
    inputs = load_file(GOLDEN_ADAPTER / "inputs.safetensors")
    for image, expected in (("a.image", "a.pixel_values"), ("b.image", "b.pixel_values_padded")):
        found = processor(inputs[image][0], do_resize=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, inputs[expected], rtol=1e-5, atol=1e-5)


def test_every_tensor_of_head_and_vit_gets_the_recorded_name(state):
    for name, ours in json.loads((GOLDEN_ADAPTER / "head_names.json").read_text())["names"].items():
        (original,) = dinov3.head_to_original({name: state[name]})
        found = translate(original)
        assert ([found] if isinstance(found, str) else list(found)) == ours, name
    for name, rows in json.loads((GOLDEN_ADAPTER / "dinov3_vit_hf.json").read_text())["names"].items():
        in_files = [None if target is None else target.replace("model.layer.", "layer.") for target, _ in rows]
        assert list(dinov3.VIT.to_ours(name)) == in_files, name


def test_a_folder_of_transformers_is_the_same_vit_as_meta_s_file(converted):
    folder, model = converted
    encoder = model.model.pixel_level_module.encoder
    encoder.save_pretrained(folder / "vit")
    config, tensors = dinov3.read_vit(folder / "vit")
    assert config.out_indices == [1, 3, 4, 6]
    saved = load_file(folder / "out" / "model.safetensors")
    assert {name for name in saved if ".encoder.layer." in name and ".pixel_level_module.encoder." in name} <= set(
        tensors
    )
    assert all(torch.equal(tensors[name], saved[name]) for name in tensors)
    fields = json.loads((GOLDEN_ADAPTER / "dinov3_vit_hf.json").read_text())["config"]
    ignored = {"transformers_version", "image_size", "layerscale_value"}  # which no forward reads
    assert {name: getattr(config, name) for name in fields if name not in ignored} == {
        name: value for name, value in fields.items() if name not in ignored
    }


def test_the_licence_and_the_windows_are_in_what_is_written(converted):
    folder, model = converted
    card = (folder / "out" / "README.md").read_text()
    assert "license: other" in card and "license_name: dinov3-license" in card
    assert "dinov3/blob/main/LICENSE.md" in card and "stay under it" in card
    assert model.config.sliding_window == {"side": 896, "stride": 596} and model.config.task == "semantic"
    assert Mask2FormerImageProcessor.from_pretrained(folder / "out").size["shortest_edge"] == 896


def test_what_is_missing_or_too_much_is_named(converted, state, tmp_path, capsys):
    folder, _ = converted
    assert main(["convert", str(folder / "head.pth"), "--output", str(tmp_path / "out")]) == 2
    assert "--vit with the folder of that ViT" in capsys.readouterr().err
    vit = load_file(GOLDEN_ADAPTER / "model.safetensors")
    vit = {name.removeprefix(VIT): x for name, x in vit.items() if VIT in name}
    for changed, message in (
        ({"rope_embed.periods": None}, "rope_embed.periods missing"),
        ({"blocks.0.attn.qkv.scale": torch.ones(1)}, "no translation for 1 tensors .*qkv.scale"),
    ):
        save_file({k: x for k, x in (vit | changed).items() if x is not None}, tmp_path / "vit.safetensors")
        with pytest.raises(CheckpointError, match=message):
            dinov3.read_vit(tmp_path / "vit.safetensors")
    torch.save(
        {"decode_head.x": torch.ones(1), "backbone.interactions.0.injector.gamma": torch.ones(1)}, tmp_path / "2.pth"
    )
    assert main(["convert", str(tmp_path / "2.pth"), "--output", str(tmp_path / "out")]) == 2
    assert "injectors, such as DINOv2's" in capsys.readouterr().err
