"""An answer in less time: the first layers of a decoder alone, each of which was trained to predict."""

import copy
import math

from torch import nn

from ..model.number_checks import check_fractions


def at_effort(model: nn.Module, effort: float) -> nn.Module:
    """A model that stops after some of the decoder's layers; it shares weights and modules with the whole one.

    Training supervises the prediction of the learned queries and of every layer (section 3.2.1 of the paper), so what
    the layer predicts that is now the last is what the whole model has there in its `auxiliary_logits`.

    Args:
        model: `Mask2FormerForUniversalSegmentation`.
        effort: share of the decoder's layers, rounded up: of 9 layers 1 runs all, 0.5 five, 0 none, which leaves the
            prediction of the learned queries. With 1 the result is `model` itself.

    Raises:
        ValueError: for a number outside of [0, 1], and below 1 for a model without a prediction at every layer: of
            another design, or trained without auxiliary loss.
    """
    check_fractions(effort=effort)
    if effort == 1:
        return model
    config = model.config
    for field, needed in (("decoder_type", "masked"), ("head_type", "masks"), ("use_auxiliary_loss", True)):
        if (value := getattr(config, field, needed)) != needed:
            raise ValueError(
                f"effort={effort:g}: the checkpoint has {field}={value!r}, and only with {needed!r} the layers of a "
                "decoder were trained to predict before the last; leave it out"
            )
    decoder = model.model.transformer_module.decoder
    count = math.ceil(round(effort * len(decoder.layers), 6))  # 0.7 * 10 is a little more than 7
    return _with_part(model, ("model", "transformer_module", "decoder", "layers"), decoder.layers[:count])


def _with_part(module: nn.Module, path: tuple[str, ...], part: nn.Module) -> nn.Module:
    """The same module with another part, whose owners are copied and nothing else."""
    if not path:
        return part
    changed = copy.copy(module)
    changed._modules = module._modules | {path[0]: _with_part(module._modules[path[0]], path[1:], part)}
    return changed
