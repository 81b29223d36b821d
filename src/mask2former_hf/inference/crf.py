"""Dense conditional random field over the photo (Krahenbuhl & Koltun, NeurIPS 2011) on semantic, instance and panoptic
scores: pixels that are near, or near and of like colour, are pulled to the same label.

The unary energy of a pixel is -log of its labels' scores, normalised to 1; after a few mean-field steps the most
probable label wins. Runs on the CPU (pydensecrf2), on crops where the image is big. Letters as in postprocessing.py.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..model.postprocessing import panoptic_claims
from ..model.result_defaults import MASK_THRESHOLD

MIN_PROBABILITY = 1e-5  # of a label in its energy; keeps a certain pixel movable
MIN_PRESENCE = 0.02  # a label that reaches this nowhere in a crop is left out there: time and memory grow with labels
BOX_MARGIN = 16  # pixels around an instance that may become part of it, and a quarter of its sides
MIN_INSTANCE_PROBABILITY = 0.05  # where an instance may be at all


@dataclass(frozen=True)
class CrfOptions:
    """Strength and reach of the pairwise terms, and the size of the crops.

    Args:
        smoothness, smoothness_reach: weight, and standard deviation in pixels, of the term for near pixels.
        appearance, appearance_reach, appearance_colour: weight, and standard deviations in pixels and in grey levels
            of 255, of the term for near pixels of like colour. All five are those of the paper's example program.
        steps: of mean-field inference.
        crop: largest side of a crop in pixels; 1024 with 20 labels need about 1 GB.
        overlap: pixels that a crop sees beyond the part that is kept of it.
    """

    smoothness: float = 3.0
    smoothness_reach: float = 3.0
    appearance: float = 10.0
    appearance_reach: float = 80.0
    appearance_colour: float = 13.0
    steps: int = 5
    crop: int = 1024
    overlap: int = 96

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be at least 1; leave the CRF out to keep results as they are")
        if not 0 <= 2 * self.overlap < self.crop:
            raise ValueError(f"crop={self.crop}, overlap={self.overlap}: a crop must exceed two overlaps")


def load_densecrf():
    """The module `pydensecrf.densecrf`; an ImportError with the command that installs it."""
    try:
        import pydensecrf.densecrf
    except ImportError as error:
        raise ImportError("The CRF needs pydensecrf2: pip install pydensecrf2") from error
    return pydensecrf.densecrf


def dense_crf(image, probabilities: Tensor, options: CrfOptions | None = None, progress: bool = False) -> Tensor:
    """Label probabilities of every pixel, in view of the image.

    Args:
        image: (H, W, 3) uint8 RGB, array or tensor.
        probabilities: (N, H, W), 0 or more; normalised over the N labels here.
        progress: show a bar over the crops' steps.

    Returns:
        (N, H, W) float32, summing to 1, on the device of `probabilities`.

    Raises:
        ImportError: without pydensecrf2.
        ValueError: for an image of another size or type.
    """
    densecrf, options = load_densecrf(), options or CrfOptions()
    image = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    size = tuple(probabilities.shape[1:])
    if image.shape != (*size, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image is {image.dtype} of shape {image.shape}: it must be uint8 RGB of the result's size, "
            f"{(*size, 3)}; pass the photo's size as target_size"
        )
    scores = probabilities.detach().float().cpu().numpy()
    refined = np.zeros_like(scores)
    crops = [(rows, columns) for rows in _crops(size[0], options) for columns in _crops(size[1], options)]
    with tqdm(total=len(crops) * options.steps, desc="CRF", unit="step", disable=not progress, leave=False) as bar:
        for (rows, kept_rows), (columns, kept_columns) in crops:
            posterior = _infer(densecrf, image[rows, columns], scores[:, rows, columns], options, bar)
            inner = (slice(None), _shift(kept_rows, rows.start), _shift(kept_columns, columns.start))
            refined[:, kept_rows, kept_columns] = posterior[inner]
    return torch.from_numpy(refined).to(probabilities.device)


def crf_semantic_map(image, scores: Tensor, options: CrfOptions | None = None, progress: bool = False) -> Tensor:
    """`postprocessing.semantic_scores`' (K, H, W) result, refined -> (H, W) int64 class ids."""
    return dense_crf(image, scores, options, progress).argmax(0)


def crf_panoptic_segmentation(image, *logits, crf: CrfOptions | None = None, progress=False, **options):
    """`postprocessing.panoptic_segmentation`, whose segments and void then compete for the pixels in a CRF.

    Args:
        logits: class_logits, mask_logits and sizes, as there.
        options: as there, without `decide`.
    """
    claims, segments = panoptic_claims(*logits, **options)
    winner = dense_crf(image, claims, crf, progress).argmax(0) if segments else claims.argmax(0)
    return map_of_winners(winner, segments)


def map_of_winners(winner: Tensor, segments: list[dict]) -> tuple[Tensor, list[dict]]:
    """(H, W) position of the winning claim, and its segments, as `panoptic_segmentation` returns them.

    Segments that have no pixel left are dropped and the others numbered anew.
    """
    areas = winner.flatten().bincount(minlength=len(segments) + 1)[1:].tolist()
    ids, kept = [0], []
    for segment, area in zip(segments, areas, strict=True):
        if area:
            kept.append({**segment, "id": len(kept) + 1, "area": area})
        ids.append(len(kept) if area else 0)
    return torch.tensor(ids, dtype=torch.int32, device=winner.device)[winner], kept


def crf_instance_decision(
    image, *, mask_threshold: float = MASK_THRESHOLD, crf: CrfOptions | None = None, progress: bool = False
):
    """A `decide` of `postprocessing.instance_segmentation`: a CRF draws each mask against its surroundings.

    Every mask takes a run of its own, so a score threshold above 0 saves most of the time.

    Args:
        mask_threshold: probability, before and after, above which a pixel belongs to the instance.
        progress: show a bar over the masks.
    """
    bar = tqdm(desc="refining", unit="mask", disable=not progress, leave=False)

    def decide(probabilities: Tensor) -> Tensor:
        result = probabilities > mask_threshold
        for mask, drawn in zip(probabilities, result, strict=True):
            bar.update()
            around = _surroundings(mask)
            if around is not None:
                inside = mask[around]
                posterior = dense_crf(image[around], torch.stack([1 - inside, inside]), crf)[1]
                drawn[around] = posterior > mask_threshold
        return result

    return decide


def _surroundings(mask: Tensor):
    """Rows and columns of the box around what may be the instance, with a margin; None if it may be nowhere."""
    possible, slices = mask > MIN_INSTANCE_PROBABILITY, []
    if not possible.any():
        return None
    for used in (possible.any(1), possible.any(0)):
        first, last = used.nonzero()[[0, -1], 0].tolist()
        margin = BOX_MARGIN + (last + 1 - first) // 4
        slices.append(slice(max(0, first - margin), last + 1 + margin))
    return tuple(slices)


def _crops(length: int, options: CrfOptions) -> list[tuple[slice, slice]]:
    """(what a crop sees, what is kept of it) along one side."""
    if length <= options.crop:
        return [(slice(0, length), slice(0, length))]
    inner = options.crop - 2 * options.overlap
    return [
        (
            slice(max(0, start - options.overlap), min(length, start + inner + options.overlap)),
            slice(start, min(length, start + inner)),
        )
        for start in range(0, length, inner)
    ]


def _shift(kept: slice, offset: int) -> slice:
    return slice(kept.start - offset, kept.stop - offset)


def _infer(densecrf, image: np.ndarray, scores: np.ndarray, options: CrfOptions, bar) -> np.ndarray:
    (H, W), total = image.shape[:2], np.maximum(scores.sum(0), 1e-12)
    posterior = np.maximum(scores, 1e-12 / len(scores)) / total
    present = np.flatnonzero(posterior.reshape(len(scores), -1).max(1) >= MIN_PRESENCE)
    if len(present) < 2:
        bar.update(options.steps)
        return posterior
    field = densecrf.DenseCRF2D(W, H, len(present))
    energy = -np.log(np.maximum(posterior[present], MIN_PROBABILITY)).reshape(len(present), -1)
    field.setUnaryEnergy(np.ascontiguousarray(energy, dtype=np.float32))
    field.addPairwiseGaussian(sxy=options.smoothness_reach, compat=options.smoothness)
    field.addPairwiseBilateral(
        sxy=options.appearance_reach,
        srgb=options.appearance_colour,
        rgbim=np.require(image, requirements=["C", "W"]),  # the library takes no read-only array
        compat=options.appearance,
    )
    state, *buffers = field.startInference()
    for _ in range(options.steps):
        field.stepInference(state, *buffers)
        bar.update()
    result = np.zeros_like(posterior)
    result[present] = np.array(state).reshape(len(present), H, W)
    return result
