"""Swin's blocks with fewer copies: the same parameters, names and results as transformers'.

transformers' block pads, shifts and cuts its tokens into windows before it projects them, and undoes the three after.
Here queries, keys and values are one product of the tokens that are there, one gathering of rows makes windows of
them, and one puts the attended tokens back, so that nothing is projected that is padding. In transformers' block
padding is projected as zeros, to the bias. Only windows at the seam of the shift have a mask, so they are last, in an
attention of their own. What depends on the image's size alone is kept; the position bias, whose making takes 0.1 ms,
is not, for it is a parameter's. On GPUs a kernel reads the tokens of a window where they are.

Letters: B batch, H × W tokens, C channels, h heads, n tokens of a window.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.swin.modeling_swin import SwinBackbone, SwinLayer, SwinMLP, SwinPatchMerging, SwinStage

from .compiled import window_attention
from .cpu_layout import hooked, in_blocks, map_of, plain, tokens_of, transformed
from .layer_norms import normed, sum_and_norm
from .onednn import feed_forward, linear, product, product_dtype, runs_eagerly
from .swin_training import attend_where_tokens_are, attention_half, feed_forward_half, for_kept_images

OTHER_REGION = -100.0  # what transformers adds to the scores of tokens that the shift made neighbours


class Windows(NamedTuple):
    """Where the tokens of a batch are in its windows.

    Args:
        tokens: of each row of the windows the token, B * H * W of them in all; of padding the first token.
        padding: rows of the windows that are padding.
        places: `tokens`, B * H * W for padding.
        rows: of each token its row.
        seam: (windows at the seam, 1, n, n) float32 what is added to their scores; None without a shift.
    """

    tokens: Tensor
    padding: Tensor
    places: Tensor
    rows: Tensor
    seam: Tensor | None


@lru_cache(maxsize=32)  # four stages, two kinds of block, and some sizes of images; 1 MB for the largest at 640 x 640
def windows_of(batch: int, height: int, width: int, side: int, shift: int) -> Windows:
    with torch.inference_mode(False), torch.no_grad():  # kept, and so for training too
        cells = torch.arange(height * width).view(1, height, width) + 1  # 0 is padding
        cells = torch.roll(F.pad(cells, (0, -width % side, 0, -height % side)), (-shift, -shift), (1, 2))
        regions = _region(cells.shape[1], side, shift)[:, None] * 3 + _region(cells.shape[2], side, shift)
        cells, regions = _cut(cells[0], side), _cut(regions, side)  # (windows, n)
        crosses = (regions != regions[:, :1]).any(1)
        order = torch.cat([(~crosses).nonzero()[:, 0], crosses.nonzero()[:, 0]])
        whole = int((~crosses).sum())
        images = torch.arange(batch)[:, None, None] * (height * width)
        cells = torch.where(cells[order] > 0, cells[order] + images, 0)  # (B, windows, n)
        cells = torch.cat([cells[:, :whole].flatten(), cells[:, whole:].flatten()])
        present = cells > 0
        rows = torch.empty(batch * height * width, dtype=torch.int64)
        rows[cells[present] - 1] = present.nonzero()[:, 0]
        seam = None
        if whole < len(order):
            of_seam = regions[order[whole:]]
            apart = of_seam[:, None, :] != of_seam[:, :, None]
            seam = (apart * OTHER_REGION).unsqueeze(1).repeat(batch, 1, 1, 1)
        places = torch.where(present, cells - 1, batch * height * width)
        return Windows((cells - 1).clamp(min=0), (~present).nonzero()[:, 0], places, rows, seam)


def _region(length: int, side: int, shift: int) -> Tensor:
    """Of cells along an axis 0, or 1 and 2 on the two sides of the seam in the last window."""
    cells = torch.arange(length)
    return (cells >= length - side).long() + (cells >= length - shift).long() if shift else cells * 0


def _cut(cells: Tensor, side: int) -> Tensor:
    """(H, W) -> (windows, n)."""
    H, W = cells.shape
    return cells.view(H // side, side, W // side, side).transpose(1, 2).reshape(-1, side * side)


class IntoWindows(torch.autograd.Function):
    """Rows of tokens in windows, `fill` where there is padding; its gradient is gathered, not added up by index."""

    @staticmethod
    def forward(ctx, x: Tensor, fill: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        return into_windows(x, fill, windows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        rows, padding = ctx.windows.rows, ctx.windows.padding
        return gradient.index_select(0, rows), gradient.index_select(0, padding).sum(0), None


class OutOfWindows(torch.autograd.Function):
    """Rows of windows back in the order of tokens, without padding."""

    @staticmethod
    def forward(ctx, x: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        return x.index_select(0, windows.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        return into_windows(gradient, gradient.new_zeros(()), ctx.windows), None


def into_windows(x: Tensor, fill: Tensor, windows: Windows) -> Tensor:
    found = x.index_select(0, windows.tokens)
    if len(windows.padding):
        found[windows.padding] = fill
    return found


class GatheredSwinLayer(SwinLayer):
    """transformers' block; in eager mode its attention is computed as above."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs
    ):
        if not (always_partition and self._gathers(hidden_states)):
            return super().forward(hidden_states, input_dimensions, always_partition=always_partition, **kwargs)
        if torch.is_grad_enabled() and self._kernel(hidden_states) is None and self._is_plain():
            return self._train(hidden_states, input_dimensions), None
        attended = self.dropout(self.attend(normed(self.layernorm_before, hidden_states), input_dimensions))
        hidden_states, rows = sum_and_norm(self.layernorm_after, hidden_states, self.drop_path(attended))
        if not self.training and self._is_plain():
            output = feed_forward(self.mlp.fc1, self.mlp.fc2, rows, "gelu", hidden_states)
            if output is not None:
                return output, None
        return hidden_states + self.dropout(self.mlp(rows)), None

    def maybe_pad(self, hidden_states: Tensor, height: int, width: int) -> tuple[Tensor, tuple[int, ...]]:
        """In a graph for any size always cropped, which transformers' asks of the size it sees, and with sizes that
        are whole windows as a formula: of transformers' `(n - h % n) % n` torch.export makes no end of formulas."""
        if not torch.compiler.is_exporting():
            return super().maybe_pad(hidden_states, height, width)
        side = self.window_size
        below, right = ((length + side - 1) // side * side - length for length in (height, width))
        return F.pad(hidden_states, (0, 0, 0, right, 0, below)), (0, 0, 0, 1, 0, 1)

    def _gathers(self, x: Tensor) -> bool:
        """Whether the projections are what they were built as, no adapter's or hook's, and nothing records them."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or transformed():
            return False
        if x.device.type != "cpu" and self._kernel(x) is None:
            return False
        attention = self.attention
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return (
            attention.config._attn_implementation == "sdpa"
            and not (self.training and attention.attention_dropout)
            and all(type(part) is nn.Linear and plain(part.weight, part.bias) for part in parts)
            and not any(hooked(part) for part in (attention, attention.relative_position_bias, *parts))
        )

    def _kernel(self, x: Tensor) -> Callable | None:
        """What attends to windows where their tokens are."""
        head_dim = self.attention.head_dim
        return window_attention and window_attention(x.device, product_dtype(x), self.window_size, head_dim)

    def _is_plain(self) -> bool:
        """Whether the other parts are what they were built as, too, and no hook but stochastic depth's sees them."""
        mlp, norms = self.mlp, (self.layernorm_before, self.layernorm_after)
        linear = (self.attention.o_proj, mlp.fc1, mlp.fc2)
        paths = [hook for hook in mlp._forward_hooks.values() if getattr(hook, "func", None) is drop_path_of_output]
        return (
            not (self.training and self.dropout.p)
            and all(type(part) is nn.Linear and part.bias is not None for part in linear)
            and all(type(norm) is nn.LayerNorm and norm.bias is not None for norm in norms)
            and all(plain(part.weight, part.bias) for part in (*linear, *norms))
            and type(mlp) in (SwinMLP, OneDnnSwinMLP)
            and getattr(mlp.activation_fn, "act", None) is F.gelu
            and not any(hooked(part) for part in (*linear, *norms, mlp.activation_fn, self.dropout, self.drop_path))
            and not hooked(mlp, paths)
        )

    def _train(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> the same, in two steps of autograd."""
        whole_batch = len(x)

        def attended(x: Tensor, factor: float) -> Tensor:
            make = windows_of if len(x) == whole_batch else windows_of.__wrapped__  # which batches recur
            windows = make(len(x), *map(int, size), self.window_size, self.shift_size)
            return attention_half(self.attention, self.layernorm_before, x, windows, self.window_size, factor)

        x = for_kept_images(self.drop_path, x, attended)
        of_mlp = self.drop_path if self.mlp._forward_hooks else nn.Identity()
        return for_kept_images(
            of_mlp, x, lambda x, factor: feed_forward_half(self.mlp, self.layernorm_after, x, factor)
        )

    def attend(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H * W, C) normalised tokens -> what the attention adds to them."""
        (B, _, C), n, attention = x.shape, self.window_size**2, self.attention
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        projected = product(x.flatten(0, 1), torch.cat([part.weight for part in parts]), bias)  # (B * H * W, 3 C)
        fill = projected.new_zeros(3 * C) if bias is None else bias.to(projected.dtype)
        kernel = self._kernel(x)
        if kernel is not None:
            tokens, position_bias = projected.view(B, *map(int, size), 3 * C), attention.relative_position_bias()[0]
            options = self.window_size, self.shift_size, attention.scaling
            return attention.o_proj(kernel(tokens, fill, position_bias, *options)[0].view(B, -1, C))
        windows = windows_of(B, *map(int, size), self.window_size, self.shift_size)
        position_bias = attention.relative_position_bias()
        attended = attend_where_tokens_are(projected, fill, windows, position_bias, attention.scaling)
        if attended is not None:
            return linear(attention.o_proj, attended.view(B, -1, C))
        rows = IntoWindows.apply if torch.is_grad_enabled() else into_windows
        heads = rows(projected, fill, windows).view(-1, n, 3, attention.num_attention_heads, attention.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (windows, h, n, C / h)
        attended = self._attended(query, key, value, position_bias, windows.seam).transpose(1, 2).reshape(-1, C)
        if torch.is_grad_enabled():
            return attention.o_proj(OutOfWindows.apply(attended, windows).view(B, -1, C))
        return linear(attention.o_proj, attended.index_select(0, windows.rows).view(B, -1, C))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, position_bias: Tensor, seam) -> Tensor:
        position_bias, scale = position_bias.to(query.dtype), self.attention.scaling
        whole = len(query) - (0 if seam is None else len(seam))
        parts = []
        for some, bias in (
            (slice(whole), position_bias),
            (slice(whole, None), position_bias if seam is None else position_bias + seam.to(query.dtype)),
        ):
            if len(query[some]):
                parts.append(F.scaled_dot_product_attention(query[some], key[some], value[some], bias, scale=scale))
        return parts[0] if len(parts) == 1 else torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


class OneDnnSwinMLP(SwinMLP):
    """transformers' MLP; at inference on CPUs its GELU is part of the first product, or in its memory."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hooked(self.activation_fn):
            return super().forward(hidden_states)
        output = feed_forward(self.fc1, self.fc2, hidden_states, "gelu")
        if output is not None:
            return output
        plain_layers = all(type(layer) is nn.Linear and not hooked(layer) for layer in (self.fc1, self.fc2))
        if not (plain_layers and runs_eagerly(hidden_states)):  # others see all rows at once
            return self._layers(hidden_states)
        rows = in_blocks(self._layers, hidden_states.flatten(0, -2), self.fc1.out_features)
        return rows.view(*hidden_states.shape[:-1], -1)

    def _layers(self, rows: Tensor) -> Tensor:
        return linear(self.fc2, linear(self.fc1, rows, then="gelu"))


class GatheredPatchMerging(SwinPatchMerging):
    """transformers' merging, at inference on CPUs with one copy, and the norm and the product of other parts."""

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        if not runs_eagerly(input_feature):
            return super().forward(input_feature, input_dimensions)
        x = self.maybe_pad(input_feature.unflatten(1, tuple(map(int, input_dimensions))), *input_dimensions)
        B, H, W, C = x.shape
        x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).reshape(B, -1, 4 * C)
        return linear(self.reduction, normed(self.norm, x))


class InnermostSwinStage(SwinStage):
    """transformers' stage, whose map keeps the memory of its tokens: the norm after it wants channels innermost."""

    def get_reshaped_hidden_states(self, hidden_states, before_downsampling, height, width, before: bool) -> Tensor:
        if not before:
            return super().get_reshaped_hidden_states(hidden_states, before_downsampling, height, width, before)
        return before_downsampling.view(before_downsampling.shape[0], height, width, -1).permute(0, 3, 1, 2)


def innermost_maps(backbone: nn.Module, pixel_values: Tensor, options: dict) -> tuple[Tensor, ...] | None:
    """transformers' backbone at inference on CPUs, whose maps keep the memory of their tokens, too: what reads them
    wants channels innermost. None elsewhere. Its class stays transformers', by which old checkpoints are read."""
    asked = backbone.config.output_hidden_states or backbone.config.output_attentions
    if asked or not runs_eagerly(pixel_values) or type(backbone) is not SwinBackbone or hooked(backbone):
        return None
    options = options | {"always_partition": True, "output_hidden_states_before_downsampling": True}
    stages = backbone.swin(pixel_values, output_hidden_states=True, **options).reshaped_hidden_states
    maps = dict(zip(backbone.stage_names, stages, strict=True))
    return tuple(
        map_of(normed(backbone.hidden_states_norms[name], tokens_of(maps[name])), maps[name].shape[-2:])
        for name in backbone.stage_names
        if name in backbone.out_features
    )


def drop_paths_of_both_branches(backbone: nn.Module):
    """Let Swin's stochastic depth act on the MLP branch as well, as in the original; transformers' blocks apply it to
    the attention branch only."""
    for stage in backbone.swin.encoder.layers:
        for block in stage.blocks:
            if not isinstance(block.drop_path, nn.Identity):
                block.mlp.register_forward_hook(partial(drop_path_of_output, block.drop_path))


def drop_path_of_output(drop_path: nn.Module, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return drop_path(output)


def gather_windows(backbone: nn.Module):
    """Give Swin's stages and blocks these forwards."""
    for stage in backbone.swin.encoder.layers:
        stage.__class__ = InnermostSwinStage  # the same parameters and names
        if type(stage.downsample) is SwinPatchMerging:
            stage.downsample.__class__ = GatheredPatchMerging
        for block in stage.blocks:
            block.__class__ = GatheredSwinLayer
            if backbone.config.hidden_act == "gelu":
                block.mlp.__class__ = OneDnnSwinMLP
