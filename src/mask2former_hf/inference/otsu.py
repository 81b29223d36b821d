"""A threshold of its own for every mask, by Otsu's rule (IEEE Trans. SMC, 1979), instead of 0.5 for all.

The arguments before the star, and the results, are those of the functions of the same name in postprocessing.py.
Semantic results compare classes and have no threshold.
"""

import torch
from torch import Tensor

from .rules import instances_by, panoptic_result, panoptic_scores

HISTOGRAM_BINS = 256
MIN_RANGE = 1e-3  # of probabilities; a flatter mask has no two groups of pixels to tell apart


def load_threshold_otsu():
    """scikit-image's `threshold_otsu`; an ImportError with the command that installs it."""
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ImportError("Otsu's threshold needs scikit-image: pip install scikit-image") from error
    return threshold_otsu


def otsu_thresholds(probabilities: Tensor) -> Tensor:
    """The threshold t of each mask with the largest variance between its pixels up to t and those above.

    Args:
        probabilities: (N, H, W) in [0, 1].

    Returns:
        (N,) float32; 0.5 for masks whose probabilities are all alike.

    Raises:
        ImportError: without scikit-image.
    """
    threshold_otsu, thresholds = load_threshold_otsu(), []
    for mask in probabilities.detach().float():
        low, high = mask.aminmax()
        flat = (high - low).item() < MIN_RANGE
        thresholds.append(0.5 if flat else float(threshold_otsu(mask.cpu().numpy(), nbins=HISTOGRAM_BINS)))
    return torch.tensor(thresholds, dtype=torch.float32, device=probabilities.device)


def otsu_instance_segmentation(
    class_logits, mask_logits, canvas_size, image_size=None, target_size=None, *, progress=False, **options
):
    """`postprocessing.instance_segmentation`; a pixel belongs to a mask above the mask's own threshold.

    Args:
        progress: show a bar over the masks.
        options: `top_k`, `thing_label_ids` and `score_threshold`.
    """

    def decide(mask):
        return mask > otsu_thresholds(mask[None])[0]

    logits = (class_logits, mask_logits, canvas_size, image_size, target_size)
    return instances_by(decide, *logits, progress=progress, **options)


def otsu_panoptic_segmentation(class_logits, mask_logits, canvas_size, image_size=None, target_size=None, **options):
    """`postprocessing.panoptic_segmentation`; a query's area and its visible pixels are above its own threshold.

    Args:
        options: `object_mask_threshold`, `overlap_threshold` and `stuff_label_ids`.
    """
    logits = (class_logits, mask_logits, canvas_size, image_size, target_size)
    claims, segments = panoptic_scores(*logits, thresholds=otsu_thresholds, **options)
    return panoptic_result(claims.argmax(0), segments)
