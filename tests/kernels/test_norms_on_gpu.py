"""The norms in Triton against torch's in float64, with the sums and ReLUs around them.

On a machine with a GPU the tests run there. Without one they run in Triton's interpreter, which must be chosen before
Triton is imported: test_window_attention.py starts this file in its process with the interpreter.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from triton_runs import DEVICE, needs_kernel

from mask2former_hf.kernels import norms

pytestmark = needs_kernel
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def maps(shape, dtype, seed=0, mean=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def with_random_parameters(norm):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in norm.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if name == "running_var" else noise)
    return norm.to(DEVICE).eval()


def expected(norm, x, plus, rectify):
    y = norm.double()(x.double())
    y = y if plus is None else y + plus.double()
    norm.float()
    return F.relu(y) if rectify else y


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("channels, with_sum, rectify", [(48, False, True), (300, True, True), (16, False, False)])
def test_batch_norm_with_sum_and_relu(channels, with_sum, rectify, dtype):
    norm, x = with_random_parameters(nn.BatchNorm2d(channels)), maps((2, channels, 5, 7), dtype)
    plus = maps(x.shape, dtype, seed=1) if with_sum else None
    exact = expected(norm, x, plus, rectify)
    norms.batch_norm_(x, norm, plus, rectify)
    torch.testing.assert_close(x.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize(
    "channels, groups, size, with_sum, rectify",
    [(64, 32, (9, 13), True, True), (256, 8, (1, 1), False, True), (32, 32, (14, 11), False, False)],
)
def test_group_norm_with_sum_and_relu(channels, groups, size, with_sum, rectify, dtype, monkeypatch):
    monkeypatch.setattr(norms, "PARTS", 2)  # so that a program goes through rows in several steps
    monkeypatch.setattr(norms, "TILE", 512)
    mean = 30.0 if dtype == torch.float32 else 3.0  # many deviations: where sums of squares would cancel
    norm, x = with_random_parameters(nn.GroupNorm(groups, channels)), maps((2, channels, *size), dtype, mean=mean)
    x[:, :, 0, 0] = 0  # as a corner is, of a convolution that pads with zeros
    plus = maps(x.shape, dtype, seed=1) if with_sum else None
    exact = expected(norm, x, plus, rectify)
    norms.group_norm_(x, norm, plus, rectify)
    torch.testing.assert_close(x.double(), exact, rtol=3 * TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize(
    "channels, with_update, keep_sum", [(32, False, False), (192, True, False), (1500, True, True)]
)
def test_layer_norm_of_a_sum(channels, with_update, keep_sum, dtype):
    norm = with_random_parameters(nn.LayerNorm(channels))
    x, update = (torch.randn(3, 5, channels, device=DEVICE).to(dtype) for _ in range(2))
    total, normed = norms.layer_norm(x, norm, update if with_update else None, keep_sum)
    exact = x.double() + update.double() if with_update else x.double()
    assert (total is None) == (not keep_sum)
    if keep_sum:
        torch.testing.assert_close(total.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(normed.double(), norm.double()(exact), rtol=TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


def test_a_group_norm_whose_channels_are_no_power_of_two_does_not_fit():
    assert norms.fits_group_norm(256, 32) and not norms.fits_group_norm(96, 32)
