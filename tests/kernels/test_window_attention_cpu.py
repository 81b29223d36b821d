"""The compiled attention of Swin's windows against its formula in float64, and where it leaves the work to torch."""

import pytest
import torch
from helpers import pack_weights
from torch import nn

from mask2former_hf.kernels import attend_in_windows, attend_in_windows_backward, cpu, use_kernel

MISSING = cpu.why_not(torch.device("cpu"), torch.float32)
needs_cpp = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernel: {MISSING}")
SCALE = 0.3


def problem(windows, side, heads, width, padding, seams, dtype=torch.float32):
    """Arguments of `attend_in_windows`, tokens in no order."""
    torch.manual_seed(0)
    n, C = side * side, heads * width
    N = windows * n - padding
    places = torch.arange(windows * n).clamp(max=N)[torch.randperm(windows * n)]
    projected, fill = torch.randn(N, 3 * C).to(dtype), torch.randn(3 * C).to(dtype)
    seam = torch.where(torch.rand(seams, n, n) < 0.3, -100.0, 0.0) if seams else None
    return projected, fill, places, torch.randn(heads, n, n), seam, SCALE


def formula(projected, fill, places, bias, seam, scale):
    h, n, _ = bias.shape
    C = projected.shape[1] // 3
    rows = torch.cat([projected, fill[None]])[places].view(-1, n, 3, h, C // h)
    query, key, value = rows.permute(2, 0, 3, 1, 4)  # (w, h, n, D)
    scores = scale * query @ key.mT + bias
    if seam is not None:
        scores = torch.cat([scores[: len(scores) - len(seam)], scores[len(scores) - len(seam) :] + seam[:, None]])
    attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, C)
    return torch.empty_like(projected[:, :C]).index_put(
        (places[places < len(projected)],), attended[places < len(projected)]
    )


@needs_cpp
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(
    "sizes",
    [
        *((19, 7, 3, 32, 40, 5), (9, 4, 2, 8, 3, 9), (2, 12, 1, 40, 0, 0), (3, 12, 2, 32, 9, 1), (1, 1, 2, 16, 0, 0)),
        *((5, 10, 2, 32, 7, 2), (4, 8, 1, 32, 0, 4), (1, 1, 2, 32, 0, 0)),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_formula_in_float64(sizes, dtype, tolerance):
    given = problem(*sizes, dtype=dtype)
    exact = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given]
    for index in (0, 1, 3):
        exact[index].requires_grad_()
    expected = formula(*exact)
    of_attended = torch.randn_like(expected).to(dtype)
    gradients = torch.autograd.grad(expected, [exact[index] for index in (0, 1, 3)], of_attended.double())
    with torch.no_grad():
        found = attend_in_windows(*given), *attend_in_windows_backward(of_attended, *given)
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32, torch.float32]
    for here, there in zip(found, (expected, *gradients), strict=True):
        torch.testing.assert_close(here.double(), there, rtol=tolerance, atol=tolerance * there.abs().max().item())


@needs_cpp
@pytest.mark.usefixtures("units")
def test_the_number_of_threads_changes_no_bit():
    given, threads, found = problem(150, 7, 4, 32, 100, 20), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                attended = attend_in_windows(*given)
                found.append((attended, *attend_in_windows_backward(attended, *given)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_cpp
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("width, dtype", [(8, torch.float32), (32, torch.bfloat16)])
def test_a_number_that_is_none_spoils_its_window_and_head_alone(width, dtype):
    projected, *others = problem(3, 4, 2, width, 0, 0, dtype)
    token = others[1].view(3, 16)[1, 5]
    projected[token, 2 * width + 3] = float("nan")  # in a key of the first head
    with torch.no_grad():
        spoilt = attend_in_windows(projected, *others).isnan()
    expected = torch.zeros_like(spoilt)
    expected[others[1].view(3, 16)[1], :width] = True
    assert torch.equal(spoilt, expected)


@needs_cpp
def test_which_kernel_is_chosen_by_then_changes_no_gradient():
    given = problem(3, 4, 2, 8, 2, 1)
    with torch.no_grad():
        attended = attend_in_windows(*given)
        expected = attend_in_windows_backward(attended, *given)
        with use_kernel("reference"):
            found = attend_in_windows_backward(attended, *given)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@needs_cpp
def test_graphs_other_kernels_widths_dtypes_and_classes_are_left_to_torch():
    given = problem(3, 4, 2, 8, 2, 1)
    assert attend_in_windows(*given) is None  # a graph may be recorded
    with torch.no_grad():
        with use_kernel("reference"):
            assert attend_in_windows(*given) is None
        assert attend_in_windows(*problem(3, 4, 2, 12, 2, 1)) is None
        assert attend_in_windows(given[0].double(), *given[1:]) is None
        packed = pack_weights(nn.Linear(*given[0].shape[::-1]), nn.Linear).weight
        assert attend_in_windows(packed, *given[1:]) is None
        assert attend_in_windows(*given) is not None
