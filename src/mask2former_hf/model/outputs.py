"""What the models return, with the names and order of transformers' outputs.

Letters: B batch, Q queries, K classes, C channels, h heads, L supervised predictions (decoder layers + 1).
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

# Fields that `Mask2FormerForUniversalSegmentationOutput` lacks, or has for the last layer only.
OF_THE_MODEL_ALONE = ("masks_queries_logits", "transformer_decoder_intermediate_states")


@dataclass
class Mask2FormerModelOutput(ModelOutput):
    """Features and decoder states; maps of images with a smaller canvas than the batch's are zero beyond theirs.

    Args:
        encoder_last_hidden_state: (B, C, H/32, W/32), the backbone's last feature map.
        pixel_decoder_last_hidden_state: (B, C, H/4, W/4) mask features.
        transformer_decoder_last_hidden_state: (B, Q, C).
        encoder_hidden_states: on request, the backbone's four feature maps.
        pixel_decoder_hidden_states: on request, (B, C, ...) at strides 32, 16, 8.
        transformer_decoder_hidden_states: on request, (B, Q, C) before the first and after each layer.
        transformer_decoder_intermediate_states: L times (B, Q, C), layer-normalised, as the heads read them.
        masks_queries_logits: (B, Q, H/4, W/4) of the last layer, or of all L layers if asked for.
        attentions: on request, (B, h, Q, Q) self-attention of each layer.
        cross_attentions: on request, (B, h, Q, H * W) attention of each layer over its feature level.
        image_sizes: (B, 2) int64, (height, width) of each image without padding.
        canvas_sizes: (B, 2) int64, (height, width) of the padded input that each image's results were computed on.
        mask_strides: (B,) int64, input pixels along a side of a mask logit, `config.common_stride` for all.
    """

    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_intermediate_states: tuple[Tensor, ...] | None = None
    masks_queries_logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    image_sizes: Tensor | None = None
    canvas_sizes: Tensor | None = None
    mask_strides: Tensor | None = None


@dataclass
class Mask2FormerForUniversalSegmentationOutput(ModelOutput):
    """Predictions, and the loss if labels were given; see `Mask2FormerModelOutput` for the other fields.

    Args:
        loss: weighted sum of all terms.
        class_queries_logits: (B, Q, K + 1), the last class is "no object".
        masks_queries_logits: (B, Q, H/4, W/4), -100 beyond an image's canvas. None in a training step, which never
            computes them, unless `output_auxiliary_logits` is set.
        auxiliary_logits: on request, a dict of `class_queries_logits` and `masks_queries_logits` per earlier layer.
        loss_dict: the weighted terms that sum to `loss`: "loss_cross_entropy", "loss_mask" and "loss_dice", each (L,)
            with the final prediction last. Of a head that classifies pixels the first alone, and query k is class k:
            its class logits are certain, its mask logits are logarithms of the probability of class k.
        image_sizes, canvas_sizes, mask_strides: what post-processing needs to crop the padding.
    """

    loss: Tensor | None = None
    class_queries_logits: Tensor | None = None
    masks_queries_logits: Tensor | None = None
    auxiliary_logits: list[dict[str, Tensor]] | None = None
    encoder_last_hidden_state: Tensor | None = None
    pixel_decoder_last_hidden_state: Tensor | None = None
    transformer_decoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    pixel_decoder_hidden_states: tuple[Tensor, ...] | None = None
    transformer_decoder_hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    loss_dict: dict[str, Tensor] | None = None
    image_sizes: Tensor | None = None
    canvas_sizes: Tensor | None = None
    mask_strides: Tensor | None = None
