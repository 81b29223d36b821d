"""The network against stock transformers, the original's tensors, and its own promises."""

import copy

import pytest
import torch
import transformers
from helpers import (
    BACKBONES,
    GOLDEN,
    golden_case,  # noqa: F401
    needs_golden,
    padded_batch,
    random_targets,
    randomise,
    relative_difference,
    tiny_config,
    tiny_fields,
    tiny_model,
)
from safetensors.torch import load_file
from torch import nn

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerModel
from mask2former_hf.kernels import use_kernel
from mask2former_hf.model.pixel_decoder import sine_position_embedding

StockConfig, StockModel = transformers.Mask2FormerConfig, transformers.Mask2FormerForUniversalSegmentation

VARIANTS = {
    "swin": ("swin", {}),
    "swin_prenorm": ("swin", {"pre_norm": True}),
    "resnet": ("resnet", {}),
    "resnet_projected": ("resnet", {"enforce_input_projection": True, "pre_norm": True}),
    "convnext_wide": ("convnext", {"hidden_dim": 48, "feature_size": 64, "decoder_layers": 6}),
    "coarse": ("resnet", {"common_stride": 8, "activation_function": "gelu"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 96), (75, 101)], ids=["even", "odd"])
def test_all_outputs_equal_stock_with_the_same_weights(variant, size, tmp_path):
    backbone, changes = VARIANTS[variant]
    stock = randomise(StockModel(StockConfig(backbone_config=BACKBONES[backbone](), **tiny_fields(**changes)))).eval()
    if changes.get("enforce_input_projection") or "hidden_dim" in changes:
        if not isinstance(stock.model.transformer_module.input_projections, nn.ModuleList):
            pytest.skip("this version of stock transformers does not save its input projections")
    stock.save_pretrained(tmp_path)
    ours, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert set(ours.state_dict()) == set(stock.state_dict())
    pixels = torch.randn(2, 3, *size)
    options = {"output_hidden_states": True, "output_attentions": True, "output_auxiliary_logits": True}
    with torch.no_grad():
        if backbone != "swin" or transformers.__version__ >= "5.18":
            stock.set_attn_implementation("eager")  # SDPA gives no attentions to return
        theirs = stock(pixels, **options)
        mine = ours.eval()(pixels, **options)
    pairs = {name: (mine[name], theirs[name]) for name in theirs if isinstance(theirs[name], torch.Tensor)}
    for name in ("encoder_hidden_states", "pixel_decoder_hidden_states", "attentions"):
        assert len(mine[name]) == len(theirs[name])
        pairs |= {f"{name}[{i}]": pair for i, pair in enumerate(zip(mine[name], theirs[name], strict=True))}
    for i, (a, b) in enumerate(
        zip(mine.transformer_decoder_hidden_states, theirs.transformer_decoder_hidden_states, strict=True)
    ):
        pairs[f"decoder state {i}"] = (a, b.transpose(0, 1))  # stock documents batch first and returns queries first
    for i, (a, b) in enumerate(zip(mine.auxiliary_logits, theirs.auxiliary_logits, strict=True)):
        pairs |= {f"{name} {i}": (a[name], b[name]) for name in a}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, name
        assert relative_difference(a, b) <= 1e-4, name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_checkpoint_saved_here_loads_in_stock_with_equal_outputs(backbone, tmp_path):
    ours = tiny_model(backbone, task="panoptic", stuff_label_ids=[3, 4])
    ours.save_pretrained(tmp_path)
    stock, info = StockModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        mine, theirs = ours(pixels), stock.eval()(pixels)
    assert relative_difference(mine.class_queries_logits, theirs.class_queries_logits) <= 1e-5
    assert relative_difference(mine.masks_queries_logits, theirs.masks_queries_logits) <= 1e-5


@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_and_load_is_exact(backbone, tmp_path):
    model = tiny_model(backbone)
    model.save_pretrained(tmp_path)
    again, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@needs_golden
def test_golden_network_outputs(golden_case, tmp_path):  # noqa: F811
    model, golden = golden_case.model(tmp_path), golden_case.outputs
    with torch.no_grad():
        output = model(golden_case.pixel_values, output_auxiliary_logits=True, output_hidden_states=True)
    pairs = {
        "pred_logits": output.class_queries_logits,
        "pred_masks": output.masks_queries_logits,
        "pixel_decoder.mask_features": output.pixel_decoder_last_hidden_state,
        "pixel_decoder.encoder_features": output.pixel_decoder_hidden_states[0],
        **{f"backbone.res{i + 2}": x for i, x in enumerate(output.encoder_hidden_states)},
        **{f"pixel_decoder.multi_scale.{i}": x for i, x in enumerate(output.pixel_decoder_hidden_states)},
    }
    for i, layer in enumerate(output.auxiliary_logits):
        pairs[f"aux.{i}.pred_logits"] = layer["class_queries_logits"]
        pairs[f"aux.{i}.pred_masks"] = layer["masks_queries_logits"]
    assert set(golden) <= set(pairs)
    for name in golden:
        assert relative_difference(pairs[name], golden[name]) <= 2e-5, name


@needs_golden
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (8, 10)])
def test_golden_position_embedding(size):
    golden = load_file(GOLDEN / "position_embedding" / "pos.safetensors")
    name = next(key for key in golden if key.startswith("2d.") and key.endswith(f".{size[0]}x{size[1]}"))
    channels = golden[name].shape[1]
    ours = sine_position_embedding(size, channels, torch.device("cpu"))
    torch.testing.assert_close(ours.T.reshape(1, channels, *size), golden[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_results_do_not_depend_on_batch_mates(backbone):
    model = tiny_model(backbone)
    sizes = [(50, 61), (96, 70), (33, 128), (52, 40)]  # the first and the last share a canvas
    pixels, mask = padded_batch(sizes)
    options = {"output_hidden_states": True, "output_auxiliary_logits": True, "output_attentions": True}
    with torch.no_grad():
        batch = model(pixels, pixel_mask=mask, **options)
        assert batch.image_sizes.tolist() == [list(size) for size in sizes]
        for index, (height, width) in enumerate(sizes):
            canvas = [-(-side // 32) * 32 for side in (height, width)]
            assert batch.canvas_sizes[index].tolist() == canvas
            # alone, with the image processor's padding and without any
            for h, w in ((height, width), canvas):
                alone_mask = mask[index : index + 1, :h, :w]
                alone = model(pixels[index : index + 1, :, :h, :w], pixel_mask=alone_mask, **options)
                for name, tensor in _tensors(alone):
                    other = dict(_tensors(batch))[name][index : index + 1]
                    corner = other[tuple(slice(side) for side in tensor.shape)]
                    scale = tensor.abs().max().clamp(min=1e-3)
                    assert ((tensor - corner).abs().max() / scale) <= 1e-5, (index, name)
                    if tensor.ndim == 4 and "logits" in name and other.shape != tensor.shape:
                        assert (other[..., tensor.shape[2] :, :] == -100).all()
                        assert (other[..., tensor.shape[3] :] == -100).all()


def _tensors(output, prefix=""):
    items = output.items() if hasattr(output, "items") else enumerate(output)
    for name, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value.float()
        elif value is not None:
            yield from _tensors(value, f"{prefix}{name}.")


def test_a_batch_of_equal_canvases_takes_one_pass(monkeypatch):
    model, calls = tiny_model("resnet"), []
    run = Mask2FormerModel._run
    monkeypatch.setattr(
        Mask2FormerModel, "_run", lambda self, x, **k: calls.append(tuple(x.shape)) or run(self, x, **k)
    )
    pixels, mask = padded_batch([(60, 64), (64, 50), (33, 40)])
    with torch.no_grad():
        model(pixels, pixel_mask=mask)
    assert calls == [(3, 3, 64, 64)]


def test_without_pixel_mask_the_whole_tensor_is_the_image():
    model, pixels = tiny_model("resnet"), torch.randn(2, 3, 50, 70)
    with torch.no_grad():
        output = model(pixels)
    assert output.image_sizes.tolist() == output.canvas_sizes.tolist() == [[50, 70]] * 2


def test_pixel_mask_must_be_one_rectangle_at_the_top_left():
    model, (pixels, mask) = tiny_model("resnet"), padded_batch([(64, 64)])
    mask[0, 3, 5] = 0
    with pytest.raises(ValueError, match=r"pixel_mask\[0\].*top left"):
        model(pixels, pixel_mask=mask)
    with pytest.raises(ValueError, match="pixel_mask has shape"):
        model(pixels, pixel_mask=mask[:, :10])


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_gradient_checkpointing_gives_equal_gradients(backbone):
    model = tiny_model(backbone).train()
    for module in model.modules():  # batch statistics would be updated twice by recomputation
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    pixels = torch.randn(2, 3, 64, 64)
    masks, labels = random_targets([3, 2], (64, 64))

    def gradients():
        model.zero_grad()
        generator = torch.Generator().manual_seed(1)
        model(pixels, mask_labels=masks, class_labels=labels, generator=generator).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    flags = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert {"Mask2FormerDecoderLayer", "Mask2FormerPixelDecoderEncoderLayer"} <= {type(m).__name__ for m in flags}
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6, msg=name)


def test_sdpa_and_eager_attention_agree():
    model, pixels = tiny_model(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model.config._attn_implementation == "sdpa"
        fast = model(pixels).class_queries_logits
        model.set_attn_implementation("eager")
        slow = model(pixels).class_queries_logits
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_half_precision_is_finite_and_close(backbone, dtype):
    model, pixels = Mask2FormerForUniversalSegmentation(tiny_config(backbone)).eval(), torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        exact = model(pixels)
        half = copy.deepcopy(model).to(dtype)(pixels.to(dtype))
        with torch.autocast("cpu", dtype=dtype):
            autocast = model(pixels)
    for output in (half, autocast):
        assert output.class_queries_logits.isfinite().all() and output.masks_queries_logits.isfinite().all()
        # Rounding can flip single attention mask bits, which changes a query for good: most queries must be close.
        difference = (output.class_queries_logits.float() - exact.class_queries_logits).abs().mean(-1)
        assert difference.median() <= 0.1 * exact.class_queries_logits.abs().mean()
    assert half.class_queries_logits.dtype == dtype


def test_coordinates_are_float32_in_every_dtype(monkeypatch):
    import mask2former_hf.model.deformable_attention as module

    seen, operator = [], module.multi_scale_deformable_attention
    monkeypatch.setattr(
        module,
        "multi_scale_deformable_attention",
        lambda value, shapes, locations, weights: (
            seen.append(locations) or operator(value, shapes, locations, weights)
        ),
    )
    model = tiny_model("resnet").to(torch.bfloat16)
    for layer in model.model.pixel_level_module.decoder.encoder.layers:  # sample at the reference points
        nn.init.zeros_(layer.self_attn.sampling_offsets.weight)
        nn.init.zeros_(layer.self_attn.sampling_offsets.bias)
    with torch.no_grad(), use_kernel("reference"):
        model(torch.randn(1, 3, 64, 808, dtype=torch.bfloat16))
    assert len(seen) == 2 and all(locations.dtype == torch.float32 for locations in seen)
    centres = (torch.arange(101) + 0.5) / 101
    assert not torch.equal(centres.bfloat16().float(), centres)
    torch.testing.assert_close(seen[0][0, -101:, 0, 0, 0, 0], centres)


def test_return_dict_false_works_with_labels():
    model, pixels = tiny_model(), torch.randn(2, 3, 64, 64)
    masks, labels = random_targets([3, 1], (64, 64))
    loss, class_logits, mask_logits, *_ = model(pixels, mask_labels=masks, class_labels=labels, return_dict=False)
    assert loss.ndim == 0 and class_logits.shape == (2, 10, 6) and mask_logits.shape == (2, 10, 16, 16)
    class_logits, mask_logits, *_ = model(pixels, return_dict=False)
    assert class_logits.shape == (2, 10, 6) and mask_logits.shape == (2, 10, 16, 16)


def test_without_auxiliary_loss_only_the_last_layer_is_supervised():
    model = tiny_model(use_auxiliary_loss=False).train()
    masks, labels = random_targets([3, 1], (64, 64))
    output = model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)
    assert output.loss_dict["loss_mask"].shape == (1,)
    output.loss.backward()


def test_dropout_drops_activations_and_no_layer():
    model = tiny_model(dropout=0.5).train()
    masks, labels = random_targets([3, 1], (64, 64))
    for _ in range(5):
        output = model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)
        assert output.loss_dict["loss_dice"].shape == (4,)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a, b = model(pixels), model(pixels)
        assert not torch.equal(a.class_queries_logits, b.class_queries_logits)
        c, d = model.eval()(pixels), model(pixels)
    assert torch.equal(c.class_queries_logits, d.class_queries_logits)


def test_absolute_position_embeddings_work_at_every_size():
    config = tiny_config()
    config.backbone_config.use_absolute_embeddings = True
    config.backbone_config.image_size = 64
    model = randomise(Mask2FormerForUniversalSegmentation(config)).eval()
    with torch.no_grad():
        for size in ((64, 64), (96, 128), (75, 101)):
            assert model(torch.randn(1, 3, *size)).class_queries_logits.isfinite().all()


def test_loss_terms_are_on_the_output_and_sum_to_the_loss():
    model = tiny_model()
    masks, labels = random_targets([3, 1], (64, 64))
    output = model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)
    assert set(output.loss_dict) == {"loss_cross_entropy", "loss_mask", "loss_dice"}
    assert all(terms.shape == (4,) for terms in output.loss_dict.values())
    torch.testing.assert_close(output.loss, sum(terms.sum() for terms in output.loss_dict.values()))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_trainable_parameter_gets_a_gradient(backbone):
    model = tiny_model(backbone).train()
    masks, labels = random_targets([3, 0], (64, 64))
    model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_inference_multiplies_full_resolution_masks_once(monkeypatch):
    model, products, mask_maps = tiny_model("resnet"), [], Mask2FormerModel.mask_maps
    monkeypatch.setattr(
        Mask2FormerModel, "mask_maps", lambda *args: products.append(args[2].shape[-2:]) or mask_maps(*args)
    )
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert products == [(16, 16)]


def test_training_step_computes_no_full_resolution_masks():
    model = tiny_model("resnet").train()
    masks, labels = random_targets([2], (64, 64))
    output = model(torch.randn(1, 3, 64, 64), mask_labels=masks, class_labels=labels)
    assert output.masks_queries_logits is None
    output = model(torch.randn(1, 3, 64, 64), mask_labels=masks, class_labels=labels, output_auxiliary_logits=True)
    assert output.masks_queries_logits.shape == (1, 10, 16, 16) and len(output.auxiliary_logits) == 3


def test_masked_attention_stays_inside_the_predicted_mask():
    model = tiny_model("resnet")
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96), output_attentions=True, output_auxiliary_logits=True)
    logits = output.auxiliary_logits[0]["masks_queries_logits"]
    resized = nn.functional.interpolate(logits, size=(2, 3), mode="bilinear", align_corners=False).flatten(2)
    inside = resized >= 0
    weights = output.cross_attentions[0].sum(1)  # (B, Q, S)
    for query in range(10):
        if inside[0, query].any():
            assert (weights[0, query][~inside[0, query]] == 0).all()
        else:
            assert (weights[0, query] > 0).all()


def test_labels_must_come_in_pairs_and_fit_the_input():
    model, pixels = tiny_model("resnet"), torch.randn(1, 3, 64, 64)
    masks, labels = random_targets([2], (64, 64))
    with pytest.raises(ValueError, match="mask_labels without class_labels"):
        model(pixels, mask_labels=masks)
    with pytest.raises(ValueError, match=r"mask_labels\[0\] has shape \(2, 32, 32\)"):
        model(pixels, mask_labels=[masks[0][:, :32, :32]], class_labels=labels)
    with pytest.raises(ValueError, match="pixel_values has shape"):
        model(pixels[0])
