"""A threshold of its own for every mask, by Otsu's rule (IEEE Trans. SMC, 1979), instead of 0.5 for all.

Semantic results compare classes and have no threshold.
"""

import torch
from torch import Tensor
from tqdm import tqdm

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


def otsu_decision(progress: bool = False):
    """A `decide` of `instance_segmentation` and `panoptic_segmentation`: pixels above a mask's own threshold.

    Args:
        progress: show a bar over the masks.
    """
    bar = tqdm(desc="refining", unit="mask", disable=not progress, leave=False)

    def decide(probabilities: Tensor) -> Tensor:
        bar.update(len(probabilities))
        return probabilities > otsu_thresholds(probabilities)[:, None, None]

    return decide
