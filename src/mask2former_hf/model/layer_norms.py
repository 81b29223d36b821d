"""Layer norm of a sum, by one kernel where there is one, at inference. Everywhere else what torch's parts do."""

from torch import Tensor, nn

from .compiled import layer_norm
from .cpu_layout import hooked


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x)."""
    found = _by_a_kernel(norm, x, None, False)
    return norm(x) if found is None else found[1]


def norm_of_sum(norm: nn.Module, x: Tensor, update: Tensor) -> Tensor:
    """norm(x + update)."""
    found = _by_a_kernel(norm, x, update, False)
    return norm(x + update) if found is None else found[1]


def sum_and_norm(norm: nn.Module, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """x + update and its norm."""
    found = _by_a_kernel(norm, x, update, True)
    if found is None:
        x = x + update
        return x, norm(x)
    return found


def _by_a_kernel(norm: nn.Module, x: Tensor, update: Tensor | None, keep_sum: bool):
    if layer_norm is None or type(norm) is not nn.LayerNorm or hooked(norm):
        return None
    return layer_norm(x, norm, update, keep_sum)
