"""The flags of commands that segment large images in tiles."""

import argparse

from ..inference.tiles import MIN_TILE, OVERLAP


def add_tile_arguments(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--tile",
        type=tile_side,
        metavar="PIXELS",
        help="segment larger images in overlapping tiles of this side; auto: of the size the model was made for",
    )
    parser.add_argument(
        "--overlap", type=float, help=f"share of a tile that its neighbour sees too (default: {OVERLAP})"
    )


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
