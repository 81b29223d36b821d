"""Logits of one clip → objects with a mask in every frame; pure functions of tensors.

Letters as in postprocessing.py, and `T` frames. "The original" is `mask2former_video/video_maskformer_model.py` of
facebookresearch/Mask2Former.
"""

import torch

from .argument_checks import as_tensor, check_logits
from .mask_resizing import check_sizes, query_chunks
from .number_checks import check_fractions
from .result_defaults import MASK_THRESHOLD

MAX_TRACKS = 10  # of a video in the original; a fixed number there


def best_pairs(class_logits, top_k=MAX_TRACKS, score_threshold=0.0):
    """The top_k best (query, class) pairs by class probability; a query may appear with several classes.

    Returns:
        scores (N,) float32, falling; labels (N,) and queries (N,) int64.
    """
    check_fractions(score_threshold=score_threshold)
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} must be at least 1; pass the number of objects wanted, for example 10.")
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    kept = scores >= score_threshold
    num_classes = probabilities.shape[1]
    return scores[kept], pairs[kept] % num_classes, pairs[kept] // num_classes


def video_instance_segmentation(
    class_logits,
    mask_logits,
    canvas_size,
    image_size=None,
    target_size=None,
    *,
    top_k=MAX_TRACKS,
    score_threshold=0.0,
    mask_threshold=MASK_THRESHOLD,
):
    """The best (query, class) pairs of a clip, each with its mask in every frame, by the original's rules.

    A score is the class probability alone, without the quality of the masks that scores of images have. Masks of
    frames without the object are empty, and may be so in all frames.

    Args:
        class_logits: (Q, K + 1), the last column is "no object".
        mask_logits: (Q, T, h, w), the clip's own part of the model output.
        canvas_size, image_size, target_size: of a frame, as in postprocessing.py.
        top_k: pairs taken; the original's 10, or Q * K if there are fewer.
        score_threshold: pairs below it are left out (the original has no such rule: 0).
        mask_threshold: mask probability above which (strictly) a pixel belongs to the object.

    Returns:
        dict sorted by falling score: "masks" (N, T, H, W) bool, "scores" (N,) float32, "labels" (N,) int64 and
        "queries" (N,) int64.
    """
    check_fractions(mask_threshold=mask_threshold)
    class_logits, mask_logits = as_tensor("class_logits", class_logits, 2), as_tensor("mask_logits", mask_logits, 4)
    if len(class_logits) != len(mask_logits):
        raise ValueError(
            f"class_logits {tuple(class_logits.shape)} and mask_logits {tuple(mask_logits.shape)} must be (Q, K + 1) "
            "and (Q, T, h, w) of one clip with the same Q; index the batch first."
        )
    check_logits(class_logits, mask_logits)
    scores, labels, queries = best_pairs(class_logits.detach(), top_k, score_threshold)
    used, position = torch.unique(queries, return_inverse=True)  # every mask is resized once
    masks = resized_masks(mask_logits.detach()[used], canvas_size, image_size, target_size, mask_threshold)
    return {"masks": masks[position], "scores": scores, "labels": labels, "queries": queries}


def resized_masks(mask_logits, canvas_size, image_size=None, target_size=None, mask_threshold=MASK_THRESHOLD):
    """(N, T, h, w) mask logits → (N, T, H, W) bool at the target size, a few maps at a time."""
    canvas_size, image_size, target_size = sizes = check_sizes(canvas_size, image_size, target_size)
    logit_threshold = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()
    maps = mask_logits.flatten(0, 1)  # (N * T, h, w)
    masks = torch.empty(len(maps), *target_size, dtype=torch.bool, device=maps.device)
    for start, logits in query_chunks(maps, *sizes):
        masks[start : start + len(logits)] = logits > logit_threshold
    return masks.view(*mask_logits.shape[:2], *target_size)
