"""`torch.func` and derivatives in forward mode: torch's own path, with torch's values or torch's refusal."""

import pytest
import torch
from helpers import tiny_model
from torch.func import grad, jvp, vmap

from mask2former_hf.model import onednn

PIXELS = torch.randn(2, 1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["swin", "resnet", "frozen resnet", "convnext"])
def masks_of(request, monkeypatch):
    monkeypatch.setattr(onednn, "made_by_amd", lambda: True)  # with all the products that there are
    *frozen, backbone = request.param.split()
    model = tiny_model(backbone, freeze_batch_norm=bool(frozen)).eval()
    model.set_attn_implementation("eager")  # of torch's fused attention on CPUs no function has a derivative
    return lambda pixels: model(pixel_values=pixels).masks_queries_logits


def test_a_functions_gradient_is_that_of_autograd(masks_of):
    found = grad(lambda pixels: masks_of(pixels).square().mean())(PIXELS[0])
    pixels = PIXELS[0].clone().requires_grad_()
    masks_of(pixels).square().mean().backward()
    torch.testing.assert_close(found, pixels.grad, rtol=1e-3, atol=1e-4 * found.abs().max().item())


def test_a_function_is_mapped_over_batches(masks_of):
    with torch.no_grad():
        found, one_by_one = vmap(masks_of)(PIXELS), torch.stack([masks_of(pixels) for pixels in PIXELS])
    torch.testing.assert_close(found, one_by_one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_derivative_in_forward_mode_is_refused_by_torch_and_not_zero(masks_of, recorded):
    with torch.set_grad_enabled(recorded), pytest.raises(NotImplementedError, match="forward AD"):
        jvp(masks_of, (PIXELS[0],), (torch.ones_like(PIXELS[0]),))  # grid_sample has none
