"""Images of other channels for a trained model: its first convolution grows, and nothing else changes."""

import copy

import torch
from torch import Tensor

from ..model.channels import model_channels
from ..model.modeling_mask2former import Mask2FormerForUniversalSegmentation

MEAN, ZERO, REPEAT = INFLATIONS = ("mean", "zero", "repeat")
STANDARDISING = ("bit",)  # whose convolutions subtract the mean of their weights, new ones included


@torch.no_grad()
def with_channels(
    model: Mask2FormerForUniversalSegmentation, channels: int, inflate: str = MEAN
) -> Mask2FormerForUniversalSegmentation:
    """A model for images of so many channels, from a trained one.

    The channels that both have keep their weights, the first ones of the image: red, green and blue of an RGB model.
    Where a further channel is 0 everywhere, which is its mean after normalisation, no logit changes. Of fewer channels
    than there were, each gets the sum of all weights divided by their number, so that one grey channel gives what it
    gives repeated in all of the old ones. Convolutions that see the image are those whose input channels follow the
    config's `num_channels`: the backbone's, and that of a ViT adapter.

    Args:
        model: stays as it is; the new one shares no tensor with it, and has its dtype, device, mode and frozen parts.
        channels: 1 to 16.
        inflate: what a further channel's weights are: the "mean" of the old ones, "zero", or those of the old channels
            over again ("repeat"). Sums grow with "mean" and "repeat" where bands are alike.

    Raises:
        ValueError: for an unknown `inflate`, and a backbone whose first convolution does not follow `num_channels`, or
            standardises its weights.
    """
    if inflate not in INFLATIONS:
        raise ValueError(f"inflate={inflate!r}: must be one of {', '.join(INFLATIONS)}")
    config, old = copy.deepcopy(model.config), model_channels(model.config)
    kind = config.backbone_config.model_type
    set_channels(config.backbone_config, channels)
    try:
        with torch.random.fork_rng(devices=[]):
            grown = type(model)(config).to(model.device, model.dtype)
    except ValueError as error:
        raise ValueError(f"channels={channels}: transformers' {kind} takes images of {old} alone") from error
    if kind in STANDARDISING:
        raise ValueError(
            f"channels={channels}: a {kind} standardises its weights over all channels, so that trained ones would "
            "mean something else beside new ones; take another backbone"
        )
    shapes = {name: tensor.shape for name, tensor in grown.state_dict().items()}
    state, seen = model.state_dict(), 0
    for name, tensor in state.items():
        if tensor.shape != shapes[name]:
            if (
                tensor.ndim != 4
                or tensor.shape[1] != old
                or shapes[name] != (len(tensor), channels, *tensor.shape[2:])
            ):
                raise ValueError(f"channels={channels}: {name} of {tuple(tensor.shape)} is no first convolution")
            state[name], seen = inflated(tensor, channels, inflate), seen + 1
    if channels != old and not seen:
        raise ValueError(
            f"channels={channels}: no convolution of the {kind} follows num_channels; take another backbone"
        )
    grown.load_state_dict(state)
    for ours, theirs in zip(grown.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return grown.train(model.training)


def set_channels(backbone_config, channels: int):
    """Let the config of a backbone say how many channels images have, wherever it says that."""
    if isinstance(getattr(backbone_config, "stem_channels", None), list | tuple):  # of HGNet: the image's first
        backbone_config.stem_channels = [channels, *backbone_config.stem_channels[1:]]
    backbone_config.num_channels = channels


def inflated(weight: Tensor, channels: int, inflate: str = MEAN) -> Tensor:
    """(C_out, channels, h, w) of (C_out, C_in, h, w), as `with_channels` says."""
    old = weight.shape[1]
    if channels < old:
        return weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
    if inflate == REPEAT:
        return weight[:, torch.arange(channels) % old]
    new = weight.mean(1, keepdim=True) if inflate == MEAN else torch.zeros_like(weight[:, :1])
    return torch.cat([weight, new.expand(-1, channels - old, -1, -1)], dim=1)
