"""Mask2Former for video (Cheng et al., "Mask2Former for Video Instance Segmentation", arXiv 2112.10764).

The network of images on clips: backbone and pixel decoder see every frame as an image, the decoder sees the pixels of
all frames at once, so a query is one object through the clip. Parameters are those of the image model.

Letters: B clips, T frames, Q queries, K classes, C channels, L supervised predictions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .argument_checks import check_clips, check_frames, check_generator, check_labels_given, check_tensor
from .channels import model_channels
from .clip_loss import LazyClipMasks, Mask2FormerClipLoss
from .configuration_mask2former import Mask2FormerConfig
from .modeling_mask2former import Mask2FormerForSegmentation, Mask2FormerModel
from .outputs import Mask2FormerForUniversalSegmentationOutput, Mask2FormerModelOutput
from .pixel_decoder import Mask2FormerPixelLevelModule, sine_axis
from .transformer_decoder import DecoderStates, Mask2FormerTransformerModule


@dataclass
class Mask2FormerForVideoSegmentationOutput(Mask2FormerForUniversalSegmentationOutput):
    """Predictions, and the loss if labels were given; see the image model's output for the other fields.

    Args:
        class_queries_logits: (B, Q, K + 1), one class for a whole clip; the last one is "no object".
        masks_queries_logits: (B, Q, T, H/4, W/4), -100 beyond a clip's canvas. None in a training step, which never
            computes them, unless `output_auxiliary_logits` is set.
        encoder_last_hidden_state, pixel_decoder_last_hidden_state, encoder_hidden_states,
            pixel_decoder_hidden_states: maps have a dimension more, (B, T, C, ...).
        cross_attentions: on request, (B, h, Q, T * H * W) of each layer, frame after frame.
        image_sizes, canvas_sizes, mask_strides: of each clip's frames.
    """


class Mask2FormerVideoPixelLevelModule(Mask2FormerPixelLevelModule):
    """Every frame as an image of its own."""

    def forward(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
        """(B, T, 3, H, W) -> what the image's has, with dimensions (B, T, ...)."""
        features, mask_features, maps = super().forward(pixel_values.flatten(0, 1))
        clips = pixel_values.shape[:2]
        return (
            tuple(x.unflatten(0, clips) for x in features),
            mask_features.unflatten(0, clips),
            [x.unflatten(0, clips) for x in maps],
        )


class Mask2FormerVideoTransformerModule(Mask2FormerTransformerModule):
    """Queries that attend to the pixels of all frames of a clip."""

    def forward(self, maps: list[Tensor], mask_features: Tensor, eager: bool) -> DecoderStates:
        """Maps (B, T, C, h, w) of three levels and mask features (B, T, C, H, W)."""
        B, T = mask_features.shape[:2]
        of_frames = self.levels([x.flatten(0, 1) for x in maps], mask_features.flatten(0, 1))
        memories = [x.unflatten(0, (B, T)).flatten(1, 2) for x in of_frames[0]]  # (B, T * h * w, C)
        features = [x.unflatten(0, (B, T)).transpose(1, 2).flatten(2) for x in of_frames[1]]  # (B, C, T * h * w)
        return self.decode(memories, features, [self.positions(x) for x in maps], eager)

    def positions(self, x: Tensor) -> Tensor:
        """(T * h * w, C): the embedding of images plus sines of the frame's number, over all channels."""
        frames = sine_axis(x.shape[1], self.level_embed.embedding_dim, x.device)  # (T, C)
        return (super().positions(x).float() + frames.unsqueeze(1)).flatten(0, 1).to(x.dtype)


class Mask2FormerVideoModel(Mask2FormerModel):
    """Backbone, pixel decoder and masked-attention decoder over clips, without class head."""

    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    pixel_level_class = Mask2FormerVideoPixelLevelModule
    transformer_class = Mask2FormerVideoTransformerModule

    def __init__(self, config: Mask2FormerConfig):
        for name, usual in (("decoder_type", "masked"), ("head_type", "masks")):
            if (value := getattr(config, name)) != usual:
                raise ValueError(
                    f"{name}={value!r}: clips have {usual!r} alone; leave it out, or take the image model"
                )
        if model_channels(config) != 3:
            raise ValueError(f"num_channels={model_channels(config)} of the backbone: clips are RGB, of 3 channels")
        super().__init__(config)

    def forward(
        self,
        pixel_values_videos: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        mask_logits: str = "last",
    ) -> Mask2FormerModelOutput | tuple:
        """Run the network; with `pixel_mask` every clip on its own canvas, whatever else is in the batch.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised; the frames of each clip at the top left, zero-padded.
            pixel_mask: (B, H, W), 1 on a clip's frames. Without it the whole tensor is content.
            output_hidden_states, output_attentions, return_dict, mask_logits: see `Mask2FormerModel.forward`.
        """
        check_clips(pixel_values_videos, pixel_mask)
        return self._forward(
            pixel_values_videos, pixel_mask, output_hidden_states, output_attentions, return_dict, mask_logits
        )

    def mask_maps(self, embeddings: Tensor, mask_features: Tensor) -> Tensor:
        """Mask logits (B, Q, T, H, W) of (B, Q, C) embeddings and (B, T, C, H, W) mask features."""
        return torch.einsum("bqc,btchw->bqthw", embeddings, mask_features)


class Mask2FormerForVideoSegmentation(Mask2FormerForSegmentation):
    """Mask2Former with class and mask predictions for clips: every query is one object through all frames."""

    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    model_class = Mask2FormerVideoModel
    criterion_class = Mask2FormerClipLoss
    output_class = Mask2FormerForVideoSegmentationOutput

    def forward(
        self,
        pixel_values_videos: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        generator: torch.Generator | None = None,
        normalizers: Tensor | None = None,
    ) -> Mask2FormerForVideoSegmentationOutput | tuple:
        """Predict objects through clips, and with labels compute the loss.

        Args:
            pixel_values_videos: (B, T, 3, H, W), normalised; the frames of each clip at the top left, zero-padded.
                T may differ from call to call; published checkpoints were trained with T = 2 and tested with whole
                videos.
            mask_labels: per clip (N, T, h, w) binary masks of any dtype, of the size of pixel_values_videos or of the
                frames (then padded with zeros); empty in frames where the object is not to be seen.
            class_labels: per clip (N,) labels, num_labels for an object whose class is not known.
            pixel_mask: (B, H, W), 1 on a clip's frames. With labels the whole tensor is content.
            output_hidden_states, output_auxiliary_logits, output_attentions, return_dict: as for images.
            generator: source of the random points of the loss.
            normalizers: (2,) what the loss is divided by in gradient accumulation (`criterion.loss_normalizers`).

        Raises:
            TypeError: for inputs that are no tensors.
            ValueError: for inputs that do not fit together, and in training for predictions that are not finite.
        """
        self._check_num_labels()
        check_clips(pixel_values_videos, pixel_mask)
        check_labels_given(mask_labels, class_labels, None)
        check_generator(generator)
        if normalizers is not None:
            check_tensor("normalizers", normalizers)
        targets = None
        if mask_labels is not None:
            check_frames(mask_labels, pixel_values_videos.shape[1])
            targets = {"mask_labels": mask_labels, "class_labels": class_labels, "generator": generator}
            targets["normalizers"] = normalizers
        return self._predict(
            pixel_values_videos,
            pixel_mask,
            targets,
            output_auxiliary_logits,
            return_dict,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def mask_logits(self, states: Tensor, mask_features: Tensor) -> LazyClipMasks:
        """Masks of (L, B, Q, C) normalised states and (B, T, C, H, W) mask features, to be sampled."""
        return LazyClipMasks(self.model.mask_embeddings(states), mask_features)


__all__ = ["Mask2FormerForVideoSegmentation", "Mask2FormerVideoModel"]
