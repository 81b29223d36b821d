"""A 1x1 convolution that is a matrix product in training."""

import torch
from torch import Tensor, nn

from .cpu_layout import map_of, tokens_of
from .onednn import product


class PointwiseConvolution(nn.Conv2d):
    """1x1 convolution; in training a matrix product, because oneDNN's backward takes six times as long on CPUs.

    Its output has channels innermost then, whatever the input has: what follows on CPUs keeps that, and what takes
    tokens need not transpose.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return map_of(product(tokens_of(x), self.weight.flatten(1), self.bias), x.shape[-2:])
