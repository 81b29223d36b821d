"""Layouts and chunks: the values of torch's plain parts, whatever lies innermost, and nobody's input overwritten."""

import pytest
import torch
from helpers import pack_weights, tiny_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mask2former_hf.model.cpu_layout import ConvolutionNorm, chunk_length, in_blocks, map_of
from mask2former_hf.model.pointwise_convolution import PointwiseConvolution


def test_chunks_are_16_mb_on_cpus_and_larger_elsewhere_and_never_empty():
    assert chunk_length(2**20, torch.device("cpu")) * 2**20 * 4 == 2**24
    assert chunk_length(2**20, torch.device("cuda")) > chunk_length(2**20, torch.device("cpu"))
    assert chunk_length(2**40, torch.device("cpu")) == 1 and chunk_length(0, torch.device("cpu")) == 2**22


@pytest.mark.parametrize("rows", [0, 3, 4096, 9000])
def test_rows_in_blocks_give_the_same_results_and_gradients(rows):
    torch.manual_seed(0)
    linear, sizes = torch.nn.Linear(3, 5), []

    def function(block):
        sizes.append(len(block))
        return torch.tanh(linear(block))

    results = []
    for run in (function, lambda x: in_blocks(function, x, 1024)):
        x = torch.linspace(-1, 1, 3 * rows).view(rows, 3).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad, linear.weight.grad.clone()))
        linear.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert sum(sizes) == 2 * rows and max(sizes[1:]) <= 4096


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_of_tokens_are_resized_with_channels_innermost(batch):
    tokens = torch.randn(batch, 30, 8)[:, 6:]  # some of several levels
    resized = nn.functional.interpolate(map_of(tokens, (4, 6)), size=(8, 12), mode="bilinear")
    assert resized.stride() == (8 * 12 * 8, 1, 12 * 8, 8)
    torch.testing.assert_close(map_of(tokens, (4, 6)), tokens.transpose(1, 2).unflatten(2, (4, 6)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_loses_no_digits_to_a_large_mean_in_either_layout(layout):
    """Compared with torch's own in float64; that in float32 is off by 7e-5 of the output with channels innermost."""
    torch.manual_seed(0)
    means = torch.tensor([-10.0, 10.0]).repeat(4).repeat_interleave(8).view(64, 1, 1)
    x, gradient = torch.randn(2, 64, 40, 37) + means, torch.randn(2, 64, 40, 37)
    x = x.contiguous(memory_format=layout)
    identity = nn.Conv2d(64, 64, 1, groups=64, bias=False)
    nn.init.ones_(identity.weight)
    ours, exact = ConvolutionNorm(identity, groups=8), nn.GroupNorm(8, 64).double()
    with torch.no_grad():
        for parameters in zip(ours[1].parameters(), exact.parameters(), strict=True):
            parameters[0].normal_()
            parameters[1].copy_(parameters[0])
    inputs = x.clone().requires_grad_(), x.double().requires_grad_()
    outputs = ours(inputs[0]), exact(inputs[1])
    assert torch.equal(inputs[0], x), "the input is not the part's own"
    for output in outputs:
        output.backward(gradient.to(output.dtype))
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(inputs[0].grad.double(), inputs[1].grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[1].parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_convolution_has_torch_s_values_and_gradients(layout, bias):
    torch.manual_seed(0)
    ours, torch_s = PointwiseConvolution(6, 10, bias=bias), nn.Conv2d(6, 10, 1, bias=bias)
    torch_s.load_state_dict(ours.state_dict())
    x, gradient = torch.randn(2, 6, 5, 7).contiguous(memory_format=layout), torch.randn(2, 10, 5, 7)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = ours(inputs[0]), torch_s(inputs[1])
    torch.testing.assert_close(*outputs)
    assert outputs[0].is_contiguous(memory_format=torch.channels_last)
    for output in outputs:
        output.backward(gradient)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(ours.parameters(), torch_s.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), outputs[0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_norm_equals_its_parts_and_leaves_both_inputs_as_they_are(layout, kernel):
    torch.manual_seed(0)
    convolution = PointwiseConvolution(6, 8) if kernel == 1 else nn.Conv2d(6, 8, 3, padding=1)
    part = ConvolutionNorm(convolution, groups=4, rectify=True)
    assert set(part.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=layout).requires_grad_()
    plus = torch.randn(2, 8, 5, 7).contiguous(memory_format=layout).requires_grad_()
    kept, gradient = (x.detach().clone(), plus.detach().clone()), torch.randn(2, 8, 5, 7)
    found = part(x, plus=plus)
    plain = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=kernel // 2)
    expected = (nn.functional.group_norm(plain, 4, part[1].weight, part[1].bias) + plus).relu()
    torch.testing.assert_close(found, expected)
    tensors = [x, plus, *part.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y, tensors, gradient) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the compiled kernel, where there is one and channels are innermost
        torch.testing.assert_close(part(x, plus=plus), expected)
    assert torch.equal(x, kept[0]) and torch.equal(plus, kept[1])


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("part", [0, 1])
def test_what_a_hook_has_kept_of_convolution_or_norm_stays_as_it_was(part, graph):
    module = ConvolutionNorm(nn.Conv2d(6, 8, 3, padding=1), groups=4, rectify=True)
    x, plus, kept = torch.randn(2, 6, 5, 7), torch.randn(2, 8, 5, 7), []
    x, plus = (y.contiguous(memory_format=torch.channels_last) for y in (x, plus))
    with torch.set_grad_enabled(graph):
        expected = module(x, plus)
        module[part].register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
        torch.testing.assert_close(module(x, plus), expected)
    assert len(kept) == 1 and torch.equal(*kept[0])


@pytest.mark.parametrize("backbone, graph", [("swin", False), ("swin", True), ("resnet", False)])
def test_a_hook_on_all_modules_sees_those_that_a_hook_of_their_own_sees(backbone, graph):
    """Counters of operations and profilers use either; what is computed without a module would be missing."""
    model, pixels, seen = tiny_model(backbone), torch.randn(1, 3, 64, 64), {"own": [], "all": []}
    handles = [
        part.register_forward_hook(lambda module, args, output, name=name: seen["own"].append(name))
        for name, part in model.named_modules()
    ]
    names = {part: name for name, part in model.named_modules()}
    with torch.set_grad_enabled(graph):
        expected = model(pixels).masks_queries_logits
        for handle in handles:
            handle.remove()
        handle = register_module_forward_hook(lambda module, args, output: seen["all"].append(names.get(module)))
        try:
            found = model(pixels).masks_queries_logits
        finally:
            handle.remove()
    assert [name for name in seen["all"] if name is not None] == seen["own"]
    assert torch.equal(found, expected)
    parts = [name for name in names.values() if name.endswith((".q_proj", ".fc1", ".convolution"))]
    assert parts and set(parts) <= set(seen["own"])


def test_a_pointwise_convolution_leaves_weights_of_another_class_to_torch():
    packed = pack_weights(PointwiseConvolution(8, 8), PointwiseConvolution)
    with torch.no_grad():
        assert packed(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
