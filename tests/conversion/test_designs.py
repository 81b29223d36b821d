"""The designs that the paper compares, as the original ran them: tensors, losses, gradients, through our converter."""

import pytest
import torch
import transformers
from helpers import BACKBONES, GOLDEN, GoldenCase, needs_golden, randomise, relative_difference
from safetensors.torch import load_file

from mask2former_hf import Mask2FormerForUniversalSegmentation
from mask2former_hf.cli.main import main
from mask2former_hf.conversion.checkpoint_files import Checkpoint
from mask2former_hf.conversion.converting import build_model, recognise_source, to_original
from mask2former_hf.conversion.detectron2_config import settings_from_yaml
from mask2former_hf.model.pixel_decoder import PixelMaps
from mask2former_hf.model.postprocessing import semantic_scores

FOLDER = GOLDEN / "compared_designs"
MASKS = (
    "fpn_masked_decoder",
    "transformer_fpn_masked_decoder",
    "transformer_fpn_prenorm",
    "standard_decoder_res5",
    "standard_decoder_transformer_encoder",
    "standard_decoder_prenorm",
    "msdeform_standard_decoder",
)
PER_PIXEL = ("per_pixel_baseline", "per_pixel_baseline_plus", "per_pixel_baseline_plus_swin")
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
TERMS = {"loss_cross_entropy": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}
pytestmark = needs_golden


class DesignCase(GoldenCase):
    """A recorded network, and ours made from its checkpoint and its yaml."""

    def __init__(self, name):
        self.folder = FOLDER / name
        inputs = load_file(self.folder / "inputs.safetensors")
        if name in PER_PIXEL:  # a label map is a mask per label, and what is in none is ignored
            for b in range(2):
                labels = inputs[f"target.{b}.sem_seg"]
                known = labels.unique()
                inputs[f"target.{b}.labels"] = known = known[known != 255]
                inputs[f"target.{b}.masks"] = labels == known[:, None, None]
        self.read(inputs)
        self.state = load_file(self.folder / "model.safetensors")
        self.source = recognise_source(Checkpoint(dict(self.state), {}))
        self.net = build_model(self.source, settings_from_yaml(self.folder / "config.json"))
        self.num_layers = self.net.config.decoder_layers if name != "per_pixel_baseline" else 1

    def outputs_in_training(self, model):
        return model(
            self.pixel_values, pixel_mask=self.pixel_mask, mask_labels=self.mask_labels, class_labels=self.class_labels
        )


@pytest.fixture(scope="module", params=[*MASKS, *PER_PIXEL])
def case(request):
    return DesignCase(request.param)


def names_of(case, what):
    last = case.num_layers - 1
    return {layer: what if layer == last else f"aux.{layer}.{what}" for layer in range(case.num_layers)}


def test_pixel_decoders(case):
    with torch.no_grad():
        features = case.net.model.pixel_level_module.encoder(case.pixel_values).feature_maps
        pixels = case.net.model.pixel_level_module.decoder(list(features))
    assert type(pixels) is PixelMaps
    ours = {"mask_features": pixels.mask_features, "encoder_features": pixels.encoded}
    ours |= {f"multi_scale.{level}": x for level, x in enumerate(pixels.maps)}
    recorded = [name for name in case.outputs if name.startswith("pixel_decoder.")]
    assert len(recorded) >= 4
    for name in recorded:
        assert relative_difference(ours[name.removeprefix("pixel_decoder.")], case.outputs[name]) <= 1e-5, name


def test_logits_of_every_layer(case):
    with torch.no_grad():
        output = case.net(case.pixel_values, output_auxiliary_logits=True)
    layers = [*output.auxiliary_logits, output]
    of_pixels = "stride4_logits" in case.outputs
    for layer, name in names_of(case, "stride4_logits" if of_pixels else "pred_masks").items():
        theirs = case.outputs[name].log_softmax(1) if of_pixels else case.outputs[name]
        assert relative_difference(layers[layer]["masks_queries_logits"], theirs) <= 1e-5, name
        if not of_pixels:
            theirs = case.outputs[name.replace("masks", "logits")]
            assert relative_difference(layers[layer]["class_queries_logits"], theirs) <= 1e-5, name


def test_the_way_back_is_exact(case):
    back = to_original(case.net)
    assert set(back) == set(case.state)
    for name, tensor in case.state.items():
        assert torch.equal(back[name], tensor), name


def test_semantic_result_of_an_image(case):
    """Of a per-pixel head scores are no probabilities as the original's logits are none: the best class counts."""
    image = (load_file(case.folder / "inputs.safetensors")["eval_image"].float() - MEAN) / STD
    meta, size = case.json("meta.json"), tuple(image.shape[1:])
    sides = [-(-side // 32) * 32 for side in size] if meta["size_divisibility"] else size
    pixels = torch.nn.functional.pad(image, (0, sides[1] - size[1], 0, sides[0] - size[0]))[None]
    with torch.no_grad():
        output = case.net(pixels)
    classes, masks = output.class_queries_logits[0], output.masks_queries_logits[0]
    canvas, of_pixels = [4 * side for side in masks.shape[1:]], "stride4_logits" in case.outputs
    scores = semantic_scores(classes, masks, canvas, size, meta["eval_output_size"], resize_masks_first=of_pixels)
    if not of_pixels:
        assert relative_difference(scores[:, ::4, ::4], case.outputs["eval.sem_seg_stride4"]) <= 1e-5
    assert torch.equal(scores.argmax(0), case.outputs["eval.sem_argmax"].long())


def test_losses_and_gradients(case):
    """In float64: at the kinks of bilinear sampling float32 rounding moves gradients."""
    model = case.net.double()
    of_pixels = "stride4_logits" in case.outputs
    if not of_pixels:
        case.replay(model.criterion)
    output = case.outputs_in_training(model)
    recorded, last = case.json("losses.json"), case.num_layers - 1
    theirs = recorded["losses" if of_pixels else "weighted"]
    for term, name in {"loss_cross_entropy": "loss_sem_seg"}.items() if of_pixels else TERMS.items():
        for layer, value in enumerate(output.loss_dict[term].tolist()):
            assert value == pytest.approx(theirs[name + f"_{layer}" * (layer < last)], rel=1e-5), (name, layer)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients.get(name, torch.zeros(())))
        norms = {name: tensor.double().norm().item() for name, tensor in to_original(model).items()}
    golden = case.json("grad_norms.json")
    rounding = 1e-5  # theirs, of sums that are 0
    assert {name: norms[name] for name in golden} == pytest.approx(golden, rel=1e-4, abs=rounding)


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_transformers_own_maskformer_gives_its_logits(backbone, tmp_path):
    theirs = stock_maskformer(backbone)
    theirs.save_pretrained(tmp_path / "stock")
    assert main(["convert", str(tmp_path / "stock"), "--output", str(tmp_path / "ours")]) == 0
    ours, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, output = theirs(pixels), ours.eval()(pixels)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert relative_difference(output[name], expected[name]) <= 1e-5, name
    assert ours.config.id2label[3] == "chair" and ours.config.mask_loss == "focal" and ours.config.loss_on == "masks"


def stock_maskformer(backbone):
    detr = {"model_type": "detr", "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "num_queries": 10}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4}
    config = transformers.MaskFormerConfig(
        backbone_config=BACKBONES[backbone](), decoder_config=detr | heads, fpn_feature_size=32, mask_feature_size=24
    )
    config.id2label = dict(enumerate(["wall", "floor", "lamp", "chair", "door"]))
    return randomise(transformers.MaskFormerForInstanceSegmentation(config)).eval()
