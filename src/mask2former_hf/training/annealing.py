"""Mask annealing: attention masks that help a training on its way, and that the trained model does without.

Of EoMT (Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025): in training every query of
every image keeps its attention mask with a probability that falls from 1 to 0, one layer after the other. What it is
for: without attention masks an answer takes less time, but a training that never had them learns less well.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import TrainerCallback

from ..model.modeling_mask2former import Mask2FormerForSegmentation
from ..model.transformer_decoder import Mask2FormerMaskedAttentionDecoder

POWER = 0.9  # EoMT's, which is that of the learning rate


def masked_shares(progress: float, start: float, end: float, layers: int) -> list[float]:
    """Of each layer the share of queries that keep their masks.

    From `start` to `end` the layers have equal spans of their own, the first layer the first; in its span a share is
    (1 - p) ** 0.9 at p of the span, before it 1, after it 0.

    Args:
        progress: share of the run's steps that are done.
        start, end: the annealing's, likewise; EoMT's are 1/6 and 5/6.
        layers: how many.
    """
    span = (end - start) / layers
    done = ((progress - start) / span - layer for layer in range(layers))
    # Sixths and thirds are no exact numbers: at the end there is no remainder, which would need masks.
    return [0.0 if progress >= end else (1 - min(max(p, 0.0), 1.0)) ** POWER for p in done]


def anneal_masks(model: nn.Module, shares: Sequence[float], generator: torch.Generator | None = None):
    """Mask this share of queries in each layer of a model in training; of zeros alone, its config says "no masks".

    Args:
        model: ours, of images or clips, in whatever wraps it (PEFT, torch.compile, several processes).
        shares, generator: see `Mask2FormerMaskedAttentionDecoder.anneal`.

    Raises:
        ValueError: for another model.
    """
    decoder, whole = decoder_of(model), _first(model, Mask2FormerForSegmentation)
    decoder.anneal(shares, generator)
    whole.config.masked_attention = any(shares)


def decoder_of(model: nn.Module) -> Mask2FormerMaskedAttentionDecoder:
    """The part whose attention is masked.

    Raises:
        ValueError: for a model that has none, or is only a part of one, whose config nobody would change.
    """
    decoder, whole = _first(model, Mask2FormerMaskedAttentionDecoder), _first(model, Mask2FormerForSegmentation)
    if decoder is None or whole is None:
        raise ValueError(
            f"model is a {type(model).__name__}, without a masked decoder of this package under a head: give the "
            "whole Mask2FormerForUniversalSegmentation or Mask2FormerForVideoSegmentation, loaded by the class of "
            "mask2former_hf (code of a checkpoint, trust_remote_code=True, has its own)"
        )
    return decoder


def _first(model: nn.Module, kind: type):
    return next((part for part in model.modules() if isinstance(part, kind)), None)


def check_span(span: Sequence[float]):
    """Refuse what is no beginning and end of an annealing.

    Raises:
        ValueError: naming the setting.
    """
    if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
        raise ValueError(
            f"anneal_masks={_said(span)}: must be two shares of the run's steps, 0 <= START < END <= 1, such as "
            "0.17 0.83"
        )


def check_design(span: Sequence[float] | None, config):
    """Refuse a model without attention masks to anneal.

    Raises:
        ValueError: naming the setting, and the field of the config that has none.
    """
    if span is None:
        return
    usual = {"head_type": "masks", "decoder_type": "masked", "masked_attention": True}
    wrong = [f"{name}={getattr(config, name)!r}" for name, value in usual.items() if getattr(config, name) != value]
    if config.decoder_layers < 2:
        wrong.append(f"decoder_layers={config.decoder_layers}, the prediction of queries that see nothing")
    if wrong:
        raise ValueError(f"anneal_masks={_said(span)}: the model has {wrong[0]}, so no attention masks; leave it out")


def _said(span: Sequence[float]) -> str:
    return " ".join(map(str, span))


class MaskAnnealing(TrainerCallback):
    """Follows the steps of a Trainer, ours or transformers', from the first as well as from a checkpoint's.

    A model that is saved or measured before the end is one with masks; from then on it is one without, and its config
    says so (`masked_attention`).

    Args:
        start, end: of the annealing, as shares of the run's steps.
    """

    def __init__(self, start: float, end: float):
        check_span((start, end))
        self.start, self.end = start, end

    def is_over(self, state) -> bool:
        return state.global_step / state.max_steps >= self.end

    def follow(self, model: nn.Module, state):
        """Bring a model to where a Trainer's state is."""
        anneal_masks(model, self._shares(state, len(decoder_of(model).layers)))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.follow(model, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.follow(model, state)

    def _shares(self, state, layers: int) -> list[float]:
        return masked_shares(state.global_step / state.max_steps, self.start, self.end, layers)
