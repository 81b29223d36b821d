"""A 1x1 convolution that is a matrix product in training, and in bfloat16 on CPUs."""

import torch
from torch import Tensor, nn

from .compiled import product as compiled_product
from .cpu_layout import map_of, tokens_of
from .onednn import product


class PointwiseConvolution(nn.Conv2d):
    """1x1 convolution; in training a matrix product, because oneDNN's backward takes six times as long on CPUs, and at
    inference in bfloat16 one of the package's own.

    Its output has channels innermost then, whatever the input has: what follows on CPUs keeps that, and what takes
    tokens need not transpose.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        pixels, weight = tokens_of(x), self.weight.flatten(1)
        if torch.is_grad_enabled():
            return map_of(product(pixels, weight, self.bias), x.shape[-2:])
        output = None if compiled_product is None else compiled_product(pixels, weight, self.bias, "none")
        return super().forward(x) if output is None else map_of(output, x.shape[-2:])
