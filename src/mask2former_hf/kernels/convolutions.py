"""3 x 3 convolutions by Winograd's algorithm on torch's tensors, and as a step of autograd."""

import torch
from torch import Tensor

from . import cpu

# Pixels of a batch from which a convolution with fewer multiplications is worth the changed weights, made in every
# call: 40 to 50 % less time at 20 x 20 with 512 channels, 40 x 40 with 256, and so on to 160 x 160 with 64 and 256.
FROM = 2**8


def fits(x: Tensor, convolution: torch.nn.Conv2d) -> bool:
    """Whether maps and parameters have the shapes and the layout of `convolution_cpu.cpp`, and are large enough."""
    usual = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
    weight = convolution.weight
    return (
        usual == ((3, 3), (1, 1), (1, 1), (1, 1))
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and x.dim() == 4
        and x.shape[1] == weight.shape[1]
        and x.shape[1] % 16 == len(weight) % 32 == 0
        and x.numel() >= FROM * x.shape[1]
        and x.dtype == weight.dtype
        and weight.is_contiguous()
        and x.permute(0, 2, 3, 1).is_contiguous()
    )


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None, rectify: bool = False
) -> Tensor:
    """Of what `fits`, where nothing is recorded."""
    return cpu.convolution(x, weight, *(None if y is None else y.float().contiguous() for y in (scale, bias)), rectify)


class RecordedConvolution(torch.autograd.Function):
    """The gradient of x is such a convolution too, with the weights turned about; those of the weights are torch's."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolved(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        wanted, of_x = ctx.needs_input_grad, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if wanted[0]:
            of_x = convolved(gradient, weight.flip(2, 3).transpose(0, 1).contiguous(), None)
        one, biases = (1, 1), [len(weight)] if wanted[2] else None
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, biases, one, one, one, False, (0, 0), 1, (False, *wanted[1:])
        )
        return of_x, of_weight, of_bias
