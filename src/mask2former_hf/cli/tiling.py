"""The flags that say how images go through the network: in tiles if they are large, through how many layers."""

import argparse
import importlib.util

from ..data.image_lists import ImageFiles, ImageList
from ..data.windows import last_level
from ..inference.tiles import MIN_TILE, OVERLAP
from .main import UserError


def add_tile_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--tile",
        type=tile_side,
        metavar="PIXELS",
        help="segment larger images in overlapping tiles of this side; auto: of the size the model was made for",
    )
    parser.add_argument(
        "--overlap", type=float, help=f"with --tile: share of a tile that its neighbour sees too (default: {OVERLAP})"
    )


def add_effort_argument(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--effort",
        type=float,
        metavar="SHARE",
        help="share of the decoder's layers to run, 0 to 1, after a training with --encoder-exits of the encoder's; "
        "below 1 on CPUs also fewer queries (default: 1, all)",
    )


def overlap_of(tile: int | str | None, overlap: float | None) -> float:
    """The share, of the flags or of a settings file.

    Raises:
        UserError: for a share that is out of range, or of images that are taken whole.
    """
    if overlap is None:
        return OVERLAP
    if not isinstance(overlap, int | float) or not 0 <= overlap <= 0.5:
        raise UserError(f"--overlap {overlap}: must be between 0 and 0.5")
    if tile is None:
        raise UserError(f"--overlap {overlap:g}: only tiles overlap; add --tile, or leave it out")
    return overlap


def check_level(level: int, images: ImageList):
    """Refuse a level that no image has; what has others is left out when its turn comes.

    Raises:
        UserError: with what there is.
    """
    if level <= 0:
        return
    if importlib.util.find_spec("rasterio") is None:
        raise UserError(f"--level {level}: levels of a TIFF's pyramid are read by rasterio: pip install rasterio")
    highest = 0
    for path in images.paths if isinstance(images, ImageFiles) else ():
        highest = max(highest, last_level(path))
        if highest >= level:
            return
    found = f"the highest is {highest}" if highest else "they have no pyramid (overviews of a TIFF, as gdaladdo makes)"
    raise UserError(f"--level {level}: none of the {len(images)} images has it, {found}; leave it out, or make it")


def tile_side(text: str) -> int | str:
    """A number of pixels, or "auto"."""
    if text == "auto":
        return text
    try:
        side = int(text)
    except ValueError:
        side = 0
    if side < MIN_TILE:
        raise argparse.ArgumentTypeError(f"{text!r} must be auto or a number of pixels from {MIN_TILE}")
    return side
