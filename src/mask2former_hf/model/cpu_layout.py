"""What exists for memory and layout, most of it for CPUs: work in chunks, channels innermost, convolutions that keep
them there.

On other devices most parts do what their plain counterparts in torch do. Letters: B batch, C channels, N rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .compiled import convolution as compiled_convolution
from .compiled import group_norm_


def chunk_length(elements: int, device: torch.device) -> int:
    """How many items of so many float32 `elements` each to work on at a time, at least 1.

    On CPUs what fits in 16 MB, near the caches: the allocator returns tensors above 32 MB to the system, and every use
    pays for fresh pages. Elsewhere 128 MB, enough to keep the device busy.
    """
    limit = 2**22 if device.type == "cpu" else 2**25
    return max(1, limit // max(1, elements))


def in_blocks(function: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """A row-wise `function` of (N, C) rows; on CPUs for a chunk at a time, if a row takes `width` float32 inside."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return function(rows)
    blocks = rows.split(chunk_length(width, rows.device))
    return function(rows) if len(blocks) == 1 else torch.cat([function(block) for block in blocks])


def hooked(module: nn.Module, expected: Sequence[Callable] = ()) -> bool:
    """Whether anything but the `expected` forward hooks comes between the module and its caller, hooks on all modules
    included (`torch.nn.modules.module.register_module_forward_hook`, as profilers use)."""
    others = [hook for hook in module._forward_hooks.values() if hook not in expected]
    own = (others, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or "forward" in vars(module) or bool(_has_any_global_hook())


def plain(*tensors: Tensor | None) -> bool:
    """Whether these, where they are, are torch's own tensors: quantized weights and DTensors are classes of their own,
    which know the operators that torch's modules call and no others."""
    return all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def transformed() -> bool:
    """Whether functions are transformed, by `torch.func` or for derivatives in forward mode: steps of autograd of our
    own refuse that, and operators without a derivative in that mode would lose it without a word. Of what torch
    compiles it sees to that itself."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """The same values with channels innermost: CPU convolutions need no reordering then (ResNet-50: twice as fast)
    and bilinear resizing and sampling are several times as fast."""
    if x.device.type != "cpu" or transformed():  # vmap knows no layouts
        return x
    return x.contiguous(memory_format=torch.channels_last)


def for_convolutions(x: Tensor) -> Tensor:
    """The same values in the layout in which a backbone of convolutions is fastest: channels innermost on CPUs, and on
    GPUs in half precision, where convolutions on tensor cores and batch norms want it."""
    if x.device.type == "cuda":
        half = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cuda")
        return x.contiguous(memory_format=torch.channels_last) if half else x
    return channels_last_on_cpu(x)


def tokens_of(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C), a view."""
    return x.flatten(2).transpose(1, 2)


def map_of(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view.

    With the strides of a map whose channels are innermost, also of one image: with the step between images that `view`
    gives a transposed tensor, resizing takes it for something else, and its result is transposed twice.
    """
    return tokens.view(tokens.shape[0], *size, tokens.shape[2]).permute(0, 3, 1, 2)


class ConvolutionNorm(nn.Sequential):
    """Convolution and group norm, if asked for with a sum or a ReLU after them, in the memory of their own results.

    With channels innermost torch's variance on CPUs is the mean square less the squared mean, in which digits cancel:
    a mean of 10 standard deviations costs 7e-5 of the norm's output. The output does not depend on a group's mean, so
    that is subtracted before, from the convolution's result; at inference a compiled kernel does all in two passes.

    Args:
        convolution: `0` in the state dict; the norm is `1`.
        groups: of the norm.
        rectify: a ReLU at the end.
    """

    def __init__(self, convolution: nn.Conv2d, groups: int = 32, rectify: bool = False):
        super().__init__(convolution, nn.GroupNorm(groups, convolution.out_channels))
        self.rectify = rectify

    def forward(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W'); `plus` of the output's shape is added to the norm's result."""
        norm = self[1]
        if x.device.type == "cuda" and not torch.is_grad_enabled():
            x = for_convolutions(x)  # and for the norm's kernel
        x = self._convolved(x)
        if group_norm_ is not None and not hooked(norm) and group_norm_(x, norm, plus, self.rectify):
            return x
        if x.device.type == "cpu" and not x.is_contiguous():
            with torch.no_grad():  # the gradient does not depend on the mean either
                means = x.mean((2, 3)).unflatten(1, (norm.num_groups, -1)).mean(2)  # (B, groups)
                x.sub_(means.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)[..., None, None])
        x = norm(x)
        if hooked(norm) and (plus is not None or self.rectify):
            x = x.clone(memory_format=torch.preserve_format)
        if plus is not None:
            x.add_(plus)  # neither term is needed for a gradient
        return F.relu(x, inplace=True) if self.rectify else x

    def _convolved(self, x: Tensor) -> Tensor:
        convolution = self[0]
        if hooked(convolution):
            return convolution(x).clone(memory_format=torch.preserve_format)  # what the hook has seen stays as it was
        if compiled_convolution is not None and type(convolution) is nn.Conv2d:
            output = compiled_convolution(x, convolution)
            if output is not None:
                return output
        return convolution(x)
