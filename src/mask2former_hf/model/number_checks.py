"""What numbers and labels have to be, without torch: runtimes that have none ask too."""

import reprlib
from collections.abc import Collection, Mapping
from numbers import Integral, Real

NOT_FINITE = "has values that are not numbers, or are infinite; is the image finite, and float16 wide enough?"


def check_fractions(**fractions):
    """Refuse what is no number from 0 to 1, by the argument's name."""
    for name, value in fractions.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(
                f"{name}={reprlib.repr(value)} must lie between 0 and 1: it is compared with probabilities or "
                "fractions; pass a number such as 0.5."
            )


def check_count(**counts):
    """Refuse what is no whole number from 1, by the argument's name."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"{name}={reprlib.repr(value)} must be at least 1, a whole number; pass how many are wanted, for "
                "example 100."
            )


def check_labels(**labels):
    """Refuse what is no collection of labels, by the argument's name."""
    for name, value in labels.items():
        several = isinstance(value, Collection) and not isinstance(value, str | Mapping)
        if not several or not all(isinstance(label, Integral) and label >= 0 for label in value):
            raise ValueError(
                f"{name}={reprlib.repr(value)} must be a list or set of labels, whole numbers from 0; an empty one "
                "for none."
            )
