"""Products by oneDNN's operators: torch's values, and torch's own path where something records or replaces them."""

import pytest
import torch
from helpers import pack_weights
from torch import nn
from torch.nn import functional as F

from mask2former_hf.model import onednn
from mask2former_hf.model.onednn import linear, product, times_features


@pytest.fixture
def calls(monkeypatch):
    """Counts operators that ran, without the package's own products; on machines where they are slower as well."""
    if not onednn.is_x86_with_onednn():
        pytest.skip("not an x86 CPU with oneDNN")
    monkeypatch.setattr(onednn, "products_are_faster", lambda dtype: dtype != torch.float64)
    monkeypatch.setattr(onednn, "compiled_product", None)
    monkeypatch.setattr(onednn, "compiled_matrix_product", None)
    made, operator = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *x: made.append(x[3]) or operator(*x))
    return made


@pytest.mark.parametrize("then, after", [("none", lambda x: x), ("relu", F.relu), ("gelu", F.gelu)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_equal_those_in_float64(then, after, bias, calls):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 10, bias=bias), torch.randn(2, 7, 24)
    with torch.no_grad():
        found, exact = linear(layer, x, then), after(nn.Linear.forward(layer.double(), x.double()))
    assert calls == ["none" if then == "gelu" else then]  # the operator's is off by 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once(calls):
    layer, x = nn.Linear(24, 10).bfloat16(), torch.randn(7, 24).bfloat16()
    with torch.no_grad():
        found, exact = linear(layer, x, "gelu"), F.gelu(nn.Linear.forward(layer.float(), x.float()))
    assert calls == ["gelu"]
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-3)


def test_products_by_rows_of_another_weight_and_of_a_transposed_input(calls):
    x, weight, bias = torch.randn(5, 3, 8).transpose(0, 1), torch.randn(9, 8), torch.randn(9)
    with torch.inference_mode():
        for part, shift in zip(weight.chunk(3), bias.chunk(3), strict=True):
            torch.testing.assert_close(product(x, part, shift), F.linear(x, part, shift), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_masks_are_products_image_by_image_where_channels_are_innermost(batch, calls):
    rows, maps = torch.randn(batch, 5, 8), torch.randn(batch, 8, 3, 4)
    innermost = maps.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found, plain = (times_features(rows, x.flatten(2)) for x in (innermost, maps))
    assert len(calls) == batch
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(plain, rows @ maps.flatten(2))


@pytest.mark.parametrize("frozen", [None, "weight", "bias", "input"])
def test_gradients_equal_those_in_float64(frozen, calls):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 10), torch.randn(2, 7, 24)
    inputs = {"input": x, "weight": layer.weight, "bias": layer.bias}
    trained = [tensor.requires_grad_(name != frozen) for name, tensor in inputs.items()]
    (linear(layer, x, "relu") * torch.linspace(-1, 1, 10)).sum().backward()
    assert len(calls) == 2 - (frozen == "input")
    exact = [tensor.detach().double().requires_grad_() for tensor in trained]
    (F.relu(F.linear(*exact)) * torch.linspace(-1, 1, 10)).sum().backward()
    for name, found, expected in zip(inputs, trained, exact, strict=True):
        assert (found.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(found.grad.double(), expected.grad, rtol=1e-5, atol=1e-5)


def test_mixed_precision_multiplies_and_rounds_as_torch_does(calls):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 10), torch.randn(7, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear(layer, x), layer(x)
    assert found.dtype == torch.bfloat16 and len(calls) == 1
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
    for here, there in zip(*(torch.autograd.grad(y.sum(), [x, layer.weight]) for y in (found, expected)), strict=True):
        assert here.dtype == torch.float32
        torch.testing.assert_close(here, there, rtol=2**-6, atol=2**-6)


def test_autocast_without_gradients_hooks_float64_and_adapters_take_torch_s_own_path(calls):
    layer, x, seen = nn.Linear(4, 4), torch.randn(3, 4), []
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, x).dtype == torch.bfloat16
        assert linear(layer, x[:0]).shape == (0, 4)
        handle = layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
        linear(layer, x, "relu")
        handle.remove()
        linear(nn.Sequential(layer), x)
        linear(layer.double(), x.double())
        program = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (x,))
        assert "mkldnn" not in str(program.graph)
    assert calls == [] and len(seen) == 1 and torch.equal(*seen[0])


def test_weights_of_another_class_take_torch_s_own_path(calls):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.no_grad():
        expected = F.relu(nn.Linear.forward(layer, x))
        torch.testing.assert_close(linear(pack_weights(layer, nn.Linear), x, "relu"), expected)
    assert calls == []
