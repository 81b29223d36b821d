"""Focal loss as mask term: against the published formula, for single values, matching costs and the whole loss."""

import copy
import math

import pytest
import torch
from helpers import random_targets, tiny_config, tiny_model

from mask2former_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from mask2former_hf.model.criterion import LossSettings, Mask2FormerLoss
from mask2former_hf.model.mask_losses import CrossEntropy, Focal
from mask2former_hf.model.matcher import matching_costs

FOCAL = (0.25, 2.0)


def published(logit, target, alpha, gamma):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), equation 5 of arXiv 1708.02002, for a target of 0 or 1."""
    p = 1 / (1 + math.exp(-logit))
    p_t, alpha_t = (p, alpha) if target else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * math.log(p_t)


@pytest.mark.parametrize("focal", [(0.25, 2.0), (0.5, 0.0), (0.9, 1.0), (0.1, 3.5), (0, 2), (1, 2)])
def test_values_are_those_of_the_published_formula(focal):
    logits = [-12.0, -3.0, -0.5, 0.0, 0.7, 4.0, 12.0]
    positive, negative = Focal(*focal).halves(torch.tensor(logits, dtype=torch.float64))
    assert positive.tolist() == pytest.approx([published(x, 1, *focal) for x in logits], rel=1e-9)
    assert negative.tolist() == pytest.approx([published(x, 0, *focal) for x in logits], rel=1e-9)


def test_large_logits_give_finite_values_and_gradients():
    logits = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    positive, negative = Focal(*FOCAL).halves(logits)
    (positive + negative).sum().backward()
    assert positive.tolist() == pytest.approx([2500, 50, 0, 0]) and negative.tolist() == pytest.approx(
        [0, 0, 150, 7500]
    )
    assert logits.grad.isfinite().all()


def test_pairwise_costs_are_means_of_the_formula():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 3, 40) * 3, (torch.rand(2, 4, 40) > 0.5).float()
    weights = (torch.rand(2, 40) > 0.3).float()
    for point_weights in (None, weights):
        costs = Focal(*FOCAL).pairs(logits, targets, point_weights)
        counted = torch.ones(2, 40) if point_weights is None else point_weights
        for layer, query, target in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
            kept = counted[layer].bool()
            pairs = zip(logits[layer, query][kept].tolist(), targets[layer, target][kept].tolist(), strict=True)
            expected = sum(published(x, t, *FOCAL) for x, t in pairs) / kept.sum().item()
            assert costs[layer, query, target].item() == pytest.approx(expected, rel=1e-4)


def test_gamma_0_and_alpha_a_half_is_half_the_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 5, 60), torch.rand(1, 3, 60)
    focal = Focal(0.5, 0.0).pairs(logits, targets, None)
    entropy = CrossEntropy().pairs(logits, targets, None)
    torch.testing.assert_close(2 * focal, entropy, rtol=1e-5, atol=1e-6)


def focal_criterion(num_points):
    fields = {"mask_loss": "focal", "focal_alpha": FOCAL[0], "focal_gamma": FOCAL[1]}
    config = Mask2FormerConfig(num_labels=2, train_num_points=num_points, **fields)
    return Mask2FormerLoss(LossSettings.from_config(config))


def test_cost_and_loss_of_the_criterion_follow_the_formula():
    """One query and one target, maps of one value each, seen at their middle: every point has the same logit."""
    criterion = focal_criterion(num_points=30)
    masks = [torch.ones(1, 16, 16, dtype=torch.uint8)]
    criterion.draw_points = lambda purpose, image, layers, shape, device, generator: torch.full(shape, 0.5)
    losses = criterion(torch.zeros(1, 1, 1, 3), torch.full((1, 1, 1, 4, 4), 0.7), masks, [torch.tensor([1])])
    assert losses["loss_mask"].item() == pytest.approx(published(0.7, 1, *FOCAL), rel=1e-5)
    cost = matching_costs(
        torch.zeros(1, 1, 3),
        torch.full((1, 1, 30), 0.7),
        torch.tensor([1]),
        torch.ones(1, 1, 30),
        None,
        {"loss_cross_entropy": 0, "loss_mask": 5},
        {"loss_mask": Focal(*FOCAL)},
    )
    assert cost.item() == pytest.approx(5 * published(0.7, 1, *FOCAL), rel=1e-5)


def test_ignored_pixels_take_no_part_in_the_focal_loss():
    criterion = focal_criterion(num_points=200)
    target, ignored = torch.zeros(1, 32, 32, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.bool)
    target[:, :, :16] = 1
    ignored[:, 16:] = True
    losses = []
    for right in (-9.0, 9.0):  # right or wrong where nothing is stated
        logits = torch.full((1, 1, 1, 32, 32), 2.0)
        logits[..., 16:] = right
        generator = torch.Generator().manual_seed(0)
        losses.append(
            criterion(torch.zeros(1, 1, 1, 3), logits, [target], [torch.tensor([0])], [ignored], generator=generator)
        )
    assert losses[0]["loss_mask"].item() == pytest.approx(losses[1]["loss_mask"].item(), rel=0.2)


def loss_of(model, seed=0):
    masks, labels = random_targets([3, 2], (64, 64))
    torch.manual_seed(seed)
    return model(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)


def test_default_is_cross_entropy_whatever_alpha_and_gamma_say():
    model = tiny_model("resnet")
    assert model.config.mask_loss == "bce" and model.criterion.settings.mask_terms["loss_mask"] == CrossEntropy()
    other = Mask2FormerForUniversalSegmentation(tiny_config("resnet", focal_alpha=0.9, focal_gamma=5.0)).eval()
    other.load_state_dict(model.state_dict())
    assert loss_of(model).loss.item() == loss_of(other).loss.item()


def test_field_reaches_the_loss_and_survives_saving(tmp_path):
    fields = {"mask_loss": "focal", "focal_alpha": 0.6, "focal_gamma": 1.5}
    model = tiny_model("resnet", **fields)
    model.save_pretrained(tmp_path)
    again = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).eval()
    assert again.criterion.settings.mask_terms["loss_mask"] == Focal(0.6, 1.5)
    assert loss_of(again).loss.item() == loss_of(model).loss.item()
    entropy = tiny_model("resnet")
    entropy.load_state_dict(model.state_dict())
    assert (loss_of(model).loss_dict["loss_mask"] < loss_of(entropy).loss_dict["loss_mask"]).all()


def test_focal_loss_trains():
    model = copy.deepcopy(tiny_model("resnet", mask_loss="focal", mask_weight=20.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = None
    for _ in range(25):
        loss = loss_of(model).loss
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask_loss": "dice"}, "mask_loss='dice'.*bce, focal"),
        ({"mask_loss": "focal", "focal_alpha": 1.5}, "focal_alpha=1.5.*between 0 and 1"),
        ({"focal_gamma": -1.0}, "focal_gamma=-1.0.*0 or more"),
    ],
)
def test_bad_values_are_refused_with_the_rule(fields, message):
    with pytest.raises(Exception, match=message):
        tiny_config("resnet", **fields)
