"""Training in half precision: no NaN, and what must be float32 is."""

import pytest
import torch
from helpers import SHARED, random_targets, tiny_model

from mask2former_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor
from mask2former_hf.data.augmentation import AugmentedDataset, augmentation_for
from mask2former_hf.data.coco import CocoPanoptic
from mask2former_hf.data.scenes import ID2LABEL, ScenesDataset
from mask2former_hf.model import criterion, mask_logits
from mask2former_hf.training.backbones import new_model
from mask2former_hf.training.collation import SegmentationCollator
from mask2former_hf.training.optimization import parameter_groups

HALF = [torch.bfloat16, torch.float16]
PANOPTIC = SHARED / "data" / "coco_panoptic"


def scenes():
    model = tiny_model("swin", id2label=ID2LABEL, num_queries=16)
    return model, ScenesDataset(16, size=64)


def photos():
    if not PANOPTIC.is_dir():
        pytest.skip("annotated images (../shared/data) not found")
    annotations = PANOPTIC / "annotations" / "panoptic_val_clean.json"
    reader = CocoPanoptic(PANOPTIC / "val", annotations, PANOPTIC / "panoptic_val")
    torch.manual_seed(0)
    model = new_model("tiny", reader.classes, "panoptic", num_queries=60)
    return model, AugmentedDataset(reader, augmentation_for("panoptic", 96), seed=0)


def train(model, data, dtype, steps=6):
    """Autocast with loss scaling, as a training loop does; the losses."""
    collate = SegmentationCollator(Mask2FormerImageProcessor(do_resize=False))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, backbone_multiplier=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == torch.float16)
    model.train()
    losses, torch_state = [], torch.random.get_rng_state()
    for step in range(steps):
        torch.random.set_rng_state(torch_state)  # the same points in every run
        batch = collate([data[(2 * step + index) % len(data)] for index in range(2)])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("make", [scenes, photos])
def test_autocast_training_stays_finite_and_near_float32(make, dtype):
    model, data = make()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = train(model, data, torch.float32)
    model.load_state_dict(start)
    half = train(model, data, dtype)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert half[0] == pytest.approx(full[0], rel=0.02)
    assert half == pytest.approx(full, rel=0.1)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_loss_matching_and_coordinates_stay_float32_under_autocast(dtype, monkeypatch):
    sampled, costs = [], []
    sample, cost = mask_logits.sample_maps, criterion.matching_costs

    def watched_sample(maps, points):
        result = sample(maps, points)
        sampled.append((points.dtype, result.dtype))
        return result

    def watched_cost(class_logits, point_logits, labels, point_targets, *rest, **options):
        result = cost(class_logits, point_logits, labels, point_targets, *rest, **options)
        costs.append((point_logits.dtype, result.dtype))
        return result

    for module in (criterion, mask_logits):
        monkeypatch.setattr(module, "sample_maps", watched_sample)
    monkeypatch.setattr(criterion, "matching_costs", watched_cost)
    model, _ = scenes()
    masks, labels = random_targets([3, 2], (64, 64))
    with torch.autocast("cpu", dtype):
        output = model.train()(torch.randn(2, 3, 64, 64), mask_labels=masks, class_labels=labels)
    assert output.loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in output.loss_dict.values())
    assert sampled and set(sampled) == {(torch.float32, torch.float32)}
    assert costs and set(costs) == {(torch.float32, torch.float32)}


def test_mask_logits_beyond_the_range_of_float16_keep_the_loss_finite():
    """The product of embedding and features, 1e6, is computed in float32; float16 ends at 65504."""
    model, _ = scenes()
    masks, labels = random_targets([3, 2], (64, 64))
    torch.manual_seed(0)
    embeddings = (500 * torch.randn(2, 2, 16, 32)).half().requires_grad_()
    features = (500 * torch.randn(2, 32, 16, 16)).half().requires_grad_()
    logits = torch.einsum("lbqc,bchw->lbqhw", embeddings.detach().float(), features.detach().float())
    assert logits.abs().max() > 65504
    terms = model.criterion(
        torch.randn(2, 2, 16, 6), mask_logits.LazyMasks(embeddings, features), masks, labels, canvas=(64, 64)
    )
    total = sum(term.sum() for term in terms.values())
    assert torch.isfinite(total)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_model_loaded_in_half_precision_trains_a_step(dtype, tmp_path):
    model, _ = scenes()
    model.save_pretrained(tmp_path)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, dtype=dtype).train()
    assert model.class_predictor.weight.dtype == dtype
    masks, labels = random_targets([3, 2], (64, 64))
    output = model(torch.randn(2, 3, 64, 64, dtype=dtype), mask_labels=masks, class_labels=labels)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.isfinite(output.loss) and len(gradients) > 100
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
