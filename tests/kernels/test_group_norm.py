"""The compiled group norm against torch's in float64, and where it leaves the work to torch."""

import pytest
import torch
from helpers import pack_weights
from torch import nn

from mask2former_hf.kernels import cpu, group_norm_, use_kernel

MISSING = cpu.why_not(torch.device("cpu"), torch.float32)
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernel: {MISSING}")


def innermost(*shape):
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def norm_of(groups, channels):
    norm = nn.GroupNorm(groups, channels)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.requires_grad_(False)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, groups", [((1, 256, 40, 41), 32), ((2, 40, 33, 17), 4), ((2, 6, 3, 1), 3)])
def test_values_equal_torch_s_in_float64_also_far_from_zero(shape, groups, dtype):
    torch.manual_seed(0)
    norm = norm_of(groups, shape[1])
    x, plus = (innermost(*shape) + 10 * torch.randn(shape[1], 1, 1)).to(dtype), innermost(*shape).to(dtype)
    exact = norm.double()(x.double())
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    for summand, rectify in ((None, False), (plus, False), (plus, True)):
        found, expected = x.clone(), exact if summand is None else exact + summand.double()
        with torch.no_grad():
            assert group_norm_(found, norm, summand, rectify)
        torch.testing.assert_close(found.double(), expected.relu() if rectify else expected, **tolerance)


@needs_cpp
def test_a_number_that_is_none_spoils_its_group_alone():
    norm, x = norm_of(2, 32), innermost(1, 32, 5, 5)
    x[0, 3, 2, 2] = float("nan")
    with torch.no_grad():
        assert group_norm_(x, norm, None, True)
    assert x[0, :16].isnan().all() and x[0, 16:].isfinite().all()


@pytest.mark.parametrize("name, dtype", [("triton", torch.float32), ("cpp", torch.float64), ("cpp", torch.float16)])
def test_a_kernel_asked_for_by_name_that_has_no_group_norm_stops_nothing(name, dtype):
    """It is meant for deformable attention, which some pixel decoders do not have."""
    x = innermost(1, 32, 5, 5).to(dtype)
    with torch.no_grad(), use_kernel(name):
        assert not group_norm_(x, norm_of(2, 32).to(dtype))


@needs_cpp
def test_graphs_other_layouts_dtypes_and_kernels_are_left_to_torch():
    norm, x = norm_of(2, 32), innermost(1, 32, 5, 5)
    before = x.clone()
    assert not group_norm_(x, norm)  # a graph may be recorded
    with torch.no_grad():
        assert not group_norm_(x.contiguous(), norm) and not group_norm_(x.double(), norm)
        assert not group_norm_(x, norm, plus=x.contiguous()) and not group_norm_(x, nn.GroupNorm(2, 32, affine=False))
        with use_kernel("reference"):
            assert not group_norm_(x, norm)
        with use_kernel("cpp"):
            assert group_norm_(x.clone(), norm)
        with torch.autocast("cpu", torch.bfloat16):
            assert not group_norm_(x, norm)
        assert not group_norm_(x, pack_weights(norm, nn.GroupNorm))  # it has no memory
    assert torch.equal(x, before)
