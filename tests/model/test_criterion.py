"""Matching and losses against the original's recorded tensors, stock transformers and plain formulas."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers import (
    GOLDEN,
    golden_case,  # noqa: F401
    needs_golden,
    padded_batch,
    random_targets,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.model.criterion import LossSettings, Mask2FormerLoss
from mask2former_hf.model.mask_logits import DenseMasks, LazyMasks, sample_masks
from mask2former_hf.model.mask_losses import CrossEntropy, Dice, Focal, loss_weights
from mask2former_hf.model.matcher import assign

TERMS = {"loss_cross_entropy": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


def small_loss(**changes):
    config = Mask2FormerConfig(**({"num_labels": 5, "train_num_points": 200} | changes))
    return Mask2FormerLoss(LossSettings.from_config(config))


@needs_golden
def test_golden_losses_assignments_and_gradients(golden_case, tmp_path, monkeypatch):  # noqa: F811
    model, golden = golden_case.model(tmp_path), golden_case.json("losses.json")
    golden_case.replay(model.criterion)
    solved = []
    record = lambda *args: solved.append(assign(*args)) or solved[-1]  # noqa: E731
    monkeypatch.setattr("mask2former_hf.model.criterion.assign", record)
    output = model(
        golden_case.pixel_values,
        pixel_mask=golden_case.pixel_mask,
        mask_labels=golden_case.mask_labels,
        class_labels=golden_case.class_labels,
    )
    last = golden_case.num_layers - 1
    for term, name in TERMS.items():
        for layer, value in enumerate(output.loss_dict[term].tolist()):
            assert value == pytest.approx(golden["weighted"][name + f"_{layer}" * (layer < last)], rel=1e-5), term
    assert output.loss.item() == pytest.approx(golden["total"], rel=1e-5)
    for image, (queries, targets) in enumerate(solved[0]):
        for layer in range(golden_case.num_layers):
            recorded = golden["assignments"][f"{'final' if layer == last else f'aux{layer}'}.image{image}"]
            assert queries[layer].tolist() == recorded["query"] and targets[layer].tolist() == recorded["target"]


@needs_golden
def test_golden_gradients(golden_case, tmp_path):  # noqa: F811
    """Gradients, saved like weights, have the norms that the original's have under its own names.

    In float64: at the kinks of bilinear sampling float32 rounding moves gradients by 5e-4 (input noise of 3e-7 does).
    """
    from mask2former_hf.conversion.original import translate

    if not (golden_case.folder / "grad_norms.json").exists():
        pytest.skip("no gradients are recorded for this case")
    golden = golden_case.json("grad_norms.json")
    model = golden_case.model(tmp_path).double()
    golden_case.replay(model.criterion)
    model(
        golden_case.pixel_values.double(),
        pixel_mask=golden_case.pixel_mask,
        mask_labels=golden_case.mask_labels,
        class_labels=golden_case.class_labels,
    ).loss.backward()
    named = {}
    for name, parameter in model.named_parameters():
        named[name] = parameter.grad
    from transformers.core_model_loading import revert_weight_conversion

    on_disk = revert_weight_conversion(model, {k: v for k, v in named.items() if v is not None})
    checked = 0
    for name, norm in golden.items():
        target = translate(name)
        if target is None or not norm:
            continue
        names = target if isinstance(target, tuple) else (target,)
        if names[0] not in on_disk:  # frozen here or a buffer
            assert "norm" in name or "empty_weight" in name, name
            continue
        ours = torch.cat([on_disk[part].flatten() for part in names]).norm().item()
        if norm > 1e-4:  # key biases have no gradient in theory
            assert ours == pytest.approx(norm, rel=1e-4), name
            checked += 1
    assert checked > 150


@needs_golden
@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
def test_golden_edge_cases(case, lazy):
    """No targets, more targets than queries, one target: the original's criterion with its recorded draws."""
    info = json.loads((GOLDEN / "loss_edge_cases" / "info.json").read_text())
    tensors = load_file(GOLDEN / "loss_edge_cases" / "tensors.safetensors")
    own = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{case}.")}
    masks = [own[f"masks.{b}"] for b in range(2)]
    labels = [own[f"labels.{b}"] for b in range(2)]
    matched = [min(7, len(label)) for label in labels]
    candidates, uniform = own["rand.2"].split(matched), own["rand.3"].split(matched)
    draws = {
        "matching": [own["rand.0"], own["rand.1"]],
        "candidates": [points.unsqueeze(0) for points in candidates],
        "uniform": [points.unsqueeze(0) for points in uniform],
    }
    criterion = small_loss(num_labels=info["num_classes"], train_num_points=info["num_points"])
    criterion.draw_points = lambda purpose, image, *rest: draws[purpose][image]
    logits = own["pred_masks"].unsqueeze(0)
    if lazy:  # features that are one-hot in the query reproduce any logits
        logits = LazyMasks(torch.eye(7).expand(1, 2, 7, 7), own["pred_masks"])
    losses = criterion(own["pred_logits"].unsqueeze(0), logits, masks, labels)
    for term, name in TERMS.items():
        assert losses[term].item() == pytest.approx(info["cases"][case]["losses"][name], rel=1e-5, abs=1e-7)


def test_losses_equal_stock_with_the_same_points(monkeypatch):
    """Stock draws with torch.rand in the original's order; its criterion sees the same logits and points."""
    stock_config = transformers.Mask2FormerConfig(num_labels=5, train_num_points=50)
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss as StockLoss

    stock = StockLoss(stock_config, loss_weights(stock_config))
    ours = small_loss(train_num_points=50)
    masks, labels = random_targets([4, 2], (48, 64))
    class_logits, mask_logits = torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 12, 16) * 3
    rand, drawn = torch.rand, []
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(rand(*a, **k)) or drawn[-1])
    theirs = stock(mask_logits[0], class_logits[0], [m.float() for m in masks], labels)
    matching, (candidates, uniform) = drawn[:2], drawn[2:]
    draws = {"matching": matching, "candidates": candidates.split([4, 2]), "uniform": uniform.split([4, 2])}
    ours.draw_points = lambda purpose, image, layers, shape, *rest: draws[purpose][image].reshape(shape)
    for term, value in ours(class_logits, mask_logits, masks, labels).items():
        torch.testing.assert_close(value[0], theirs[term].reshape(()), rtol=1e-5, atol=1e-6)


def test_lazy_and_dense_masks_give_equal_losses_and_gradients():
    embeddings = torch.randn(3, 2, 7, 16, requires_grad=True)
    features = torch.randn(2, 16, 12, 16, requires_grad=True)
    class_logits = torch.randn(3, 2, 7, 6, requires_grad=True)
    masks, labels = random_targets([3, 9], (48, 64))
    gradients = []
    for lazy in (True, False):
        logits = LazyMasks(embeddings, features)
        if not lazy:
            logits = DenseMasks(torch.einsum("lbqc,bchw->lbqhw", embeddings, features))
        losses = small_loss()(class_logits, logits, masks, labels, generator=torch.Generator().manual_seed(3))
        gradients.append(torch.autograd.grad(sum(x.sum() for x in losses.values()), [embeddings, features]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_mask_samples_equal_grid_sample_of_padded_float_masks(monkeypatch):
    masks = (torch.rand(5, 20, 31) > 0.5).to(torch.uint8)
    points = torch.rand(1, 500, 2) * 1.2 - 0.1  # some outside
    padded = F.pad(masks.float(), (0, 64 - 31, 0, 32 - 20))
    expected = F.grid_sample(padded[None], 2 * points[:, None] - 1, align_corners=False)[0]
    torch.testing.assert_close(sample_masks(masks, points[None], (32, 64)), expected, atol=4e-6, rtol=0)
    points = torch.rand(5, 3, 100, 2)
    expected = F.grid_sample(padded[:, None], 2 * points - 1, align_corners=False)[:, 0]
    monkeypatch.setattr("mask2former_hf.model.mask_logits.chunk_length", lambda elements, device: 2)
    torch.testing.assert_close(sample_masks(masks.bool(), points, (32, 64)), expected, atol=4e-6, rtol=0)


def test_pairwise_costs_equal_the_published_formulas():
    logits, targets, weights = torch.randn(2, 4, 30), torch.rand(1, 3, 30), (torch.rand(1, 30) > 0.3).float()
    entropy, dice = (term.pairs(logits, targets, weights) for term in (CrossEntropy(), Dice()))
    valid = weights[0].bool()
    for layer in range(2):
        for q in range(4):
            for n in range(3):
                x, t = logits[layer, q, valid], targets[0, n, valid]
                p = x.sigmoid()
                expected = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
                torch.testing.assert_close(entropy[layer, q, n], expected, rtol=1e-4, atol=1e-5)
                expected = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
                torch.testing.assert_close(dice[layer, q, n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("term", [CrossEntropy(), Focal(0.25, 2.0), Dice()], ids=lambda term: type(term).__name__)
@pytest.mark.parametrize("weighted", [False, True])
def test_both_forms_of_a_mask_term_are_one_formula(term, weighted):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 30) * 3, torch.rand(2, 3, 30)
    weights = (torch.rand(2, 30) > 0.3).float() if weighted else None
    pairs = term.pairs(logits, targets, weights)
    assert pairs.shape == (2, 4, 3)
    for q in range(4):
        for n in range(3):
            torch.testing.assert_close(
                pairs[:, q, n], term.rows(logits[:, q], targets[:, n], weights), rtol=1e-4, atol=1e-5
            )


def test_assignment_equals_scipy_for_every_layer_and_image():
    costs = [torch.randn(3, 6, n) for n in (4, 0, 9)]
    for cost, (queries, targets) in zip(costs, assign(costs), strict=True):
        assert queries.shape == targets.shape == (3, min(6, cost.shape[2]))
        for layer in range(3):
            rows, columns = linear_sum_assignment(cost[layer].numpy())
            assert queries[layer].tolist() == rows.tolist() and targets[layer].tolist() == columns.tolist()


def test_one_host_copy_for_all_layers_and_images(monkeypatch):
    model = tiny_model("resnet").train()
    masks, labels = random_targets([3, 2], (64, 64))
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *a, **k: copies.append(self.shape) or cpu(self, *a, **k))
    model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)
    assert copies == [torch.Size([4 * 10 * (3 + 2)])]


def test_integer_and_bool_targets_equal_float_targets():
    model, pixels = tiny_model("resnet"), torch.randn(2, 3, 64, 64)
    masks, labels = random_targets([3, 2], (64, 64))
    losses = [
        model(
            pixels,
            mask_labels=[mask.to(dtype) for mask in masks],
            class_labels=labels,
            generator=torch.Generator().manual_seed(0),
        ).loss
        for dtype in (torch.uint8, torch.bool, torch.float32)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_loss_is_reproducible_from_a_generator():
    model, pixels = tiny_model("resnet"), torch.randn(1, 3, 64, 64)
    masks, labels = random_targets([3], (64, 64))

    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return model(pixels, mask_labels=masks, class_labels=labels, generator=generator).loss.item()

    assert loss(0) == loss(0) != loss(1)


def test_targets_of_image_size_equal_targets_padded_with_zeros():
    model, sizes = tiny_model("resnet"), [(50, 61), (64, 40)]
    pixels, pixel_mask = padded_batch(sizes)
    unpadded = [random_targets([2], size)[0][0] for size in sizes]
    padded = [F.pad(m, (0, 64 - m.shape[2], 0, 64 - m.shape[1])) for m in unpadded]
    losses = [
        model(
            pixels,
            pixel_mask=pixel_mask,
            mask_labels=masks,
            class_labels=[torch.tensor([0, 1])] * 2,
            generator=torch.Generator().manual_seed(0),
        ).loss.item()
        for masks in (unpadded, padded)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_ignored_pixels_take_no_part_in_matching_and_loss():
    criterion = small_loss()
    masks, labels = random_targets([4], (48, 64))
    ignored = torch.zeros(48, 64, dtype=torch.bool)
    ignored[10:30, 20:50] = True
    class_logits, mask_logits = torch.randn(2, 1, 7, 6), torch.randn(2, 1, 7, 48, 64)
    other = masks[0].clone()
    other[:, ignored] = 1 - other[:, ignored]
    values = []
    for target in (masks[0], other):
        losses = criterion(
            class_logits, mask_logits, [target], labels, [ignored], generator=torch.Generator().manual_seed(0)
        )
        values.append(torch.cat(list(losses.values())))
    assert torch.equal(values[0], values[1])
    without = criterion(class_logits, mask_logits, [other], labels, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(torch.cat(list(without.values())), values[0])


def test_an_image_that_is_ignored_entirely_gives_no_mask_gradient():
    logits = torch.randn(1, 1, 7, 12, 16, requires_grad=True)
    masks, labels = random_targets([2], (48, 64))
    losses = small_loss()(torch.randn(1, 1, 7, 6), logits, masks, labels, [torch.ones(48, 64)])
    (losses["loss_mask"] + losses["loss_dice"]).sum().backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("counts", [[0, 0], [0, 3], [25, 1]], ids=["no targets", "one empty", "more than queries"])
def test_any_number_of_targets_trains(counts):
    model = tiny_model("resnet").train()
    masks, labels = random_targets(counts, (64, 64))
    output = model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)
    output.loss.backward()
    assert output.loss.isfinite()
    if sum(counts) == 0:
        assert output.loss_dict["loss_mask"].sum() == output.loss_dict["loss_dice"].sum() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_matching_and_losses_are_float32_under_autocast():
    model, pixels = tiny_model("resnet").train(), torch.randn(2, 3, 64, 64)
    masks, labels = random_targets([2, 3], (64, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels, mask_labels=masks, class_labels=labels)
    assert all(terms.dtype == torch.float32 for terms in output.loss_dict.values())
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_predictions_that_are_not_finite_name_layer_and_image():
    mask_logits = torch.randn(3, 2, 7, 12, 16)
    mask_logits[2, 1, 3] = float("nan")
    masks, labels = random_targets([2, 3], (48, 64))
    with pytest.raises(ValueError, match=r"image 1 of the batch.*layer 2.*float32"):
        small_loss()(torch.randn(3, 2, 7, 6), mask_logits, masks, labels)


def test_labels_that_do_not_fit_are_refused():
    criterion, logits = small_loss(), (torch.randn(1, 1, 7, 6), torch.randn(1, 1, 7, 12, 16))
    masks, labels = random_targets([2], (48, 64))
    with pytest.raises(ValueError, match="mask_labels has 2 entries for a batch of 1"):
        criterion(*logits, masks * 2, labels * 2)
    with pytest.raises(ValueError, match=r"class_labels\[0\] has shape \(1,\)"):
        criterion(*logits, masks, [labels[0][:1]])
    with pytest.raises(ValueError, match=r"class_labels\[0\] contains \[5\].*0 to 4"):
        criterion(*logits, masks, [torch.tensor([0, 5])])
    with pytest.raises(ValueError, match=r"ignore_masks\[0\] has shape"):
        criterion(*logits, masks, labels, [torch.zeros(3, 3)])
    with pytest.raises(ValueError, match=r"class_labels\[0\] is torch.float32"):
        criterion(*logits, masks, [labels[0].float()])
    for wrong in (masks[0].to(torch.uint8) * 255, masks[0].long() - 1, masks[0].float() * float("nan")):
        with pytest.raises(ValueError, match=r"mask_labels\[0\] has values from .* masks are 0 or 1"):
            criterion(*logits, [wrong], labels)


def test_training_lowers_the_loss_on_one_image():
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(tiny_config("resnet", train_num_points=256)).train()
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[:, 0, :, 32:] = 1.0
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, :, :32] = masks[1, :, 32:] = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = model(pixels, mask_labels=[masks], class_labels=[torch.tensor([0, 1])]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
