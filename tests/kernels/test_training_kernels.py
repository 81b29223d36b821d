"""What the compiled library does in a training step besides attention, against torch in float64."""

import pytest
import torch
from helpers import relative_difference
from torch.nn import functional as F

from mask2former_hf.kernels import (
    activation_backward_,
    cpu,
    matrix_product,
    uncertain_points,
    uniform_points,
    use_kernel,
)

CPU = torch.device("cpu")
MISSING = cpu.why_not(CPU, torch.float32)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no compiled kernel: {MISSING}")


@pytest.fixture(autouse=True)
def without_a_graph():
    with torch.no_grad():
        yield


def test_points_are_uniform_and_independent():
    points = uniform_points((3, 70000, 2), CPU, torch.Generator().manual_seed(0)).double()
    assert points.shape == (3, 70000, 2) and points.min() >= 0 and points.max() < 1
    flat = points.flatten()
    counts = torch.histc(flat, 64, 0, 1)
    expected = len(flat) / 64
    assert ((counts - expected) ** 2 / expected).sum() < 130  # chi squared of 63 degrees: 1e-6
    pairs = torch.stack([flat[:-1], flat[1:]])  # x and y of a point, and y and x of two
    assert torch.corrcoef(pairs)[0, 1].abs() < 5 / len(flat) ** 0.5
    assert flat.unique().numel() > 0.98 * len(flat)


def test_a_generators_state_says_the_points_whatever_the_number_of_threads():
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            generator = torch.Generator().manual_seed(7)
            found.append([uniform_points((70001, 2), CPU, generator) for _ in range(2)])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(*found[0])


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (16, 24)])
@pytest.mark.parametrize("weighted", [False, True])
def test_uncertain_points_are_those_nearest_to_zero(size, weighted):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, *size, generator=generator)
    candidates = torch.rand(3, 1003, 2, generator=generator) * 1.2 - 0.1  # some outside, where a map is zero
    weights = (torch.rand(3, 1003, generator=generator) < 0.5).float() if weighted else None
    chosen = uncertain_points(maps, candidates, weights, 400)
    assert chosen.shape == (3, 400, 2)

    def certainty(points):
        grid = 2 * points.double().unsqueeze(2) - 1
        return F.grid_sample(maps.double().unsqueeze(1), grid, align_corners=False).flatten(1).abs()

    expected = certainty(candidates)
    if weighted:
        expected = expected.masked_fill(weights == 0, float("inf"))
    least = expected.sort(1).values[:, :400]
    torch.testing.assert_close(certainty(chosen).sort(1).values, least, atol=2e-6, rtol=1e-5)
    for own, given in zip(chosen, candidates, strict=True):
        assert {tuple(point) for point in own.tolist()} <= {tuple(point) for point in given.tolist()}


def test_a_logit_that_is_not_a_number_is_the_most_certain_and_ties_are_cut_to_the_count():
    maps = torch.zeros(1, 2, 2)
    candidates = torch.rand(1, 50, 2)
    assert uncertain_points(maps, candidates, None, 20).shape == (1, 20, 2)
    maps[..., 1] = float("nan")
    candidates = torch.tensor([[[0.9, 0.5], [0.1, 0.5], [0.8, 0.2], [0.2, 0.3]]])
    assert torch.equal(uncertain_points(maps, candidates, None, 2), candidates[:, [1, 3]])


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_an_activation_and_its_gradients_are_those_in_float64(name):
    generator = torch.Generator().manual_seed(0)
    wide = 3 * torch.randn(1501, 104, generator=generator)  # several tasks
    wide[0, :3] = torch.tensor([0.0, -30.0, 30.0])
    wide = wide if name == "gelu" else wide.relu()
    gradient = torch.randn(wide.shape, generator=generator)
    with torch.enable_grad():
        exact = wide.double().requires_grad_()
        result = F.gelu(exact) if name == "gelu" else F.relu(exact)
        (expected,) = torch.autograd.grad(result, exact, gradient.double())
    for keep_wide in (True, False):
        given = wide.clone()
        activated, of_wide, sums = activation_backward_(name, gradient.clone(), given, keep_wide)
        assert torch.equal(given, wide if keep_wide else activated)
        for found, right in ((activated, result), (of_wide, expected), (sums, expected.sum(0))):
            assert relative_difference(found.double(), right) < 2e-6


def test_other_kernels_dtypes_and_widths_are_left_to_torch():
    wide = torch.randn(4, 12)
    assert activation_backward_("gelu", wide, wide, True) is None
    for dtype in (torch.float64, torch.bfloat16):
        assert activation_backward_("gelu", *torch.zeros(2, 4, 8, dtype=dtype), True) is None
    with use_kernel("reference"):
        assert uniform_points((3, 2), CPU, None) is None
        assert uncertain_points(torch.zeros(1, 2, 2), torch.rand(1, 4, 2), None, 2) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(dtype):
    gradient, wide = torch.randn(50, 64), torch.randn(50, 64)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = [
        uniform_points((4000, 2), CPU, generators[0]),
        *activation_backward_("gelu", gradient.clone(), wide, True),
    ]
    torch.set_default_dtype(dtype)
    try:
        found = [
            uniform_points((4000, 2), CPU, generators[1]),
            *activation_backward_("gelu", gradient.clone(), wide, True),
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for here, there in zip(found, expected, strict=True):
        assert (here is None and there is None) or torch.equal(here, there)  # no AVX-512 BF16, no product


def test_shapes_that_do_not_fit_are_left_to_torch():
    maps, candidates = torch.randn(2, 8, 8), torch.rand(2, 10, 2)
    assert uncertain_points(maps, candidates, None, 11) is None
    assert uncertain_points(maps, candidates[:1], None, 3) is None
    assert uncertain_points(maps, candidates, torch.ones(2, 9), 3) is None
    assert activation_backward_("relu", torch.ones(3, 8), torch.ones(2, 8), True) is None
    assert activation_backward_("relu", torch.ones(3, 0), torch.ones(3, 0), True) is None


multiplies = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="the CPU has no AVX-512 BF16")
# Rows, columns and K: a single number, odd ones, several tasks, several blocks of K in float32 and bfloat16.
SIZES = [(1, 1, 1), (13, 33, 17), (300, 70, 1025), (97, 100, 600), (24, 1, 30)]


def strided(x, layout):
    """The same values, with the second index innermost, or the first, or neither."""
    if layout == "rows":
        return x.contiguous()
    if layout == "columns":
        return x.T.contiguous().T
    wide = x.new_zeros(x.shape[0], x.shape[1], 2)
    wide[..., 1] = x
    return wide[..., 1]


@multiplies
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype, into", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_products_in_every_layout_are_those_in_float64(size, dtype, into):
    M, N, K = size
    dtype, into, generator = getattr(torch, dtype), getattr(torch, into), torch.Generator().manual_seed(0)
    a, b, bias, plus = (
        torch.randn(shape, generator=generator).to(kind)
        for shape, kind in (((M, K), dtype), ((K, N), dtype), ((N,), dtype), ((M, N), into))
    )
    exact = 0.5 * (a.double() @ b.double() + bias.double()) + plus.double()
    of_rows, found = 0.5 * a.double().sum(1) + 1, []
    for layout in ("rows", "columns", "neither"):
        for other in ("rows", "columns"):
            out, sums = torch.full((M, N), float("nan"), dtype=into), torch.ones(M)
            factors = strided(a, layout), strided(b, other)
            assert matrix_product(*factors, bias, scale=0.5, plus=plus, out=out, sums=sums) is out
            torch.testing.assert_close(sums.double(), of_rows, rtol=1e-5, atol=1e-4)
            assert relative_difference(out.double(), exact) < (4e-3 if into == torch.bfloat16 else 2e-6)
            without = matrix_product(*factors, bias, scale=0.5, plus=plus.clone(), out=torch.empty_like(out))
            found += [out, without]
    assert all(torch.equal(one, found[0]) for one in found)
    in_place = plus.clone()
    assert torch.equal(matrix_product(a, b, bias, scale=0.5, plus=in_place, out=in_place), found[0])
    rectified = matrix_product(a, b, then="relu", out=torch.empty_like(out))
    torch.testing.assert_close(rectified.double(), (a.double() @ b.double()).relu(), rtol=4e-3, atol=1e-3)


@multiplies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_do_not_depend_on_the_number_of_threads(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((210, 3000), (3000, 130)))
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            sums = torch.zeros(210)
            product = matrix_product(a.T.contiguous().T, b, out=torch.empty(210, 130), sums=sums)
            found.append((product, sums, matrix_product(b.T, a.T)))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@multiplies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_behind_a_factor_is_not_read(dtype):
    a, b = torch.full((5, 8), float("nan"), dtype=dtype), torch.full((9, 8), float("nan"), dtype=dtype)
    a[:, :7], b[:7, :3] = 1, 1  # K is odd: its last word is half another row's
    torch.testing.assert_close(matrix_product(a[:, :7], b[:7, :3]), torch.full((5, 3), 7.0, dtype=dtype))
    a[2, 1] = float("nan")
    rectified = matrix_product(a[:, :7], b[:7, :3], then="relu")
    assert rectified.isnan().any(1).tolist() == [False, False, True, False, False]


@multiplies
def test_matrices_that_do_not_fit_are_left_to_torch():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert matrix_product(a, b[:3]) is None
    assert matrix_product(a, b, torch.ones(4)) is None
    assert matrix_product(a, b, plus=torch.ones(5)) is None
    assert matrix_product(a, b, out=torch.empty(5, 3).T) is None
    assert matrix_product(a, b, sums=torch.ones(5)) is None
    assert matrix_product(a, b.bfloat16()) is None
    assert matrix_product(a[:0], b) is None and matrix_product(a[:, :0], b[:0]) is None
    assert matrix_product(a.double(), b.double()) is None
    with torch.enable_grad():
        assert matrix_product(a, b) is None
    with use_kernel("reference"):
        assert matrix_product(a, b) is None
