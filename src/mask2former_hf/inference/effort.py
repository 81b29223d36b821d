"""An answer in less time: the first layers of a decoder alone, and after half of them fewer queries.

Every layer of the decoder was trained to predict; those of the pixel decoder's encoder only where `encoder_exits` of
the config says so. Letters: B batch, Q queries, q kept queries of an image, S = H * W of a level.
"""

import copy
import math
import reprlib

import torch
from torch import Tensor, nn

from ..model.number_checks import check_fractions
from ..model.transformer_decoder import Bystanders, DecoderStates, Mask2FormerMaskedAttentionDecoder

EARLY = 1 / 2  # of the whole decoder's layers: from then on a query that says "nothing" rarely changes its mind
HOPELESS = 0.002  # probability of an object below which a query is dropped there: both measured in docs/effort.md


def at_effort(model: nn.Module, effort: float) -> nn.Module:
    """A model that stops after some of the decoder's layers; it shares weights and modules with the whole one.

    Training supervises the prediction of the learned queries and of every layer (section 3.2.1 of the paper), so what
    the layer predicts that is now the last is what the whole model has there in its `auxiliary_logits`; but on CPUs
    some queries are dropped on the way (`SparingDecoder`). A model with `encoder_exits` runs fewer layers of the pixel
    decoder's encoder, too, for which what follows was trained.

    Args:
        model: `Mask2FormerForUniversalSegmentation`.
        effort: share of the decoder's layers, rounded up: of 9 layers 1 runs all, 0.5 five, 0 none, which leaves the
            prediction of the learned queries. With exits the same share of the encoder's layers, but at least one.
            With 1 the result is `model` itself.

    Raises:
        ValueError: for a number outside of [0, 1], and below 1 for a model without a prediction at every layer: of
            another design, or trained without auxiliary loss.
    """
    try:
        check_fractions(effort=effort)
    except ValueError:
        raise ValueError(
            f"effort={reprlib.repr(effort)}: must be a share of the decoder's layers, from 0 to 1, such as 0.5"
        ) from None
    if effort == 1:
        return model
    config = model.config
    for field, needed in (("decoder_type", "masked"), ("head_type", "masks"), ("use_auxiliary_loss", True)):
        if (value := getattr(config, field, needed)) != needed:
            raise ValueError(
                f"effort={effort:g}: the checkpoint has {field}={value!r}, and only with {needed!r} the layers of a "
                "decoder were trained to predict before the last; leave it out"
            )
    if config.encoder_exits:
        encoder = model.model.pixel_level_module.decoder.encoder
        encoder = first_layers(encoder, max(1, _layers(effort, len(encoder.layers))))
        model = _with_part(model, ("model", "pixel_level_module", "decoder", "encoder"), encoder)
    decoder = model.model.transformer_module.decoder
    count, early = (_layers(share, len(decoder.layers)) for share in (effort, EARLY))
    decoder = first_layers(decoder, count)
    if count > early:
        decoder.__class__ = SparingDecoder
        decoder.early, decoder.heads = early, (model.class_predictor,)  # in a tuple, as it is a part of the model
    return _with_part(model, ("model", "transformer_module", "decoder"), decoder)


def first_layers(part: nn.Module, count: int) -> nn.Module:
    """A copy of a part of `layers` that has the first of them alone, and shares them."""
    part = copy.copy(part)
    part._modules = part._modules | {"layers": part.layers[:count]}
    return part


def _layers(share: float, layers: int) -> int:
    return math.ceil(round(share * layers, 6))  # 0.7 * 10 is a little more than 7


class SparingDecoder(Mask2FormerMaskedAttentionDecoder):
    """After half of the layers queries that are probably nothing are dropped; their predictions stay what they are.

    The others still see them as they were then: late layers were never without them, and PQ of a COCO subset fell from
    79 to 72. On CPUs in eager mode alone: GPUs take as long for few queries as for many, and `replay` and graphs need
    to know how many there are. Images go on one by one, each with its own queries, so none depends on its batch.

    Attributes:
        early: layers before queries are dropped.
        heads: one module, states → class logits of which the last is "no object".
    """

    def forward(self, queries, query_positions, memories, memory_positions, level_mask_features, eager):
        states = DecoderStates([queries], [self.layernorm(queries)], [], [])
        maps = (memories, memory_positions, level_mask_features, eager)
        if queries.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.go_on(states, range(len(self.layers)), query_positions, *maps)
        states = self.go_on(states, range(self.early), query_positions, *maps)
        late = range(self.early, len(self.layers))
        hopeful = 1 - self.heads[0](states.normalised[-1]).float().softmax(-1)[..., -1] >= HOPELESS  # (B, Q)
        if hopeful.all():
            return self.go_on(states, late, query_positions, *maps)
        images = [self._alone(image, kept, states, late, query_positions, *maps) for image, kept in enumerate(hopeful)]
        for whole, parts in zip(states, zip(*images, strict=True), strict=True):
            whole += [None if rows[0] is None else torch.cat(rows) for rows in zip(*parts, strict=True)]
        return states

    def _alone(self, image, kept, states, late, query_positions, memories, memory_positions, features, eager):
        """What the late layers make of the kept (Q,) queries of an image, with Q rows again."""
        own, rows = slice(image, image + 1), kept.nonzero()[:, 0]
        few = DecoderStates([states.hidden[-1][own, rows]], [states.normalised[-1][own, rows]], [], [])
        rest = (~kept).nonzero()[:, 0]
        others = Bystanders(states.hidden[-1][own, rest], query_positions[own, rest])
        memories, features = ([level[own] for level in levels] for levels in (memories, features))
        few = self.go_on(few, late, query_positions[own, rows], memories, memory_positions, features, eager, others)
        hidden, normalised = (
            [before[-1][own].index_copy(1, rows, after) for after in afters[1:]]
            for before, afters in zip(states[:2], few[:2], strict=True)
        )
        Q = len(kept)
        to_itself, to_cells = ([w if w is None else _with_rows(w, rows, Q) for w in weights] for weights in few[2:])
        seen = torch.cat((rows, rest))
        to_itself = [w if w is None else _with_rows(w.mT, seen, Q).mT for w in to_itself]
        return DecoderStates(hidden, normalised, to_itself, to_cells)


def _with_rows(weights: Tensor, rows: Tensor, count: int) -> Tensor:
    """(1, h, q, S) attention of some queries → (1, h, Q, S), zeros for the others."""
    whole = weights.new_zeros(*weights.shape[:2], count, weights.shape[-1])
    return whole.index_copy(2, rows, weights)


def _with_part(module: nn.Module, path: tuple[str, ...], part: nn.Module) -> nn.Module:
    """The same module with another part, whose owners are copied and nothing else."""
    if not path:
        return part
    changed = copy.copy(module)
    changed._modules = module._modules | {path[0]: _with_part(module._modules[path[0]], path[1:], part)}
    return changed
