"""Mask2Former (Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022).

Letters: B batch, Q queries, K classes, C channels, h heads, D head dim, L supervised predictions (decoder layers + 1),
S = sum of H * W over the three feature levels. Everything is batch first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ModelOutput

from .backbone import batch_norms, feature_maps, freeze_parts, make_backbone
from .canvas import PADDING_LOGIT, canvas_of, image_extents, image_sizes_of, merge_groups
from .configuration_mask2former import Mask2FormerConfig
from .criterion import LazyMasks, Mask2FormerLoss
from .deformable_attention import MultiScaleDeformableAttention
from .pixel_decoder import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoder,
    Mask2FormerPixelDecoderEncoderLayer,
)
from .transformer_decoder import (
    Mask2FormerDecoderLayer,
    Mask2FormerMaskedAttention,
    Mask2FormerSelfAttention,
    Mask2FormerTransformerModule,
)


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
        cross_attentions: on request, (B, h, Q, H * W) masked attention of each layer over its feature level.
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
            with the final prediction last.
        image_sizes, canvas_sizes: what post-processing needs to crop the padding.
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


class Mask2FormerPixelLevelModule(nn.Module):
    """Backbone (`encoder`) and pixel decoder (`decoder`)."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        self.freezes_batch_norm = config.freeze_batch_norm
        self.encoder, channels = make_backbone(config.backbone_config, config.feature_strides, self.freezes_batch_norm)
        layers = [
            Mask2FormerPixelDecoderEncoderLayer(
                config.feature_size, config.num_attention_heads, config.encoder_feedforward_dim, config.dropout
            )
            for _ in range(config.encoder_layers)
        ]
        self.decoder = Mask2FormerPixelDecoder(
            channels,
            config.feature_size,
            config.mask_feature_size,
            config.common_stride,
            Mask2FormerPixelDecoderEncoder(layers),
        )

    def train(self, mode: bool = True):
        super().train(mode)
        if self.freezes_batch_norm:
            for module in batch_norms(self.encoder):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
        """(B, 3, H, W) -> the backbone's four maps, mask features, and maps at strides 32, 16, 8."""
        features = feature_maps(self.encoder, pixel_values)
        return features, *self.decoder(list(features))


class Mask2FormerPreTrainedModel(PreTrainedModel):
    config: Mask2FormerConfig
    config_class = Mask2FormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Mask2FormerPixelDecoderEncoderLayer", "Mask2FormerDecoderLayer", "SwinStage", "ResNetStage"]
    _keys_to_ignore_on_load_missing = [r"encoder\.swin\.layernorm\."]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For classes outside transformers the base skips modules without parameters of their own, in case their
        # initialisation overwrites loaded tensors. Ours does not: transformers.initialization looks at each tensor.
        super()._initialize_weights(module)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args, **kwargs):
        """As `nn.Module.load_state_dict`, also with the names that a backbone's tensors have in checkpoint files.

        Those differ from the names in memory for Swin. `from_pretrained` translates them; code that reads a file and
        calls this, such as transformers' Trainer when it resumes, would leave the backbone as it is.
        """
        own = self.state_dict()
        if not all(name in own for name in state_dict):
            markers = {name: torch.tensor(number) for number, name in enumerate(own)}
            in_memory = list(own)
            in_files = {
                name: in_memory[marker.item()] for name, marker in revert_weight_conversion(self, markers).items()
            }
            state_dict = {
                name if name in own else in_files.get(name, name): tensor for name, tensor in state_dict.items()
            }
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The original's initialisation; modules come children first, so parents refine what leaves got."""
        gain = self.config.init_xavier_std
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_as_torch(module)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, MultiScaleDeformableAttention):
            init_deformable_attention(module)
        elif isinstance(module, Mask2FormerPixelDecoderEncoderLayer):
            init.xavier_uniform_(module.fc1.weight)
            init.xavier_uniform_(module.fc2.weight)
        elif isinstance(module, Mask2FormerPixelDecoder):
            init.normal_(module.level_embed)
            for convolution, _ in module.input_projections:
                init.xavier_uniform_(convolution.weight)
                init.zeros_(convolution.bias)
            init_as_caffe2(module.mask_projection)
            if module.has_fpn_step:
                init_as_caffe2(module.adapter_1[0])
                init_as_caffe2(module.layer_1[0])
        elif isinstance(module, Mask2FormerSelfAttention):
            # The original's projection is one (3 C, C) matrix: Xavier's bound is that of 4 C units, not of 2 C.
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.xavier_uniform_(projection.weight, gain=gain / math.sqrt(2))
                init.zeros_(projection.bias)
            init.xavier_uniform_(module.out_proj.weight, gain=gain)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, Mask2FormerMaskedAttention):
            init.xavier_uniform_(module.in_proj_weight, gain=gain)
            init.zeros_(module.in_proj_bias)
            init.xavier_uniform_(module.out_proj.weight, gain=gain)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, Mask2FormerDecoderLayer):
            init.xavier_uniform_(module.fc1.weight, gain=gain)
            init.xavier_uniform_(module.fc2.weight, gain=gain)
        elif isinstance(module, Mask2FormerTransformerModule):
            for projection in module.input_projections:
                if isinstance(projection, nn.Conv2d):
                    init_as_caffe2(projection)
        elif isinstance(module, Mask2FormerLoss):
            weights = torch.ones_like(module.empty_weight)
            weights[-1] = module.no_object_weight
            init.copy_(module.empty_weight, weights)
        elif isinstance(module, Mask2FormerPixelLevelModule):
            freeze_parts(module.encoder, module.freezes_batch_norm)  # again: tensors missing in a file are new ones
            if self.config.backbone_config.model_type == "swin":
                init_swin(module.encoder)
        else:
            super()._init_weights(module)


def init_as_torch(module: nn.Linear | nn.Conv2d):
    """PyTorch's default, spelled out because a tensor missing in a checkpoint is created without it."""
    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if module.bias is not None:
        bound = 1 / math.sqrt(module.weight[0].numel())
        init.uniform_(module.bias, -bound, bound)


def init_as_caffe2(convolution: nn.Conv2d):
    init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        init.zeros_(convolution.bias)


def init_deformable_attention(module: MultiScaleDeformableAttention):
    """Each head starts looking in its own direction, point p at p + 1 pixels (Deformable DETR, appendix A.4)."""
    h, L, P = module.num_heads, module.num_levels, module.num_points
    angles = torch.arange(h, dtype=torch.float32) * (2 * math.pi / h)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().max(dim=-1, keepdim=True).values  # onto the unit square
    steps = torch.arange(1, P + 1, dtype=torch.float32).view(1, 1, P, 1)
    init.zeros_(module.sampling_offsets.weight)
    bias = (directions.view(h, 1, 1, 2) * steps).expand(h, L, P, 2).flatten()
    init.copy_(module.sampling_offsets.bias, bias.to(module.sampling_offsets.bias))
    init.zeros_(module.attention_weights.weight)
    init.zeros_(module.attention_weights.bias)
    for projection in (module.value_proj, module.output_proj):
        init.xavier_uniform_(projection.weight)
        init.zeros_(projection.bias)


def init_swin(backbone: nn.Module):
    """The original's Swin from scratch: PyTorch's defaults, position biases from N(0, 0.02)."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_as_torch(module)
        elif name.endswith("relative_position_bias"):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)


class Mask2FormerModel(Mask2FormerPreTrainedModel):
    """Backbone, pixel decoder and masked-attention decoder, without class head."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.pixel_level_module = Mask2FormerPixelLevelModule(config)
        self.transformer_module = Mask2FormerTransformerModule(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        mask_logits: str = "last",
    ) -> Mask2FormerModelOutput | tuple:
        """Run the network; with `pixel_mask` every image on its own canvas, whatever else is in the batch.

        Args:
            pixel_values: (B, 3, H, W), normalised; each image at the top left, zero-padded.
            pixel_mask: (B, H, W), 1 on the image. Images are run in groups of equal canvas (own size rounded up to
                32), so no result depends on batch mates. Without it the whole tensor is the image.
            output_hidden_states: also return feature maps and decoder states.
            output_attentions: also return attention weights (which takes the slower attention).
            return_dict: a tuple of the fields that are not None, if False.
            mask_logits: of which layers to compute mask logits: "last", "all" or "none".
        """
        if mask_logits not in ("last", "all", "none"):
            raise ValueError(f"mask_logits={mask_logits!r}: must be 'last', 'all' or 'none'")
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: it must be (batch, 3, height, width)"
            )
        options = {
            "mask_logits": mask_logits,
            "output_hidden_states": self._choose(output_hidden_states, "output_hidden_states"),
            "output_attentions": self._choose(output_attentions, "output_attentions"),
        }
        pixel_values = pixel_values.to(self.dtype)
        B, _, H, W = pixel_values.shape
        if pixel_mask is None:
            output = self._run(pixel_values, **options)
            output.image_sizes = output.canvas_sizes = torch.tensor([[H, W]], device=pixel_values.device).expand(B, 2)
        else:
            if pixel_mask.shape != (B, H, W):
                raise ValueError(
                    f"pixel_mask has shape {tuple(pixel_mask.shape)}: it must be (batch, height, width) of "
                    f"pixel_values, {(B, H, W)}"
                )
            sizes = image_sizes_of(pixel_mask)
            canvases = [canvas_of(size) for size in sizes]
            output = self._run_on_canvases(pixel_values, canvases, **options)
            output.image_sizes = torch.tensor(sizes, device=pixel_values.device)
            output.canvas_sizes = torch.tensor(canvases, device=pixel_values.device)
        output.mask_strides = torch.full((B,), self.config.common_stride, device=pixel_values.device)
        return output if self._choose(return_dict, "return_dict") else output.to_tuple()

    def _choose(self, argument: bool | None, field: str) -> bool:
        return getattr(self.config, field) if argument is None else argument

    def _run_on_canvases(self, pixel_values: Tensor, canvases: list[tuple[int, int]], **options):
        groups = {}
        for image, canvas in enumerate(canvases):
            groups.setdefault(canvas, []).append(image)
        H, W = pixel_values.shape[-2:]
        outputs = []
        for (height, width), images in groups.items():
            pixels = pixel_values if len(groups) == 1 else pixel_values[images]
            pixels = F.pad(pixels[..., :height, :width], (0, max(width - W, 0), 0, max(height - H, 0)))
            outputs.append(self._run(pixels, **options))
        if len(groups) == 1:
            return outputs[0]
        fields = {
            name: merge_groups(
                [output[name] for output in outputs],
                list(groups.values()),
                fill=PADDING_LOGIT if name == "masks_queries_logits" else 0.0,
            )
            for name in outputs[0]
        }
        return Mask2FormerModelOutput(**fields)

    def _run(
        self, pixel_values: Tensor, mask_logits: str, output_hidden_states: bool, output_attentions: bool
    ) -> Mask2FormerModelOutput:
        eager = output_attentions or self.config._attn_implementation == "eager"
        features, mask_features, maps = self.pixel_level_module(pixel_values)
        states = self.transformer_module(maps, mask_features, eager)
        chosen = {"none": [], "last": states.normalised[-1:], "all": states.normalised}[mask_logits]
        embed = self.transformer_module.decoder.mask_predictor
        masks = tuple(torch.einsum("bqc,bchw->bqhw", embed(state), mask_features) for state in chosen)
        return Mask2FormerModelOutput(
            encoder_last_hidden_state=features[-1],
            pixel_decoder_last_hidden_state=mask_features,
            transformer_decoder_last_hidden_state=states.hidden[-1],
            encoder_hidden_states=features if output_hidden_states else None,
            pixel_decoder_hidden_states=tuple(maps) if output_hidden_states else None,
            transformer_decoder_hidden_states=tuple(states.hidden) if output_hidden_states else None,
            transformer_decoder_intermediate_states=tuple(states.normalised),
            masks_queries_logits=masks or None,
            attentions=tuple(states.self_attentions) if output_attentions else None,
            cross_attentions=tuple(states.cross_attentions) if output_attentions else None,
        )


class Mask2FormerForUniversalSegmentation(Mask2FormerPreTrainedModel):
    """Mask2Former with class and mask predictions, for semantic, instance and panoptic segmentation."""

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.criterion = Mask2FormerLoss(
            num_labels=config.num_labels,
            no_object_weight=config.no_object_weight,
            class_weight=config.class_weight,
            mask_weight=config.mask_weight,
            dice_weight=config.dice_weight,
            num_points=config.train_num_points,
            oversample_ratio=config.oversample_ratio,
            importance_sample_ratio=config.importance_sample_ratio,
            focal=(config.focal_alpha, config.focal_gamma) if config.mask_loss == "focal" else None,
        )
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        mask_labels: list[Tensor] | None = None,
        class_labels: list[Tensor] | None = None,
        pixel_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_auxiliary_logits: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        ignore_masks: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        normalizers: Tensor | None = None,
    ) -> Mask2FormerForUniversalSegmentationOutput | tuple:
        """Predict segments, and with labels compute the loss.

        Args:
            pixel_values: (B, 3, H, W), normalised; each image at the top left, zero-padded.
            mask_labels: per image (N, h, w) binary masks of any dtype, of the size of pixel_values or of the image
                (then padded with zeros).
            class_labels: per image (N,) labels.
            pixel_mask: (B, H, W), 1 on the image; see `Mask2FormerModel.forward`. With labels the whole tensor is
                content, as in the original's training.
            output_hidden_states: also return feature maps and decoder states.
            output_auxiliary_logits: also return the predictions of the earlier layers.
            output_attentions: also return attention weights.
            return_dict: a tuple of the fields that are not None, if False.
            ignore_masks: per image (h, w), nonzero on pixels that take no part in matching and loss.
            generator: source of the random points of the loss.
            normalizers: (2,) what the loss is divided by in gradient accumulation (`criterion.loss_normalizers`).

        Raises:
            ValueError: for inputs that do not fit together, and in training for predictions that are not finite.
        """
        if (mask_labels is None) != (class_labels is None):
            given, missing = (
                ("mask_labels", "class_labels") if class_labels is None else ("class_labels", "mask_labels")
            )
            raise ValueError(f"{given} without {missing}: the loss needs both, one entry per image")
        has_labels = mask_labels is not None
        if ignore_masks is not None and not has_labels:
            raise ValueError("ignore_masks without mask_labels and class_labels: they only act in the loss")
        all_layers = self.model._choose(output_auxiliary_logits, "output_auxiliary_logits")
        wants_masks = all_layers or not (has_labels and self.training)
        outputs = self.model(
            pixel_values,
            pixel_mask=None if has_labels else pixel_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            mask_logits="all" if all_layers else "last" if wants_masks else "none",
        )
        if has_labels and pixel_mask is not None:
            outputs.image_sizes = image_extents(pixel_mask)[:, :2]  # unchecked: a look at the values stalls the device
        states = outputs.transformer_decoder_intermediate_states
        loss = loss_dict = auxiliary_logits = None
        if has_labels or all_layers:
            states = torch.stack(states)
            class_logits = self.class_predictor(states)  # (L, B, Q, K + 1)
        else:
            class_logits = self.class_predictor(states[-1]).unsqueeze(0)
        if has_labels:
            loss_dict = self._loss_terms(
                class_logits,
                states,
                outputs,
                canvas=tuple(pixel_values.shape[-2:]),
                mask_labels=mask_labels,
                class_labels=class_labels,
                ignore_masks=ignore_masks,
                generator=generator,
                normalizers=normalizers,
            )
            loss = sum(terms.sum() for terms in loss_dict.values())
        if all_layers:
            auxiliary_logits = [
                {"masks_queries_logits": masks, "class_queries_logits": classes}
                for masks, classes in zip(outputs.masks_queries_logits[:-1], class_logits[:-1], strict=True)
            ]
        output = Mask2FormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=class_logits[-1],
            masks_queries_logits=outputs.masks_queries_logits[-1] if wants_masks else None,
            auxiliary_logits=auxiliary_logits,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            pixel_decoder_last_hidden_state=outputs.pixel_decoder_last_hidden_state,
            transformer_decoder_last_hidden_state=outputs.transformer_decoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            pixel_decoder_hidden_states=outputs.pixel_decoder_hidden_states,
            transformer_decoder_hidden_states=outputs.transformer_decoder_hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            loss_dict=loss_dict,
            image_sizes=outputs.image_sizes,
            canvas_sizes=outputs.canvas_sizes,
            mask_strides=outputs.mask_strides,
        )
        return output if self.model._choose(return_dict, "return_dict") else output.to_tuple()

    def _loss_terms(self, class_logits, states, outputs, canvas, mask_labels, **options) -> dict[str, Tensor]:
        if any(tuple(masks.shape[1:]) != canvas for masks in mask_labels):
            for image, (masks, size) in enumerate(zip(mask_labels, outputs.image_sizes.tolist(), strict=False)):
                if tuple(masks.shape[1:]) not in (canvas, tuple(size)):
                    raise ValueError(
                        f"mask_labels[{image}] has shape {tuple(masks.shape)}: masks must have the size of "
                        f"pixel_values, {canvas[0]}x{canvas[1]}, or of the image by pixel_mask, {size[0]}x{size[1]}"
                    )
        layers = slice(None) if self.config.use_auxiliary_loss else slice(-1, None)
        embeddings = self.model.transformer_module.decoder.mask_predictor(states[layers])  # (L, B, Q, C)
        terms = self.criterion(
            class_logits[layers],
            LazyMasks(embeddings, outputs.pixel_decoder_last_hidden_state),
            mask_labels,
            canvas=canvas,
            **options,
        )
        weights = {
            "loss_cross_entropy": self.config.class_weight,
            "loss_mask": self.config.mask_weight,
            "loss_dice": self.config.dice_weight,
        }
        return {name: weight * terms[name] for name, weight in weights.items()}


__all__ = ["Mask2FormerForUniversalSegmentation", "Mask2FormerModel", "Mask2FormerPreTrainedModel"]
