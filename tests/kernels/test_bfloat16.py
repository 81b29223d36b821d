"""Kernels of AVX-512 BF16 and AMX, and layer norm on CPUs against float64, and where they leave the work to torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mask2former_hf import kernels
from mask2former_hf.kernels import convolutions, cpu, use_kernel
from mask2former_hf.model.cpu_layout import ConvolutionNorm
from mask2former_hf.model.layer_norms import normed

needs_avx512_bf16 = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="no AVX-512 BF16, or no compiled kernel")
needs_cpp = pytest.mark.skipif(isinstance(cpu.library(), str), reason="no compiled kernel")
THEN = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


def halves(*shapes):
    return [torch.randn(shape).bfloat16() for shape in shapes]


def close(found, exact, digits=2**-8):
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=digits, atol=2e-6 * exact.abs().max().item())


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize("M, N, K", [(37, 50, 34), (2, 7, 2), (300, 96, 96), (700, 33, 258), (53, 7, 64), (1, 40, 32)])
def test_products_are_rounded_once(M, N, K, then):
    torch.manual_seed(0)
    x, weight, bias, plus = halves((1, M, K), (N, K), (N,), (1, M, N))
    scale = torch.rand(N) + 0.5
    product = x.double() @ weight.double().T
    with torch.no_grad():
        close(kernels.product(x, weight, None, then), THEN[then](product))
        exact = THEN[then](product * scale.double() + bias.double() + plus.double())
        close(kernels.product(x, weight, bias, then, plus, scale), exact)


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("then", ["relu", "gelu"])
@pytest.mark.parametrize("rows, C, W", [(500, 64, 256), (3, 6, 10)])
def test_a_feed_forward_block_is_its_two_products(rows, C, W, then):
    torch.manual_seed(0)
    first, second = (nn.Linear(*sizes).bfloat16() for sizes in ((C, W), (W, C)))
    (x,) = halves((2, rows, C))
    with torch.no_grad():
        between = kernels.product(x, first.weight, first.bias, then)
        expected = kernels.product(between, second.weight, second.bias, "none")
        assert torch.equal(kernels.feed_forward(x, first, second, then), expected)


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize(
    "Q, S, share", [(20, 400, 0.02), (7, 133, 0.5), (9, 64, None), (1, 1, None), (17, 1000, 0.3), (100, 31, 0.5)]
)
def test_attention_is_that_of_float64_and_of_nothing_zero(Q, S, share):
    torch.manual_seed(0)
    query, key, value = halves((2, Q, 64), (2, S, 64), (2, S, 64))
    allowed = None if share is None else torch.rand(2, Q, S) < share
    if allowed is not None:
        allowed[0, Q // 2] = False
    heads = [x.double().unflatten(-1, (2, 32)).transpose(1, 2) for x in (query, key, value)]
    exact = F.scaled_dot_product_attention(*heads, None if allowed is None else allowed[:, None])
    with torch.no_grad():
        found = kernels.attention(query, key, value, 2, allowed)
    exact = exact.transpose(1, 2).flatten(2).nan_to_num()
    assert found.isfinite().all() and (allowed is None or not found[0, Q // 2].any())
    assert (found - exact).abs().max() < 2**-8 * exact.abs().max()


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("dtype, times", [(torch.bfloat16, 3), (torch.float32, 20)])
@pytest.mark.parametrize("B, C, H, W, width", [(2, 32, 13, 18, 64), (1, 16, 1, 2, 32), (1, 96, 30, 1, 32)])
def test_convolutions_err_by_a_few_roundings(B, C, H, W, width, dtype, times, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(convolutions, "FROM", 1)
    layer, scale, bias = nn.Conv2d(C, width, 3, padding=1).to(dtype), torch.rand(width) + 0.5, torch.randn(width)
    x = torch.randn(B, H, W, C).to(dtype).permute(0, 3, 1, 2)
    exact = F.conv2d(x.double(), layer.weight.double(), padding=1)
    scaled = (exact * scale.double()[:, None, None] + bias.double()[:, None, None]).relu()
    exact += layer.bias.double()[:, None, None]
    with torch.no_grad():
        found = kernels.convolution(x, layer)
        spoilt = x.clone(memory_format=torch.preserve_format)
        spoilt[0, 3, 0, 0] = float("nan")
        assert kernels.convolution(spoilt, layer)[:, :, 2:, 2:].equal(found[:, :, 2:, 2:])
        pairs = [(found, exact), (kernels.convolution(x, layer, scale, bias, rectify=True), scaled)]
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        assert kernels.convolution(x, layer).equal(found)
        torch.set_num_threads(threads)
    for found, exact in pairs:
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        error = (found - exact).square().mean().sqrt()
        assert error < times * (exact.to(dtype) - exact).square().mean().sqrt()


@needs_avx512_bf16
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_convolution_with_fewer_multiplications_are_those_of_float64(bias, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(convolutions, "FROM", 1)
    layer = nn.Conv2d(32, 64, 3, padding=1, bias=bias)
    x = torch.randn(2, 9, 14, 32).permute(0, 3, 1, 2).requires_grad_()
    output = kernels.convolution(x, layer)
    of_output = torch.randn(output.shape)  # of another layout
    found = torch.autograd.grad(output, (x, *layer.parameters()), of_output)
    exact = copy.deepcopy(layer).double()
    expected = torch.autograd.grad(exact(x.double()), (x, *exact.parameters()), of_output.double())
    for here, there in zip(found, expected, strict=True):
        assert (here - there).abs().max() < 1e-5 * there.abs().max()


@needs_cpp
@pytest.mark.parametrize("C", [8, 256, 24])
@pytest.mark.parametrize("dtype, digits", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_layer_norms_of_sums_are_those_of_float64_also_far_from_zero(C, dtype, digits):
    torch.manual_seed(0)
    norm = nn.LayerNorm(C)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, update = (torch.randn(2, 70, C) + 10).to(dtype), torch.randn(2, 70, C).to(dtype)
    norm.to(dtype)
    with torch.no_grad():
        total, found = kernels.layer_norm(x, norm, update, keep_sum=True)
        assert torch.equal(total, x + update)
        for given, summed in ((found, x.double() + update.double()), (kernels.layer_norm(x, norm)[1], x.double())):
            exact = F.layer_norm(summed, (C,), norm.weight.double(), norm.bias.double())
            torch.testing.assert_close(given.double(), exact, rtol=digits, atol=20 * 2e-7 * exact.abs().max().item())


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    x, weight, allowed = *halves((1, 600, 128), (160, 128)), torch.rand(1, 600, 600) < 0.1
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                found.append((kernels.product(x, weight, None, "gelu"), kernels.attention(x, x, x, 4, allowed)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
def test_a_number_that_is_none_spoils_its_row_alone():
    x, weight = halves((5, 32), (32, 32))
    x[3, 7] = float("nan")
    with torch.no_grad():
        for then in THEN:
            found = kernels.product(x, weight, None, then)
            assert found[3].isnan().all() and found[[0, 1, 2, 4]].isfinite().all()
        attended = kernels.attention(x[None], x[None, :3], x[None, :3], 1, None)[0]
    assert attended[3].isnan().all() and attended[[0, 1, 2, 4]].isfinite().all()


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("spoilt", ["key", "value"])
@torch.no_grad()
def test_a_number_that_is_none_spoils_an_attentions_head_alone_where_it_may_be_seen(spoilt):
    torch.manual_seed(0)
    query, key, value = halves((2, 40, 64), (2, 300, 64), (2, 300, 64))
    clean = kernels.attention(query, key, value, 2, None)
    (key if spoilt == "key" else value)[0, 200, 40] = float("nan")
    found, none = kernels.attention(query, key, value, 2, None), torch.zeros_like(clean, dtype=torch.bool)
    none[0, :, slice(32, 64) if spoilt == "key" else 40] = True
    assert torch.equal(found.isnan(), none) and torch.equal(found[~none], clean[~none])
    allowed = torch.ones(2, 40, 300, dtype=torch.bool)
    allowed[:, :, 192:256] = False
    assert kernels.attention(query, key, value, 2, allowed).isfinite().all()


@needs_avx512_bf16
@pytest.mark.usefixtures("units")
@torch.no_grad()
def test_numbers_below_the_normal_ones_are_back_after_a_kernel():
    (x,) = halves((1, 64, 32))
    kernels.attention(x, x, x, 1, None)
    kernels.product(x, x[0], None, "gelu")
    kernels.attend_in_windows(x.repeat(1, 1, 3)[0], x.new_zeros(96), torch.arange(64), torch.zeros(1, 64, 64), None, 1)
    assert (torch.full((64,), 1e-39) * 0.5).all()


def test_graphs_autocast_other_layouts_dtypes_and_kernels_are_left_to_torch():
    x, weight = halves((8, 32), (32, 32))
    norm, wide = nn.LayerNorm(32).bfloat16(), x[None]
    with torch.no_grad():
        left = [
            kernels.product(x.float(), weight.float(), None, "none"),
            kernels.product(x.T, weight[:, :8], None, "none"),
            kernels.product(x[:, :31].contiguous(), weight[:, :31].contiguous(), None, "none"),
            kernels.product(x[:0], weight, None, "none"),
            kernels.attention(wide, wide, wide, 2, None),
            kernels.convolution(torch.zeros(1, 32, 64, 64).bfloat16(), nn.Conv2d(32, 32, 3, padding=1).bfloat16()),
            kernels.convolution(torch.zeros(1, 1, 1, 32).bfloat16().permute(0, 3, 1, 2), nn.Conv2d(32, 32, 1)),
            kernels.layer_norm(x.T, norm),
        ]
        with use_kernel("reference"):
            left += [kernels.product(x, weight, None, "none"), kernels.layer_norm(x, norm)]
        with torch.autocast("cpu", torch.bfloat16):
            left += [kernels.product(x, weight, None, "none"), kernels.layer_norm(x, norm)]
    left += [kernels.product(x, weight, None, "none"), kernels.layer_norm(x, norm)]
    assert all(found is None for found in left)


@needs_avx512_bf16
@torch.no_grad()
def test_shapes_that_do_not_fit_are_left_to_torch():
    x, weight, query, key = halves((4, 8), (6, 8), (2, 3, 64), (2, 5, 64))
    assert kernels.product(x, weight, None, "none", plus=x.new_zeros(1, 6)) is None
    assert kernels.product(x, weight, x.new_zeros(5), "none") is None
    assert kernels.product(x, weight, None, "none", scale=torch.ones(5)) is None
    assert kernels.attention(query, key, key[:, :4].contiguous(), 2, None) is None
    assert kernels.attention(query, key, key, 2, torch.ones(1, 3, 5, dtype=torch.bool)) is None


@needs_cpp
@torch.no_grad()
def test_transformed_functions_are_left_to_torch():
    norm, rows = nn.LayerNorm(16), torch.randn(3, 4, 16)
    torch.testing.assert_close(torch.vmap(lambda x: normed(norm, x))(rows), norm(rows))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rows, torch.ones_like(rows))
        assert torch.autograd.forward_ad.unpack_dual(normed(norm, dual)).tangent is not None


def test_a_program_with_any_size_does_not_know_how_large_a_map_pays():
    module = ConvolutionNorm(nn.Conv2d(32, 32, 3, padding=1)).eval()
    sides = {2: torch.export.Dim("height", min=8, max=512), 3: torch.export.Dim("width", min=8, max=512)}
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(1, 32, 96, 96),), dynamic_shapes={"x": sides}).module()
        small = torch.randn(1, 32, 16, 24)
        torch.testing.assert_close(program(small), module(small), rtol=1e-4, atol=1e-4)
