"""The flag for the numbers in which a network runs."""

import argparse

from ..inference.precision import AUTO, NAMES


def add_dtype_argument(parser: argparse.ArgumentParser, usual: str = "as in the checkpoint's file"):
    parser.add_argument(
        "--dtype",
        choices=(AUTO, *NAMES),
        help=f"of the weights (default: {usual}); auto: bfloat16 where it is multiplied natively, else float32",
    )
