"""A 1x1 convolution that is a matrix product in training, and in bfloat16 on CPUs."""

import torch
from torch import Tensor, nn

from .compiled import product as compiled_product
from .cpu_layout import map_of, plain, tokens_of
from .onednn import product, product_dtype, products_are_faster, records_eagerly


class PointwiseConvolution(nn.Conv2d):
    """1x1 convolution; in training a matrix product, because oneDNN's backward takes six times as long on CPUs, and at
    inference in bfloat16 one of the package's own.

    Its output has channels innermost then, whatever the input has: what follows on CPUs keeps that, and what takes
    tokens need not transpose.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        pixels, output = tokens_of(x), None
        if torch.is_grad_enabled():
            return map_of(self._recorded(pixels, self.weight.flatten(1)), x.shape[-2:])
        if compiled_product is not None and x.dtype == torch.bfloat16 and plain(self.weight):
            output = compiled_product(pixels, self.weight.flatten(1), self.bias, "none")
        return super().forward(x) if output is None else map_of(output, x.shape[-2:])

    def _recorded(self, pixels: Tensor, weight: Tensor) -> Tensor:
        if records_eagerly(pixels) and products_are_faster(product_dtype(pixels)):
            return product(pixels, weight, self.bias)
        # A linear layer would copy the pixels, and keep them.
        weight = weight.T.expand(pixels.shape[0], -1, -1)  # (B, C, O)
        return torch.bmm(pixels, weight) if self.bias is None else torch.baddbmm(self.bias, pixels, weight)
