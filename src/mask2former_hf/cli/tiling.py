"""The flags that say how images go through the network: in tiles if they are large, through how many layers."""

import argparse

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
        help="share of the decoder's layers to run, 0 to 1, and below 1 on CPUs fewer queries (default: 1, all)",
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
