"""Settings that fit a data set: `--crop`, `--short-sides`, `--queries`, from the sizes and numbers of its objects."""

import numpy as np

from ..data.findings import ADVICE, Finding
from ..data.survey import Survey
from .backbones import queries_for

USUAL_QUERIES = 100
SMALLEST_SIDE = 8  # pixels of the square root of an object's area: two cells of the finest mask
SIDES = (256, 1024)  # least and largest crop that is advised
STEP = 32  # the coarsest map's stride


def advice(split: Survey) -> list[Finding]:
    """For training on a split; nothing without objects."""
    extents = [area**0.5 * 512 / min(fact.size) for fact in split.facts for area in fact.areas if area]
    if not extents:
        return []
    most, small = split.statistics.most, float(np.quantile(extents, 0.1))
    shorts = np.array([min(fact.size) for fact in split.facts])
    wanted = 512 * SMALLEST_SIDE / small  # at 512 the tenth percentile has `small`
    side = int(np.clip(-(-wanted // STEP) * STEP, *SIDES))
    side = min(side, max(SIDES[0], int(-(-float(np.median(shorts)) // STEP) * STEP)))  # larger shows nothing more
    queries = queries_for(most) if most > USUAL_QUERIES else USUAL_QUERIES
    short_sides = " ".join(str(round(side * tenths / 10 / STEP) * STEP) for tenths in (8, 10, 12, 15))
    return [
        Finding(
            ADVICE,
            split.split,
            f"a tenth of the objects has a side of under {small * side / 512:.0f} pixels at --crop {side}",
            f"masks have cells of 4 x 4 pixels, and the short side of the images is {np.median(shorts):.0f}",
            f"--crop {side}; and where objects are small, --augmentation resize-crop --short-sides {short_sides}",
        ),
        Finding(
            ADVICE,
            split.split,
            f"the fullest image has {most} segments, the average {split.statistics.mean:.1f}",
            "each query finds one",
            f"--queries {queries}",
        ),
    ]
