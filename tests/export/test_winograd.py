"""Convolutions as products of tiles are those convolutions, at every size; and only those that gain are replaced."""

import numpy as np
import pytest
import torch
from helpers import relative_difference
from torch.nn import functional as F

from mask2former_hf.export import winograd

openvino = pytest.importorskip("openvino", reason="its extra, [openvino], is not among what the tests install")
C, D = 256, 264


def network_of(weight, stride=1, dtype=np.float32):
    ops = openvino.opset13
    x = ops.parameter([-1, weight.shape[1], -1, -1], np.float32)
    kernel = ops.convert(ops.constant(weight.astype(dtype)), "f32") if dtype != np.float32 else ops.constant(weight)
    y = ops.relu(ops.convolution(x, kernel, [stride, stride], [1, 1], [1, 1], [1, 1]))
    network = openvino.Model([y], [x])
    winograd.replace_wide_convolutions(network)
    return network, "Convolution" in {node.get_type_name() for node in network.get_ops()}


def test_one_network_of_tiles_is_the_convolution_at_every_size():
    weight = torch.randn(D, C, 3, 3, generator=torch.Generator().manual_seed(1)) / 48
    network, convolves = network_of(weight.numpy())
    assert not convolves
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for B, H, W in ((1, 8, 12), (2, 5, 7), (1, 1, 6)):
        x = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(H))
        expected = F.conv2d(x.double(), weight.double(), padding=1).relu()
        ours = torch.from_numpy(compiled(x.numpy())[0])
        assert ours.shape == expected.shape and relative_difference(ours.double(), expected) < 1e-5


@pytest.mark.parametrize(
    "shape, options",
    [((256, 64, 3, 3), {}), ((256, 256, 1, 1), {}), ((256, 256, 3, 3), {"stride": 2}), ((512, 512, 3, 3), {})]
    + [((256, 256, 3, 3), {"dtype": np.float16})],
)
def test_other_convolutions_stay(shape, options):
    assert network_of(np.ones(shape, np.float32), **options)[1]
