"""Photos and label maps → padded tensors for the model, and model outputs → results at the photos' sizes.

Reads and writes the `preprocessor_config.json` of transformers' Mask2Former. Pixels follow the original
(facebookresearch/Mask2Former with detectron2's resize), not transformers, which stretches images to multiples of 32.
Letters: `B` batch, `Q` queries, `K` classes, `N` targets or instances of an image; (H, W) the padded canvas.
"""

import reprlib
from typing import Any, TypedDict

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    PILImageResampling,
    SizeDict,
)
from transformers.utils import logging

from .channels import check_channels, image_channels
from .forked_processes import one_thread_if_forked
from .image_bands import say_scale
from .image_geometry import canvas_size, output_size, resize
from .image_inputs import (
    check_settings,
    id_map_to_targets,
    on_canvas,
    to_id_maps,
    to_list,
    to_pixels,
)
from .number_checks import check_fractions, check_labels
from .postprocessing import (
    instance_segmentation,
    logits_per_image,
    panoptic_segmentation,
    semantic_map,
    semantic_scores,
    stack_instances,
)
from .result_defaults import (
    INSTANCE_THRESHOLD,
    MASK_THRESHOLD,
    MAX_INSTANCES,
    OVERLAP_THRESHOLD,
    PANOPTIC_THRESHOLD,
)
from .run_lengths import masks_to_coco_rle

logger = logging.get_logger(__name__)
Size = int | list | tuple | dict | SizeDict | None
Statistic = float | int | list | tuple | None


class Mask2FormerImageProcessorKwargs(TypedDict, total=False):
    """What can be set on the processor and overridden in a call; an argument outside this list raises TypeError."""

    do_resize: bool | None
    size: Size
    size_divisor: int | None
    resample: int | None
    do_rescale: bool | None
    rescale_factor: float | int | None
    do_normalize: bool | None
    image_mean: Statistic
    image_std: Statistic
    num_channels: int | None
    pad_size: Size
    ignore_index: int | None
    do_reduce_labels: bool | None
    num_labels: int | None
    input_data_format: str | None
    return_tensors: Any


class Mask2FormerImageProcessor(PilBackend):
    """Prepares images and targets for Mask2Former and turns its outputs into segmentations.

    Args:
        size: {"shortest_edge", "longest_edge"} keeps the aspect: the short side gets the first length, unless the long
            side would exceed the second. {"height", "width"} is an exact size; {"max_height", "max_width"} a box
            to fit into. An int is a short side.
        size_divisor: canvases are padded (never stretched) to a multiple of it; 0 for none.
        pad_size: {"height", "width"} of the canvas, instead of the largest image of the batch.
        resample, do_resize, do_rescale, rescale_factor, do_normalize, image_mean, image_std: pixel values become
            (x * rescale_factor - image_mean) / image_std, in float32, after a PIL resize of the 8-bit image.
        num_channels: None for photos, which become red, green and blue of 8 bits. A number from 1 to 16 for images of
            so many bands: integers or floats, whose numbers stay as they are, in every band's own order, and are
            resized band by band. rescale_factor is 1/255 unless given, as in transformers; of 16 bits it is
            1/65535, or what the sensor's numbers mean, and of floats mostly 1. Optional field of ours;
            image_mean or image_std of another length than 3 imply it.
        ignore_index: id of pixels without a label.
        do_reduce_labels: id 0 is ignored as ignore_index is, and every other id becomes one less (ADE20k).
        num_labels: number of classes; a label outside it is warned about.
        label_ids_to_fuse: classes that are stuff: the panoptic default, and no instances. Optional field of ours.
        object_mask_threshold, overlap_threshold: defaults of panoptic results (`post_process_panoptic_segmentation`),
            where the checkpoint's recipe has others than 0.8 and 0.8. Optional fields of ours, in files only then.
    """

    valid_kwargs = Mask2FormerImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    do_resize = True
    size = {"shortest_edge": 800, "longest_edge": 1333}
    default_to_square = False
    size_divisor = 32
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    num_channels = None
    do_reduce_labels = False
    label_ids_to_fuse = None
    object_mask_threshold = PANOPTIC_THRESHOLD
    overlap_threshold = OVERLAP_THRESHOLD

    def __init__(self, **kwargs):
        # Spellings of older preprocessor_config.json files, in which the cap of the long side was a field of its own.
        max_size, old_max_size = kwargs.pop("max_size", None), kwargs.pop("_max_size", None)
        for old, new in (("reduce_labels", "do_reduce_labels"), ("size_divisibility", "size_divisor")):
            value = kwargs.pop(old, None)
            if value is not None and kwargs.get(new) is None:
                kwargs[new] = value
        size = kwargs.get("size")
        if isinstance(size, int):
            longest = max_size or old_max_size
            kwargs["size"] = {"shortest_edge": size, **({"longest_edge": longest} if longest else {})}
        elif size is None and max_size is not None:
            kwargs["size"] = {**self.size, "longest_edge": max_size}
        for name in ("object_mask_threshold", "overlap_threshold", "num_channels"):
            if kwargs.get(name) in (None, getattr(type(self), name)):
                kwargs.pop(name, None)
        check_settings(kwargs)
        super().__init__(**kwargs)
        image_channels(self)  # with the defaults of what was not given

    @one_thread_if_forked()
    def preprocess(self, images, segmentation_maps=None, instance_id_to_semantic_id=None, **kwargs):
        """Images, and optionally maps of ids, to the model's inputs.

        Args:
            images: one image or a list, sizes mixed: PIL, path, URL, NumPy or torch; (h, w), (h, w, c) or (c, h, w)
                with 1 to 4 channels (alpha is dropped). EXIF rotation is applied. 16-bit values are divided by 257.
                Floats are taken as they are: pass do_rescale=False when they lie in [0, 1]. With num_channels, images
                of so many channels, (h, w) if it is 1, of which nothing is dropped or divided.
            segmentation_maps: one (h, w) map of ids per image, as PIL, path, NumPy or torch; a pixel's id is its
                class, or its instance when instance_id_to_semantic_id is given.
            instance_id_to_semantic_id: {id in the map: class}, one for all images or a list with one per image; both
                before do_reduce_labels.
            kwargs: any field of Mask2FormerImageProcessorKwargs, for this call. return_tensors is "pt", "np" or None
                (lists of NumPy arrays).

        Returns:
            BatchFeature with pixel_values (B, c, H, W) float32, zero outside the image, and pixel_mask (B, H, W)
            int64, 1 on the image. With maps also, as lists of B: mask_labels (N, H, W) uint8, 0 outside the image;
            class_labels (N,) int64; and if ignore_index is set, ignore_masks (H, W) bool, True on the image's pixels
            without a label.

        Raises:
            ValueError: a setting out of range, an image that is empty or oddly shaped, a map that does not fit its
                image, an id below 0 or without a class, or a pad_size that is too small or not a multiple of
                size_divisor.
            TypeError: something that is no image, or an unknown argument.
        """
        own = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        check_settings(own | kwargs)
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, **kwargs)

    def _preprocess_image_like_inputs(
        self,
        images,
        segmentation_maps,
        instance_id_to_semantic_id,
        *,
        do_resize,
        size,
        size_divisor,
        resample,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        num_channels,
        pad_size,
        ignore_index,
        do_reduce_labels,
        num_labels,
        input_data_format,
        return_tensors,
        crop_size=None,  # the base class adds it, always None
    ):
        kind = getattr(return_tensors, "value", return_tensors)
        if kind not in ("pt", "np", None):
            raise ValueError(f'return_tensors={reprlib.repr(kind)} must be "pt", "np" or None.')
        channels = check_channels(num_channels, image_mean, image_std)
        images = [
            to_pixels(x, f"images[{i}]", input_data_format, channels)
            for i, x in enumerate(to_list(images, 3, "images"))
        ]
        sizes = [x.shape[:2] for x in images]
        if do_rescale and rescale_factor < 1 and any(x.dtype == np.float32 and x.max() <= 1 for x in images):
            logger.warning_once("images are floats within [0, 1] and get rescaled again; pass do_rescale=False.")
        if do_rescale and channels is not None:
            say_scale(images, rescale_factor)
        if do_resize:
            images = [resize(x, output_size(*x.shape[:2], size), resample) for x in images]
        canvas = canvas_size([x.shape[:2] for x in images], size_divisor, pad_size)
        mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
        pixel_values, pixel_mask = on_canvas(images, canvas, rescale_factor if do_rescale else 1.0, mean, std)
        data = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        if segmentation_maps is not None:
            resized = [x.shape[:2] for x in images]
            maps = to_id_maps(segmentation_maps, instance_id_to_semantic_id, sizes, resized)
            targets = [id_map_to_targets(ids, canvas, of, ignore_index, do_reduce_labels) for ids, of in maps]
            data["mask_labels"], data["class_labels"], ignored = map(list, zip(*targets, strict=True))
            for labels in data["class_labels"]:
                if num_labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < num_labels:
                    logger.warning_once(f"class labels {labels.tolist()} are not all in [0, num_labels={num_labels}).")
            if ignore_index is not None:
                data["ignore_masks"] = ignored

        if kind != "pt":
            data = {k: [x.numpy() for x in v] if isinstance(v, list) else v.numpy() for k, v in data.items()}
        if kind is None:
            data = {k: list(v) for k, v in data.items()}
        return BatchFeature(data)

    @one_thread_if_forked()
    def post_process_semantic_segmentation(
        self, outputs, target_sizes=None, return_segmentation_scores=False, *, resize_masks_first=True
    ):
        """Class of every pixel.

        Args:
            outputs: the model's output with class_queries_logits (B, Q, K + 1), masks_queries_logits (B, Q, h, w) and,
                to crop padding, image_sizes, canvas_sizes and mask_strides (`logits_per_image`). Without those, as
                from transformers' own model, the whole input counts as image.
            target_sizes: B pairs (rows, columns); None keeps the size after `preprocess`.
            return_segmentation_scores: return objects with segmentation (H, W) and segmentation_scores (K, H, W).
            resize_masks_first: False for the order the original uses in semantic-only models (`semantic_scores`).

        Returns:
            B maps (H, W) of int64 class ids, or the objects above.
        """
        results = []
        for logits in logits_per_image(outputs, target_sizes):
            if not return_segmentation_scores:
                results.append(semantic_map(*logits, resize_masks_first=resize_masks_first))
                continue
            scores = semantic_scores(*logits, resize_masks_first=resize_masks_first)
            data = {"segmentation": scores.max(0).indices, "segmentation_scores": scores}
            results.append(SemanticSegmentationPostProcessorOutput(data=data))
        return results

    @one_thread_if_forked()
    def post_process_instance_segmentation(
        self,
        outputs,
        threshold=INSTANCE_THRESHOLD,
        mask_threshold=MASK_THRESHOLD,
        overlap_mask_area_threshold=0.0,
        target_sizes=None,
        return_coco_annotation=False,
        return_binary_maps=False,
        *,
        top_k=MAX_INSTANCES,
    ):
        """Instances of every image, best first; masks may overlap, empty ones are left out.

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold: lowest score (class probability × mean mask probability); 0 for COCO evaluation.
            mask_threshold: mask probability above which a pixel belongs to an instance.
            overlap_mask_area_threshold: drop an instance of which better ones leave less than this fraction visible.
                0 keeps all, as the original does; transformers' default of 0.8 is never read there.
            return_coco_annotation: "segmentation" becomes the list of compressed COCO run-length codes.
            return_binary_maps: "segmentation" becomes the masks, (N, H, W) bool.
            top_k: (query, class) pairs looked at (the original's TEST.DETECTIONS_PER_IMAGE).

        Returns:
            B dicts: "segmentation" (H, W) int32, the id of the best instance at each pixel and -1 elsewhere;
            "segments_info" with "id" (0, 1, ...), "label_id", "was_fused" (False) and "score"; and in the same order
            "masks" (N, H, W) bool, "scores" (N,), "labels" (N,), "boxes" (N, 4), "queries" (N,) as in
            `instance_segmentation`.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("return_coco_annotation and return_binary_maps are both True; ask for one of them.")
        check_fractions(
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
        )
        results = []
        for logits in logits_per_image(outputs, target_sizes):
            stuff = set(self.label_ids_to_fuse or ())
            found = instance_segmentation(
                *logits,
                top_k=top_k,
                thing_label_ids=set(range(logits[0].shape[-1] - 1)) - stuff if stuff else None,
                score_threshold=threshold,
                mask_threshold=mask_threshold,
            )
            segmentation, kept = stack_instances(found["masks"], overlap_mask_area_threshold, found["boxes"])
            if len(kept) < len(found["scores"]):
                found = {name: value[kept] for name, value in found.items()}
            info = _instances_info(found["labels"].tolist(), found["scores"].tolist())
            if return_coco_annotation:
                segmentation = masks_to_coco_rle(found["masks"])
            elif return_binary_maps:
                segmentation = found["masks"]
            results.append({"segmentation": segmentation, "segments_info": info, **found})
        return results

    @one_thread_if_forked()
    def post_process_panoptic_segmentation(
        self,
        outputs,
        threshold=None,
        mask_threshold=MASK_THRESHOLD,
        overlap_mask_area_threshold=None,
        label_ids_to_fuse=None,
        target_sizes=None,
    ):
        """One segment or void for every pixel, by the original's rules (`panoptic_segmentation`).

        Args:
            outputs, target_sizes: as in `post_process_semantic_segmentation`.
            threshold: a query counts above this class probability; None takes the processor's object_mask_threshold.
                0.8 is the original's; transformers has 0.5.
            mask_threshold: mask probability that a pixel's owner needs there, or the pixel is void.
            overlap_mask_area_threshold: fraction of its thresholded area that a query has to own; None takes the
                processor's overlap_threshold.
            label_ids_to_fuse: stuff classes, one segment each; None takes the processor's own field.

        Returns:
            B dicts: "segmentation" (H, W) int32 with 0 for void, and "segments_info" with "id" (1, 2, ...),
            "label_id", "was_fused", "score", "area" in pixels, and "query", the first of its queries.
        """
        stuff = self.label_ids_to_fuse if label_ids_to_fuse is None else label_ids_to_fuse
        threshold = self.object_mask_threshold if threshold is None else threshold
        if overlap_mask_area_threshold is None:
            overlap_mask_area_threshold = self.overlap_threshold
        check_labels(label_ids_to_fuse=() if stuff is None else stuff)
        check_fractions(
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
        )
        results = []
        for logits in logits_per_image(outputs, target_sizes):
            segmentation, segments = panoptic_segmentation(
                *logits,
                object_mask_threshold=threshold,
                overlap_threshold=overlap_mask_area_threshold,
                mask_threshold=mask_threshold,
                stuff_label_ids=set(stuff or ()),
            )
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results


def _instances_info(labels: list[int], scores: list[float]) -> list[dict]:
    """The "segments_info" of instances, in their order."""
    rows = enumerate(zip(labels, scores, strict=True))
    return [{"id": i, "label_id": label, "was_fused": False, "score": score} for i, (label, score) in rows]
