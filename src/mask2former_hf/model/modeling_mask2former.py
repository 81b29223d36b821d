"""Mask2Former (Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022).

Letters: B batch, Q queries, K classes, C channels, h heads, D head dim, L supervised predictions (decoder layers + 1),
S = sum of H * W over the three feature levels. Everything is batch first.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .argument_checks import check_generator, check_labels_given, check_mask_sizes, check_pixels, check_tensor
from .canvas import PADDING_LOGIT, canvas_of, image_extents, image_sizes_of, merge_groups
from .channels import model_channels
from .configuration_mask2former import Mask2FormerConfig, built_in_values, check_built_in, no_object_weight_of
from .criterion import LossSettings, Mask2FormerLoss
from .designs import make_head, make_pixel_decoder, make_transformer
from .mask_logits import LazyMasks
from .onednn import times_map
from .outputs import OF_THE_MODEL_ALONE, Mask2FormerForUniversalSegmentationOutput, Mask2FormerModelOutput
from .per_pixel_head import ClassMaps, class_maps
from .pixel_decoder import Mask2FormerPixelLevelModule
from .pretrained import Mask2FormerPreTrainedModel
from .transfers import filled, to_device
from .transformer_decoder import Mask2FormerTransformerModule

logger = logging.get_logger(__name__)


class Mask2FormerModel(Mask2FormerPreTrainedModel):
    """Backbone, pixel decoder and masked-attention decoder, or those of another design, without class head."""

    pixel_level_class = Mask2FormerPixelLevelModule
    transformer_class = Mask2FormerTransformerModule

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.pixel_level_module = pixels = self.pixel_level_class(config, make_pixel_decoder)
        self.transformer_module = make_transformer(config, pixels.backbone_channels, self.transformer_class)
        self._built_in = built_in_values(config)
        self.post_init()

    def check_config(self):
        """Refuse a config that was changed where the modules cannot follow (`BUILT_IN_FIELDS`).

        Raises:
            ValueError: naming the field.
        """
        if torch.compiler.is_compiling():
            return  # the fields are constants of the graph
        check_built_in(self.config, self._built_in | self.transformer_module.changed_fields())

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
            pixel_values: (B, c, H, W) of the backbone's `num_channels`, normalised; each image at the top left,
                zero-padded.
            pixel_mask: (B, H, W), 1 on the image. Images are run in groups of equal canvas (own size rounded up to
                32), so no result depends on batch mates. Without it the whole tensor is the image.
            output_hidden_states: also return feature maps and decoder states.
            output_attentions: also return attention weights (which takes the slower attention).
            return_dict: a tuple of the fields that are not None, if False.
            mask_logits: of which layers to compute mask logits: "last", "all" or "none".
        """
        check_pixels(pixel_values, pixel_mask, model_channels(self.config))
        return self._forward(
            pixel_values, pixel_mask, output_hidden_states, output_attentions, return_dict, mask_logits
        )

    def _forward(self, pixel_values, pixel_mask, output_hidden_states, output_attentions, return_dict, mask_logits):
        self.check_config()
        if mask_logits not in ("last", "all", "none"):
            raise ValueError(f"mask_logits={mask_logits!r}: must be 'last', 'all' or 'none'")
        options = {
            "mask_logits": mask_logits,
            "output_hidden_states": self._choose(output_hidden_states, "output_hidden_states"),
            "output_attentions": self._choose(output_attentions, "output_attentions"),
        }
        pixel_values = pixel_values.to(self.dtype)
        B, (H, W) = pixel_values.shape[0], pixel_values.shape[-2:]
        if pixel_mask is None:
            output = self._run(pixel_values, **options)
            output.image_sizes = output.canvas_sizes = filled((H, W), B, pixel_values.device)
        else:
            sizes = image_sizes_of(pixel_mask)
            canvases = [canvas_of(size) for size in sizes]
            output = self._run_on_canvases(pixel_values, canvases, **options)
            output.image_sizes = to_device(sizes, pixel_values.device)
            output.canvas_sizes = to_device(canvases, pixel_values.device)
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
            pixels = pixel_values if len(groups) == 1 else pixel_values[to_device(images, pixel_values.device)]
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
        masks = tuple(self.mask_maps(self.mask_embeddings(state), mask_features) for state in chosen)
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

    def normalise(self, hidden_states: Tensor) -> Tensor:
        """(..., C) `transformer_decoder_hidden_states` -> `transformer_decoder_intermediate_states`."""
        return self.transformer_module.decoder.layernorm(hidden_states)

    def mask_embeddings(self, states: Tensor) -> Tensor:
        """Of (..., C) normalised states, whose product with the mask features is the mask logits."""
        return self.transformer_module.decoder.mask_predictor(states)

    def mask_maps(self, embeddings: Tensor, mask_features: Tensor) -> Tensor:
        """Mask logits (B, Q, H, W) of (B, Q, C) embeddings and (B, C, H, W) mask features."""
        if self.config.head_type != "masks":
            return class_maps(embeddings, mask_features)
        return times_map(embeddings, mask_features)


class Mask2FormerForSegmentation(Mask2FormerPreTrainedModel):
    """Class head and criterion on the network: what models of images and of clips share."""

    model_class: type[Mask2FormerModel]
    criterion_class: type[Mask2FormerLoss]
    output_class: type[Mask2FormerForUniversalSegmentationOutput]

    def __init__(self, config: Mask2FormerConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.class_predictor, self.criterion = make_head(config, self.criterion_class)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As transformers', with a warning where `no_object_weight` of the checkpoint's config and weights differ."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._follow_no_object_weight(pretrained_model_name_or_path, **kwargs)
        return loaded

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        self._follow_no_object_weight()
        return result

    def _follow_no_object_weight(self, checkpoint=None, **kwargs):
        """Let the config's weight act, where loading a checkpoint has filled the criterion's buffer with another."""
        if self.criterion.empty_weight is None:  # of per-pixel heads
            return
        found, wanted = self.criterion.empty_weight[-1], self.config.no_object_weight
        if found.device.type != "meta" and not math.isclose(found.item(), wanted, rel_tol=0.01):  # bfloat16's digits
            if not math.isclose(found.item(), no_object_weight_of(checkpoint, kwargs), rel_tol=0.01):
                logger.warning_once(
                    f"criterion.empty_weight of the checkpoint says that 'no object' weighs {found.item():.6g}, and "
                    f"no_object_weight of the config {wanted:.6g}: the config acts. Load it with "
                    f"no_object_weight={found.item():.6g} for the other"
                )
        self.criterion.write_no_object_weight(wanted)

    def state_dict(self, *args, **kwargs):
        self.criterion.write_no_object_weight(self.config.no_object_weight)
        return super().state_dict(*args, **kwargs)

    def check_config(self):
        self.model.check_config()
        self._check_num_labels()

    def _check_num_labels(self):
        if not torch.compiler.is_compiling():
            check_built_in(self.config, {"num_labels": self.class_predictor.out_features - 1})

    def _predict(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None,
        targets: dict | None,
        output_auxiliary_logits: bool | None,
        return_dict: bool | None,
        **also: bool | None,
    ):
        """The forward, of pixels that have been checked; `targets` are arguments of the criterion, checked as well."""
        has_labels = targets is not None
        all_layers = self.model._choose(output_auxiliary_logits, "output_auxiliary_logits")
        wants_masks = all_layers or not (has_labels and self.training)
        outputs = self.model(
            pixel_values,
            pixel_mask=None if has_labels else pixel_mask,
            return_dict=True,
            mask_logits="all" if all_layers else "last" if wants_masks else "none",
            **also,
        )
        if has_labels and pixel_mask is not None:
            outputs.image_sizes = image_extents(pixel_mask)[:, :2]  # unchecked: a look at the values stalls the device
        states = outputs.transformer_decoder_intermediate_states
        states = torch.stack(states if has_labels or all_layers else states[-1:])  # (L, B, Q, C)
        class_logits = self.class_predictor(states)  # (L, B, Q, K + 1)
        loss = loss_dict = auxiliary_logits = None
        if has_labels:
            canvas = tuple(pixel_values.shape[-2:])
            check_mask_sizes(targets["mask_labels"], canvas, outputs.image_sizes)
            layers = slice(None) if self.config.use_auxiliary_loss else slice(-1, None)
            loss_dict = self._loss_terms(
                class_logits[layers],
                self.mask_logits(states[layers], outputs.pixel_decoder_last_hidden_state),
                canvas=canvas,
                **targets,
            )
            loss = sum(terms.sum() for terms in loss_dict.values())
        if all_layers:
            auxiliary_logits = [
                {"masks_queries_logits": masks, "class_queries_logits": classes}
                for masks, classes in zip(outputs.masks_queries_logits[:-1], class_logits[:-1], strict=True)
            ]
        output = self.output_class(
            loss=loss,
            class_queries_logits=class_logits[-1],
            masks_queries_logits=outputs.masks_queries_logits[-1] if wants_masks else None,
            auxiliary_logits=auxiliary_logits,
            loss_dict=loss_dict,
            **{name: value for name, value in outputs.items() if name not in OF_THE_MODEL_ALONE},
        )
        return output if self.model._choose(return_dict, "return_dict") else output.to_tuple()

    def mask_logits(self, states: Tensor, mask_features: Tensor) -> LazyMasks | ClassMaps:
        """Masks of (L, B, Q, C) normalised states and (B, C, H, W) mask features, as the loss reads them."""
        return self.criterion.lazy_masks(self.model.mask_embeddings(states), mask_features)

    def predictions(self, hidden_states: Tensor, mask_features: Tensor) -> tuple[Tensor, LazyMasks]:
        """Class logits (L, B, Q, K + 1) and masks of what the output has for L layers.

        Args:
            hidden_states: (L, B, Q, C) of `transformer_decoder_hidden_states`.
            mask_features: (B, C, H, W), `pixel_decoder_last_hidden_state`.
        """
        states = self.model.normalise(hidden_states)
        return self.class_predictor(states), self.mask_logits(states, mask_features)

    def _loss_terms(self, *predictions, **targets) -> dict[str, Tensor]:
        """The weighted terms, by the config as it is now."""
        self.criterion.settings = settings = LossSettings.from_config(self.config)
        terms = self.criterion(*predictions, **targets)
        return {name: settings.weights[name] * term for name, term in terms.items()}


class Mask2FormerForUniversalSegmentation(Mask2FormerForSegmentation):
    """Mask2Former with class and mask predictions, for semantic, instance and panoptic segmentation."""

    model_class = Mask2FormerModel
    criterion_class = Mask2FormerLoss
    output_class = Mask2FormerForUniversalSegmentationOutput

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
            pixel_values: (B, c, H, W) of the backbone's `num_channels`, normalised; each image at the top left,
                zero-padded.
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
            TypeError: for inputs that are no tensors.
            ValueError: for inputs that do not fit together, and in training for predictions that are not finite.
        """
        self._check_num_labels()
        check_pixels(pixel_values, pixel_mask, model_channels(self.config))
        check_labels_given(mask_labels, class_labels, ignore_masks)
        check_generator(generator)
        if normalizers is not None:
            check_tensor("normalizers", normalizers)
        labels = {"mask_labels": mask_labels, "class_labels": class_labels, "ignore_masks": ignore_masks}
        targets = labels | {"generator": generator, "normalizers": normalizers}
        return self._predict(
            pixel_values,
            pixel_mask,
            None if mask_labels is None else targets,
            output_auxiliary_logits,
            return_dict,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )


__all__ = ["Mask2FormerForUniversalSegmentation", "Mask2FormerModel", "Mask2FormerPreTrainedModel"]
